"""Mamba (Gu & Dao 2023, arXiv:2312.00752): a diagonal state space steered by its input."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import selective_scan, selective_scan_step
from ..state import State
from ..system import System
from .base import Mixer, Pass, ShortConvolution, head_size, pick, upcast


class MambaMixer(Mixer):
    """The block of Mamba (figure 3 of the paper), with S6 in it; ``(B, T, D)`` to ``(B, T, D)``.

    The input gives x and a gate z of E = expand·D channels each. x goes through a short convolution with
    SiLU, and from it come a low-rank step Δ = softplus(W_Δ W_r x + b), B and C. Every channel is the scan
    ``h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t``, ``y_t = C_t·h_t + D x_t``, and SiLU(z) gates it. A starts as
    −(1, …, N) in every channel (S4D-Real), D as one, and b such that Δ lies log-uniformly in [0.001, 0.1].
    There are no heads; ``heads`` is taken so that all mixers are built alike.

    Args:
        dim: D.
        heads: ignored.
        backend: of the kernels.
        expand: E / D.
        state_size: N, states a channel.
        conv: width of the short convolution.
        rank: of the step size; ``None`` is ⌈D / 16⌉.
    """

    operation = "selective"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        expand: float = 2.0,
        state_size: int = 16,
        conv: int = 4,
        rank: int | None = None,
    ) -> None:
        super().__init__(dim, heads, backend)
        if state_size < 1 or (rank is not None and rank < 1):
            raise ValueError(f"backbone.options: state_size={state_size} and rank={rank} must be at least 1")
        self.channels = E = head_size(dim, 1, expand, "backbone.options: expand")
        self.states, self.rank = state_size, rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * E, bias=False)
        self.conv = ShortConvolution(E, conv, bias=True)
        self.select_proj = nn.Linear(E, self.rank + 2 * state_size, bias=False)
        self.step_size = nn.Linear(self.rank, E, bias=False)
        nn.init.uniform_(self.step_size.weight, -(self.rank**-0.5), self.rank**-0.5)
        step = torch.empty(E).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        self.log_rate = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(E, 1))
        self.skip = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, dim, bias=False)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the convolution and the scan; see `Mixer.mix`."""
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = self.conv(u, p, pick(state, "conv"))
        step, B, C = self._select(u)
        A, D = -upcast(self.log_rate).exp(), upcast(self.skip)
        before = pick(state, "hidden")
        if p.one_token and before is not None:
            u_t, step_t, B_t, C_t, z_t = (t.squeeze(1) for t in (u, step, B, C, z))
            y, hidden = selective_scan_step(u_t, step_t, A, B_t, C_t, D, z_t, before)
            y = y.unsqueeze(1)
        else:
            y, hidden = selective_scan(
                u, step, A, B, C, D, z, initial_state=before, **p.keywords("selective")
            )
        return self.out_proj(y), {"conv": conv, "hidden": hidden}

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give Δ ``(B, T, E)`` in float32, B and C ``(B, T, N)`` for the channels after the convolution."""
        low, B, C = self.select_proj(u).split([self.rank, self.states, self.states], -1)
        return F.softplus(upcast(self.step_size(low)) + upcast(self.step_bias)), B, C

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; see `Mixer.init_state`."""
        width = self.conv.weight.shape[1]
        return {
            "conv": self._zeros(batch, self.channels, width - 1, device=device, dtype=dtype),
            "hidden": self._zeros(batch, self.channels, self.states, device=device, dtype=dtype),
        }

    def system(self, x: Tensor) -> System:
        """Give A, B, C, D, u with a head for every channel and V = 1; u is what left the convolution."""
        u, _ = self.conv(self.in_proj(x).chunk(2, -1)[0], Pass(backends=self.backends), None)
        step, B, C = self._select(u)
        A = torch.exp(-step[..., None] * upcast(self.log_rate).exp())
        C = C.unsqueeze(-2).expand_as(A)
        return System(A, step[..., None] * B.unsqueeze(-2), C, u[..., None], self.skip.expand_as(u))

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """``W_out (o silu(z))``; see `Mixer.read_out`."""
        z = self.in_proj(x).chunk(2, -1)[1]
        y: Tensor = self.out_proj((o.squeeze(-1) * F.silu(upcast(z))).to(x.dtype))
        return y
