"""RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456): a delta rule with a removal key and a rate a channel.

``S_t = (Diag(w_t) − (a_t ⊙ κ̂_t) κ̂_tᵀ) S_{t-1} + k̃_t v_tᵀ``, ``o_t = S_tᵀ r_t``, then a norm a head, the
bonus ``(r_t · (ρ ⊙ k̃_t)) v_t`` and a gate.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels import generalized_delta_rule, generalized_delta_rule_step
from ..norms import l2_normalise
from ..state import State
from ..system import System
from .base import Mixer, Pass, pick, upcast
from .token_shift import TokenShift

# The sums r·S are not divided by √K before the norm: 1e-5 for each of 8² that they are larger by.
EPS = 64e-5
SLOWEST = math.exp(-0.5)
"""The decay never falls below exp(−e^{−1/2}) = 0.545 a step."""


class LowRank(nn.Module):
    """``f(x A) B + λ``: ``(B, T, D)`` to ``(B, T, D)``.

    A starts at zero, so that λ alone acts.
    """

    def __init__(
        self, dim: int, rank: int, activation: Callable[[Tensor], Tensor] | None, bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(dim, min(rank, dim), bias=False)
        self.up = nn.Linear(min(rank, dim), dim, bias=bias)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1)
        if bias:
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``."""
        low = self.down(x)
        y: Tensor = self.up(low if self.activation is None else self.activation(low))
        return y


