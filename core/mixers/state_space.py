"""State space layers that do not change with time: ``h_t = Ā h_{t-1} + B̄ x_t``, ``y_t = C h_t + D x_t``.

Every channel is a system of its own with N states. Tokens are taken in chunks: within a chunk the system is
the convolution with ``K = (CB̄, CĀB̄, …)``, what enters with the state adds ``C Ā^{i+1} h``, and what leaves is
``Ā^C h + Σ_i Ā^{C-1-i} B̄ x_i``. So the state is exact at every token, no token sees a later one, and memory a
token does not grow with N as it would in a scan of all states.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...kernels import long_convolution
from ..state import State
from .base import Mixer, Pass, pick, upcast
from .chunks import Chunks


class ChunkMatrices(NamedTuple):
    """What C steps of the system do, for D channels.

    Attributes:
        kernel: ``(D, C)``, the response ``C Ā^i B̄``.
        read: ``(D, C, N)``, ``C Ā^{i+1}``; for complex states the real part of the product is meant.
        write: ``(D, N, C)``, ``Ā^{C-1-i} B̄``.
        powers: of Ā, as `StateSpaceMixer._carry` and `_advance` need them.
    """

    kernel: Tensor
    read: Tensor
    write: Tensor
    powers: Tensor | list[Tensor]


class StateSpaceMixer(Mixer):
    """Base of time-invariant state space layers; ``(B, T, D)`` to ``(B, T, D)``.

    Args:
        dim: D.
        heads: ignored.
        backend: of the kernels.
        chunk: C, tokens a chunk, a power of two. From 128 on the convolution is a Fourier transform.
    """

    def __init__(self, dim: int, heads: int, backend: str, chunk: int) -> None:
        super().__init__(dim, heads, backend)
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"chunk={chunk} must be a power of two")
        self.chunk = chunk
        self.skip = nn.Parameter(torch.randn(dim))

    @abstractmethod
    def _matrices(self, size: int) -> ChunkMatrices:
        """Compute what ``size`` steps do."""

    @abstractmethod
    def _carry(self, added: Tensor, m: ChunkMatrices, chunks: Chunks, initial: Tensor, p: Pass) -> Tensor:
        """Run ``h ← Ā^C h + added`` over the chunks: the state after each ``(N, D, states)``."""

    @abstractmethod
    def _advance(self, state: Tensor, m: ChunkMatrices, steps: Tensor) -> Tensor:
        """Multiply ``state (S, D, states)`` by ``Ā^steps``, 0 ≤ steps ≤ C, one number a sequence."""

    @abstractmethod
    def _one(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one token ``x (B, D)``: ``C h`` and h."""

    @abstractmethod
    def _project(self, y: Tensor) -> Tensor:
        """Map the outputs of the channels ``(B, T, D)`` to those of the layer."""

    def kernel(self, length: int) -> Tensor:
        """Give the layer as a convolution: ``C Ā^i B̄`` for i < ``length``, ``(D, length)``."""
        size = 1 << max(length - 1, 0).bit_length()
        return self._matrices(size).kernel[:, :length]

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the system; see `Mixer.mix`."""
        # Powers of Ā and what they carry are never computed in half precision.
        with torch.autocast(x.device.type, enabled=False):
            o, hidden = self._run(upcast(x), p, pick(state, "hidden"))
        return self._finish(o, x), {"hidden": hidden}

    def _run(self, u: Tensor, p: Pass, before: Tensor | None) -> tuple[Tensor, Tensor]:
        if p.one_token and before is not None:
            o, hidden = self._one(u[:, 0], before)
            return o[:, None], hidden
        m = self._matrices(self.chunk)
        chunks = Chunks.of(p.cu_seqlens, p.reverse, u, self.chunk)
        if before is None:
            before = self.init_state(chunks.last.shape[0], u.device, u.dtype)["hidden"]
        inside, late = chunks.split(u)
        y = long_convolution(inside, m.kernel, backend=p.backends.get("long_conv", "auto"))
        assert isinstance(y, Tensor)
        after = self._carry(_write(m.write, inside), m, chunks, before, p)
        entered, hidden = chunks.before(after, before)
        if p.keep_state:
            hidden = self._advance(hidden, m, chunks.rest) + _write(m.write, late)
        return chunks.join(y + _read(m.read, entered), u), hidden

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        return self._project((o + upcast(self.skip) * upcast(x)).to(x.dtype))

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Take the real part, add ``D ⊙ x`` and project; see `Mixer.read_out`."""
        o = o.squeeze(-1)
        return self._finish(o.real if o.is_complex() else o, x)


def doubled(power: Tensor, start: Tensor, length: int) -> tuple[Tensor, list[Tensor]]:
    """Compute ``(start, P start, P² start, …)``, ``length`` of them, by doubling.

    Args:
        power: P ``(D, N, N)``.
        start: ``(D, N)``.
        length: a power of two.

    Returns:
        ``(D, N, length)``, and ``P, P², P⁴, …, P^length``.
    """
    columns, powers = start[..., None], [power]
    while columns.shape[-1] < length:
        columns = torch.cat([columns, powers[-1] @ columns], -1)
        powers.append(powers[-1] @ powers[-1])
    return columns, powers


def _write(write: Tensor, x: Tensor) -> Tensor:
    """Sum ``write (D, N, C) · x (M, C, D)`` over C: ``(M, D, N)``."""
    if write.is_complex():
        parts = torch.view_as_real(write).movedim(-1, 1)  # (D, 2, N, C)
        real, imaginary = torch.einsum("dknc,mcd->kmdn", parts, x)
        return torch.complex(real, imaginary)
    return torch.einsum("dnc,mcd->mdn", write, x)


def _read(read: Tensor, state: Tensor) -> Tensor:
    """Sum ``read (D, C, N) · state (M, D, N)`` over N, and take the real part: ``(M, C, D)``."""
    if read.is_complex():
        # Re(r h) = Re r · Re h − Im r · Im h, as one real product.
        r, h = torch.cat([read.real, -read.imag], -1), torch.cat([state.real, state.imag], -1)
        return torch.einsum("dcn,mdn->mcd", r, h)
    return torch.einsum("dcn,mdn->mcd", read, state)
