"""Linear time-invariant recurrences: the same diagonal matrix at every step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import elementwise_scan, elementwise_scan_step
from ..state import State
from ..system import System
from .base import Mixer, Pass, pick, upcast


class LRUMixer(Mixer):
    """Linear Recurrent Unit (Orvieto et al. 2023, arXiv:2303.06349); ``(B, T, D)`` to ``(B, T, D)``.

    ``h_t = λ ⊙ h_{t-1} + γ ⊙ B x_t`` in complex numbers, ``y_t = Re(C h_t) + D ⊙ x_t``, then GELU and a gated
    linear layer. ``λ = exp(−e^ν + i e^θ)`` starts uniformly on the ring between ``r_min`` and ``r_max``, and
    γ as ``√(1 − |λ|²)``. There are no heads; ``heads`` is taken so that all mixers are built alike.

    Args:
        dim: D.
        heads: ignored.
        backend: of the kernels.
        state_size: N complex states; ``None`` is dim.
        r_min, r_max: radii of the ring; near one for long memory.
        max_phase: largest angle of λ; small for long memory.
    """

    operation = "scan"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        state_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__(dim, heads, backend)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min={r_min}, r_max={r_max} must satisfy 0 <= r_min < r_max <= 1")
        self.states = N = state_size or dim
        # Away from 0 and 1, where log log|λ| is not finite.
        radius = (torch.rand(N) * (r_max**2 - r_min**2) + r_min**2).clamp(1e-4, 1 - 1e-4).sqrt()
        phase = (torch.rand(N) * max_phase).clamp_min(1e-4)
        self.log_decay = nn.Parameter(torch.log(-radius.log()))
        self.log_phase = nn.Parameter(phase.log())
        self.log_gain = nn.Parameter(torch.log1p(-radius.square()) / 2)
        self.in_proj = nn.Linear(dim, 2 * N, bias=False)  # real and imaginary rows of B
        self.state_proj = nn.Linear(2 * N, dim, bias=False)  # real columns of C, imaginary columns of −C
        nn.init.normal_(self.in_proj.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(self.state_proj.weight, std=N**-0.5)
        self.skip = nn.Parameter(torch.randn(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the scan; see `Mixer.mix`."""
        rate, b = self._rate(), self._inputs(x)
        before = pick(state, "hidden")
        if p.one_token and before is not None:
            h, hidden = elementwise_scan_step(rate.expand_as(b[:, 0]), b[:, 0], before)
            h = h.unsqueeze(1)
        else:
            h, hidden = elementwise_scan(rate.expand_as(b), b, initial_state=before, **p.keywords("scan"))
        return self.read_out(h.unsqueeze(-1), x), {"hidden": hidden}

    def _rate(self) -> Tensor:
        radius = torch.exp(-upcast(self.log_decay).exp())
        return torch.polar(radius, upcast(self.log_phase).exp())

    def _inputs(self, x: Tensor) -> Tensor:
        real, imaginary = upcast(self.in_proj(x)).chunk(2, -1)
        return torch.complex(real, imaginary) * upcast(self.log_gain).exp()

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, complex; see `Mixer.init_state`."""
        zeros = self._zeros(batch, self.states, device=device, dtype=dtype)
        return {"hidden": torch.complex(zeros, zeros)}

    def system(self, x: Tensor) -> System:
        """Give A, B, C, u with a head for every complex state, N = V = 1, and u = γ ⊙ B x."""
        u = self._inputs(x)[..., None]
        return System(self._rate()[:, None].expand_as(u), torch.ones_like(u), torch.ones_like(u), u)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """``Re(C o) + D ⊙ x``, then GELU and the gated linear layer; see `Mixer.read_out`."""
        h = o.squeeze(-1)
        y = self.state_proj(torch.cat([h.real, h.imag], -1).to(x.dtype)) + self.skip * x
        return F.glu(self.out_proj(F.gelu(y)), -1)
