"""What the chunked matrix-state backends share: walking in chunks, and the decays within a chunk."""

from collections.abc import Iterator

import torch
from torch import Tensor

# The factored form multiplies numbers as far apart as exp(±SPREAD / 2); float32 ends at exp(±88).
SPREAD = 60.0


def chunk_size(g: Tensor | None) -> int:
    """Tokens in a chunk: fewer where every key channel decays on its own, as their pairs are dearer."""
    return 16 if g is not None and g.shape[-1] > 1 else 64


def walk(begin: int, end: int, size: int, reverse: bool) -> list[tuple[int, int]]:
    """Cut ``begin … end`` into chunks, in the order in which the scan meets them."""
    if reverse:
        return [(max(begin, stop - size), stop) for stop in range(end, begin, -size)]
    return [(start, min(end, start + size)) for start in range(begin, end, size)]


def cut(
    xs: tuple[Tensor, ...], bounds: tuple[int, int], reverse: bool, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield one chunk of each ``(B, T, H, ·)`` as ``(B, H, C, ·)``, in the order of the walk."""
    for x in xs:
        piece = x[:, bounds[0] : bounds[1]].to(dtype)
        yield (piece.flip(1) if reverse else piece).transpose(1, 2)


def put(to: Tensor, piece: Tensor, bounds: tuple[int, int], reverse: bool) -> None:
    """Write a chunk ``(B, H, C, ·)`` back to its place in ``(B, T, H, ·)``."""
    piece = piece.transpose(1, 2)
    to[:, bounds[0] : bounds[1]] = piece.flip(1) if reverse else piece


def prefix(x: Tensor) -> Tensor:
    """Sum of the tokens before each token ``(…, C, ·)``."""
    return torch.cumsum(torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2), -2)


def suffix(x: Tensor) -> Tensor:
    """Sum of each token and all after it."""
    return x.flip(-2).cumsum(-2).flip(-2)


class ChunkDecay:
    """Decays of one chunk, from its log-decays ``g (B, H, C, 1 or K)``.

    Only sums of g are exponentiated, never a difference of two sums that may both be −inf; in the factored
    form, taken where it is safe, the exponents are differences bounded by `SPREAD`.

    Attributes:
        start: decay from the chunk's start through each token ``(B, H, C, 1 or K)``.
        end: decay from behind each token to the chunk's end.
        whole: decay of the whole chunk ``(B, H, 1 or K, 1)``, as it acts on the state.
    """

    def __init__(self, g: Tensor) -> None:
        C = g.shape[-2]
        sums = g.cumsum(-2)
        self.start = sums.exp()
        self.end = torch.cat([suffix(g[..., 1:, :]), torch.zeros_like(g[..., :1, :])], -2).exp()
        self.whole = self.start[..., -1, :, None]
        self.lower = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()
        self.factors: tuple[Tensor, Tensor] | None = None
        if g.shape[-1] > 1 and bool((sums[..., -1, :] >= -SPREAD).all()):
            middle = sums[..., C // 2, None, :]
            self.factors = (sums - middle).exp(), (middle - sums).exp()
        else:
            strict = self.lower.tril(-1)[..., None]
            pairs = g[..., :, None, :].masked_fill(~strict, 0.0).cumsum(-3)
            self.pairs = pairs.masked_fill(~self.lower[..., None], -torch.inf).exp()  # (B, H, C, C, 1 or K)

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Lower triangle of ``Σ_k x_ik y_jk exp(g_{j+1} + … + g_i)_k``."""
        if self.factors is not None:
            return ((x * self.factors[0]) @ (y * self.factors[1]).mT).masked_fill(~self.lower, 0.0)
        if self.pairs.shape[-1] == 1:
            return (x @ y.mT) * self.pairs[..., 0]
        return torch.einsum("...ik,...jk,...ijk->...ij", x, y, self.pairs)

    def scores_backward(self, x: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and y from the gradient ``d`` of their scores, which is zero above the diagonal."""
        if self.factors is not None:
            up, down = self.factors
            return (d @ (y * down)) * up, (d.mT @ (x * up)) * down
        if self.pairs.shape[-1] == 1:
            d = d * self.pairs[..., 0]
            return d @ y, d.mT @ x
        d = d[..., None] * self.pairs
        return torch.einsum("...ijk,...jk->...ik", d, y), torch.einsum("...ijk,...ik->...jk", d, x)

    def gradient(self, g: Tensor, rows: Tensor, columns: Tensor, through: Tensor) -> Tensor:
        """Gradient of g ``(B, H, C, K)``.

        Args:
            g: log-decays of the chunk.
            rows: what each token takes from before it: ``x ∘ dx`` of the left side of pairs and of the old
                state, less ``y ∘ dy`` of the right side of pairs; a token's pair with itself left out.
            columns: what each token gives to the state at the chunk's end, ``k ∘ dk``.
            through: what the state carries across the whole chunk ``(B, H, K)``.
        """
        dg = suffix(rows) + prefix(columns) + through[..., None, :]
        return dg.masked_fill(g.exp() == 0, 0.0)