class Terms(NamedTuple):
    """What the recurrence and the read-out take: ``(B, T, H, K)`` each, the gate ``(B, T, D)``, the shift's
    state.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    decay: Tensor
    gate: Tensor
    shift: Tensor


class RWKV7Mixer(Mixer):
    """Time mixing of RWKV-7; ``(B, T, D)`` to ``(B, T, D)``.

    r, k, v, the decay's d, the rate's a and the gate's g are each made of a mixture ``x_t + (x_{t-1} − x_t) ⊙
    μ`` of the token and the one before it. The log decay is ``−e^{−1/2} σ(d)``; ``κ = k ⊙ ξ`` says what is
    removed, at length one a head, and ``k̃ = k ⊙ (1 + (a − 1) ⊙ α)`` where the value is written. The paper
    also mixes the values of the first layer into those of all others; a mixer sees no other layer, so that
    this is left out. The block's channel mixer takes the place of RWKV's.

    Args:
        dim: D.
        heads: H.
        backend: of the kernels.
        layer, depth: place in the stack; deeper layers start with longer memories and mix less.
        decay_rank, rate_rank, gate_rank: ranks of the maps that make the decay, the rate and the gate; at
        most D.
    """

    operation = "dplr"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        layer: int = 0,
        depth: int = 1,
        *,
        decay_rank: int = 64,
        rate_rank: int = 64,
        gate_rank: int = 128,
    ) -> None:
        super().__init__(dim, heads, backend)
        for name, rank in (("decay_rank", decay_rank), ("rate_rank", rate_rank), ("gate_rank", gate_rank)):
            if rank < 1:
                raise ValueError(f"{name}={rank} must be at least 1")
        self.size = dim // heads
        self.shift = TokenShift()
        self.lerp = nn.Parameter(torch.empty(6, dim))  # μ of r, k, v, d, a and g
        self.decay = LowRank(dim, decay_rank, torch.tanh, bias=True)
        self.rate = LowRank(dim, rate_rank, None, bias=True)
        self.gate = LowRank(dim, gate_rank, torch.sigmoid, bias=False)
        self.removal = nn.Parameter(torch.full((dim,), 0.85))  # ξ
        self.replacement = nn.Parameter(torch.ones(dim))  # α
        self.bonus = nn.Parameter(torch.zeros(heads, self.size))  # ρ
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.norm = nn.GroupNorm(heads, dim, eps=EPS)
        self._initialise(layer, depth)

    @torch.no_grad()
    def _initialise(self, layer: int, depth: int) -> None:
        """Start with channels from quick to slow, the slower the deeper the layer."""
        channel = torch.arange(self.dim) / self.dim
        rise = layer / max(1, depth - 1)  # 0 in the first layer, 1 in the last
        fall = 1 - layer / depth  # 1 in the first layer, near 0 in the last
        # Powers of the channel for r, k, v, d, a, g: the gate and the query look back least.
        self.lerp.copy_(torch.stack([1 - channel ** (fall * p) for p in (0.2, 0.7, 0.7, 0.9, 0.9, 0.2)]))
        along = torch.arange(self.dim) / max(1, self.dim - 1)
        self.decay.up.bias.copy_(-6.5 + 5 * along ** (0.85 + rise**0.5))

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the recurrence; see `Mixer.mix`."""
        terms = self._terms(x, p, pick(state, "shift"))
        before = pick(state, "memory")
        if p.one_token and before is not None:
            r, k, v, a, b, decay = (t.squeeze(1) for t in terms[:6])
            o, memory = generalized_delta_rule_step(r, k, v, a, b, decay, before, scale=1.0)
            o = o.unsqueeze(1)
        else:
            how = p.keywords("dplr")
            o, memory = generalized_delta_rule(*terms[:6], scale=1.0, initial_state=before, **how)
        return self._output(o, terms), {"shift": terms.shift, "memory": memory}

    def _terms(self, x: Tensor, p: Pass, shift: Tensor | None) -> Terms:
        shifted, after = self.shift(x, p, shift)
        mixtures = torch.addcmul(x, (shifted - x).unsqueeze(0), self.lerp[:, None, None].to(x.dtype))
        r, k, v, d, a, g = mixtures.unbind(0)
        decay = -SLOWEST * upcast(self.decay(d)).sigmoid()
        rate = upcast(self.rate(a)).sigmoid()
        k, gate = self.key_proj(k), self.gate(g)
        r, v, rate, decay, removed, written = (
            t.unflatten(-1, (self.heads, self.size))
            for t in (
                self.query_proj(r),
                self.value_proj(v),
                rate,
                decay,
                k * self.removal,
                k * (1 + (rate - 1) * self.replacement),
            )
        )
        kappa = l2_normalise(removed)
        erased = (-rate * kappa).to(v.dtype)
        return Terms(r, written.to(v.dtype), v, kappa.to(v.dtype), erased, decay, gate, after)

    def _own_weight(self, terms: Terms) -> Tensor:
        """``r_t·Diag(ρ) k̃_t``: what a token gives to itself, ``(B, T, H, 1)``."""
        weight = (upcast(terms.r) * upcast(self.bonus) * upcast(terms.k)).sum(-1, keepdim=True)
        return weight.to(terms.v.dtype)

    def _output(self, o: Tensor, terms: Terms) -> Tensor:
        channels = o.reshape(-1, self.dim).to(self.norm.weight.dtype)
        normed = self.norm(channels).view(terms.gate.shape).to(terms.gate.dtype)
        own = (self._own_weight(terms) * terms.v).flatten(-2)
        y: Tensor = self.out_proj((normed + own.to(normed.dtype)) * terms.gate)
        return y

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; see `Mixer.init_state`."""
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        return {
            "shift": self._zeros(batch, self.dim, **where),
            "memory": self._zeros(batch, self.heads, self.size, self.size, **where),
        }

    def system(self, x: Tensor) -> System:
        """Give A, B, C, u; see `Mixer.system`. The bonus comes after the norm, with the read-out."""
        r, k, v, a, b, decay = self._terms(x, Pass(), None)[:6]
        A = decay.exp().diag_embed() + upcast(b)[..., :, None] * upcast(a)[..., None, :]
        return System(A, k, r, v)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalise, add the bonus, gate and project; see `Mixer.read_out`."""
        return self._output(o, self._terms(x, Pass(), None))
