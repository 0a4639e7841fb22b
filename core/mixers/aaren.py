"""Attention as a recurrent network (Aaren, Feng et al. 2024, arXiv:2405.13956).

Every head has one learned query, so that causal softmax attention is a running average with a constant state:
``o_t = Σ_{i≤t} e^{s_i} v_i / Σ_{i≤t} e^{s_i}``, ``s_i = q·k_i / √K``.
"""

import math

import torch
from torch import Tensor, nn

from ...kernels import logcumsumexp, logsumexp_scan, logsumexp_scan_step
from ..packed import previous
from ..state import State
from ..system import System
from .base import Mixer, Pass, pick, upcast


class AarenMixer(Mixer):
    """Softmax attention with a learned query a head; ``(B, T, D)`` to ``(B, T, D)``.

    Args:
        dim: D.
        heads: H.
        backend: of the kernels.
    """

    operation = "scan"

    def __init__(self, dim: int, heads: int, backend: str = "auto") -> None:
        super().__init__(dim, heads, backend)
        self.size = dim // heads
        self.query = nn.Parameter(torch.randn(heads, self.size))
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the scan; see `Mixer.mix`."""
        score, v = self._terms(x)
        before = pick(state, "average")
        if p.one_token and before is not None:
            o, average = logsumexp_scan_step(score[:, 0], v[:, 0], before)
            o = o.unsqueeze(1)
        else:
            o, average = logsumexp_scan(score, v, initial_state=before, **p.keywords("scan"))
        return self.read_out(o, x), {"average": average}

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (t.unflatten(-1, (self.heads, self.size)) for t in self.in_proj(x).chunk(2, -1))
        return (upcast(k) * upcast(self.query)).sum(-1) * self.size**-0.5, v

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Give an empty average: maximum −∞, sum and weighted sum zero."""
        average = self._zeros(batch, self.heads, self.size + 2, device=device, dtype=dtype)
        average[..., 0] = -math.inf
        return {"average": average}

    def system(self, x: Tensor) -> System:
        """Give A, B, C, u with N = 1: ``A_t = e^{z_{t-1} − z_t}``, ``B_t = e^{s_t − z_t}``, z the log-sum."""
        score, v = self._terms(x)
        total, _ = logcumsumexp(score, return_final_state=True)
        entering = previous(total, torch.full_like(score[:, 0], -math.inf))
        A, B = (entering - total).exp(), (score - total).exp()
        return System(A[..., None], B[..., None], torch.ones_like(B)[..., None], v)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Project; see `Mixer.read_out`."""
        y: Tensor = self.out_proj(o.flatten(-2))
        return y
