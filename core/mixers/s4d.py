"""S4D: diagonal complex state space layers (Gu et al. 2022, arXiv:2206.11893)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import elementwise_scan
from ..state import State
from ..system import System
from .base import Pass, upcast
from .chunks import Chunks
from .state_space import ChunkMatrices, StateSpaceMixer


class S4DMixer(StateSpaceMixer):
    """Diagonal state space layer; ``(B, T, D)`` to ``(B, T, D)``.

    ``ḣ = A h + B x``, ``y = 2 Re(C h) + D x`` for every channel, with N/2 complex states that stand for N of
    conjugate pairs, and ``B = 1``, which C contains; then GELU and a gated linear layer. ``Re A = −e^α``
    starts at −1/2. There are no heads; ``heads`` is taken so that all mixers are built alike.

    Args:
        dim: D.
        heads: ignored.
        backend: of the kernels.
        state_size: N, even.
        initialisation: of ``Im A``: ``"linear"`` is ``π n`` (S4D-Lin), ``"inverse"`` is
            ``N/π (N/(2n+1) − 1)`` (S4D-Inv).
        discretisation: ``"zoh"`` (zero-order hold) or ``"bilinear"``.
        dt_min, dt_max: range of the steps Δ, one a channel, log-uniform.
        chunk: tokens a chunk.
    """

    operation = "scan"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        state_size: int = 64,
        initialisation: Literal["linear", "inverse"] = "linear",
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk: int = 64,
    ) -> None:
        super().__init__(dim, heads, backend, chunk)
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size={state_size} must be even: states come in conjugate pairs")
        if discretisation not in ("zoh", "bilinear"):
            raise ValueError(
                f"backbone.options: discretisation = {discretisation!r}: choose one of zoh, bilinear"
            )
        self.states, self.discretisation = state_size // 2, discretisation
        self.log_dt = nn.Parameter(log_uniform(dim, dt_min, dt_max))
        self.log_decay = nn.Parameter(torch.full((dim, self.states), math.log(0.5)))
        self.frequency = nn.Parameter(frequencies(state_size, initialisation).float().expand(dim, -1).clone())
        self.state_proj = nn.Parameter(torch.randn(dim, self.states, 2) * 0.5**0.5)
        self.out_proj = nn.Linear(dim, 2 * dim)

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ā, B̄ and 2C: ``(D, N/2)``, complex."""
        A = torch.complex(-upcast(self.log_decay).exp(), upcast(self.frequency))
        step = upcast(self.log_dt).exp()[:, None]
        C = 2 * torch.view_as_complex(upcast(self.state_proj).contiguous())
        if self.discretisation == "bilinear":
            below = 1 - step / 2 * A
            return (1 + step / 2 * A) / below, step / below, C
        power = torch.exp(step * A)
        return power, (power - 1) / A, C

    def _matrices(self, size: int) -> ChunkMatrices:
        A, B, C = self._discrete()
        powers, square = torch.stack([torch.ones_like(A), A], -1), A * A
        while powers.shape[-1] <= size:
            # The exponents 0 … n−1 and n … 2n−1; square is Āⁿ.
            powers = torch.cat([powers, powers * square[..., None]], -1)
            square = square * square
        powers = powers[..., : size + 1]
        write = powers[..., :size] * B[..., None]
        kernel = torch.einsum("dn,dnc->dc", C, write).real
        read = (powers[..., 1:] * C[..., None]).mT
        return ChunkMatrices(kernel, read, write.flip(-1), powers)

    def _carry(self, added: Tensor, m: ChunkMatrices, chunks: Chunks, initial: Tensor, p: Pass) -> Tensor:
        assert isinstance(m.powers, Tensor)
        if chunks.bounds is not None:
            initial = F.pad(torch.view_as_real(initial), (0, 0, 0, 0, 0, 0, 0, 1))
            initial = torch.view_as_complex(initial)
        length = added.shape[0] // max(chunks.batch, 1)  # -1 would be ambiguous where the batch is empty
        b = added.view(chunks.batch, length, self.dim * self.states)
        a = m.powers[..., -1].flatten().expand_as(b)
        h = elementwise_scan(
            a,
            b,
            cu_seqlens=chunks.bounds,
            initial_state=initial.flatten(1),
            backend=p.backends.get("scan", "auto"),
        )
        assert isinstance(h, Tensor)
        return h.view(added.shape)

    def _advance(self, state: Tensor, m: ChunkMatrices, steps: Tensor) -> Tensor:
        assert isinstance(m.powers, Tensor)
        return m.powers.movedim(-1, 0)[steps] * state

    def _one(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A, B, C = self._discrete()
        state = A * state + B * x[..., None]
        return (C * state).sum(-1).real, state

    def _project(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), -1)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, complex; see `Mixer.init_state`."""
        zeros = self._zeros(batch, self.dim, self.states, device=device, dtype=dtype)
        return {"hidden": torch.complex(zeros, zeros)}

    def system(self, x: Tensor) -> System:
        """Give A (diagonal), B, C, u with a head a channel and V = 1; the output's real part is meant."""
        shape = (*x.shape, self.states)
        A, B, C = (t.expand(shape) for t in self._discrete())
        return System(A, B, C, upcast(x)[..., None])


def frequencies(state_size: int, initialisation: str) -> Tensor:
    """``Im A`` of S4D-Lin or S4D-Inv: ``(N/2,)``, float64.

    Raises:
        ValueError: an unknown initialisation.
    """
    n = torch.arange(state_size // 2, dtype=torch.float64)
    if initialisation == "linear":
        return math.pi * n
    if initialisation == "inverse":
        return state_size / math.pi * (state_size / (2 * n + 1) - 1)
    raise ValueError(f"backbone.options: initialisation = {initialisation!r}: choose one of linear, inverse")


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """Logarithms of steps that are log-uniform between ``low`` and ``high``: ``(size,)``."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min and dt_max must rise from above 0, got {low} and {high}")
    return torch.empty(size).uniform_(math.log(low), math.log(high))
