"""RWKV-6 "Finch" (Peng et al. 2024, arXiv:2404.05892): token shift and decay that depend on the data.

``S_t = Diag(w_t) S_{t-1} + k_t v_tᵀ``, ``o_t = (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ r_t``: a token reads the memory
before it writes to it, and sees itself through the bonus u.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_recurrence, linear_recurrence_step
from ..packed import previous
from ..state import State
from ..system import System
from .base import Mixer, Pass, pick, upcast
from .token_shift import TokenShift

# The sums r·S are not divided by √K before the norm: 1e-5 for each of 8² that they are larger by.
EPS = 64e-5


class Terms(NamedTuple):
    """What the recurrence and the read-out take: ``(B, T, H, K)`` each, the gate ``(B, T, D)``, the shift's
    state.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    gate: Tensor
    shift: Tensor


class RWKV6Mixer(Mixer):
    """Time mixing of RWKV-6; ``(B, T, D)`` to ``(B, T, D)``.

    Each of r, k, v, the gate and the decay is made of its own mixture of the token and the one before it,
    ``x_t + (x_{t-1} − x_t) ⊙ (λ + B tanh(A x'))`` with ``x' = x_t + (x_{t-1} − x_t) ⊙ μ``.
    The decay is ``w = exp(−exp(d_t))``, d another low-rank map. Heads are normalised one by
    one and gated by SiLU. The block's channel mixer takes the place of RWKV's.

    Args:
        dim: D.
        heads: H.
        backend: of the kernels.
        layer, depth: place in the stack; deeper layers start with longer memories and mix less.
        lerp_rank: rank of the mixtures' low-rank map; at most D.
        decay_rank: rank of the decay's; at most D.
    """

    operation = "linear"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        layer: int = 0,
        depth: int = 1,
        *,
        lerp_rank: int = 32,
        decay_rank: int = 64,
    ) -> None:
        super().__init__(dim, heads, backend)
        for name, rank in (("lerp_rank", lerp_rank), ("decay_rank", decay_rank)):
            if rank < 1:
                raise ValueError(f"{name}={rank} must be at least 1")
        self.size = dim // heads
        rank = min(lerp_rank, dim)
        self.shift = TokenShift()
        self.first_lerp = nn.Parameter(torch.empty(dim))  # μ
        self.lerp = nn.Parameter(torch.empty(5, dim))  # λ of w, k, v, r and the gate
        self.lerp_down = nn.Linear(dim, 5 * rank, bias=False)
        self.lerp_up = nn.Parameter(torch.empty(5, rank, dim).uniform_(-0.01, 0.01))
        self.decay_down = nn.Linear(dim, min(decay_rank, dim), bias=False)
        self.decay_up = nn.Linear(min(decay_rank, dim), dim)
        self.bonus = nn.Parameter(torch.empty(heads, self.size))
        self.key_proj, self.value_proj, self.query_proj, self.gate_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(5)
        )
        self.norm = nn.GroupNorm(heads, dim, eps=EPS)
        self._initialise(layer, depth)

    @torch.no_grad()
    def _initialise(self, layer: int, depth: int) -> None:
        """Start as the paper does: channels from quick to slow, the more so the deeper the layer."""
        channel = torch.arange(self.dim) / self.dim
        rise = layer / max(1, depth - 1)  # 0 in the first layer, 1 in the last
        fall = 1 - layer / depth  # 1 in the first layer, near 0 in the last
        early = 1 - channel**fall
        self.first_lerp.copy_(early)
        half = 1 - channel ** (fall / 2)
        self.lerp.copy_(torch.stack([early, early, early - 0.3 * rise, half, half]))
        nn.init.zeros_(self.lerp_down.weight)
        nn.init.zeros_(self.decay_down.weight)
        self.decay_up.weight.uniform_(-0.01, 0.01)
        along = torch.arange(self.dim) / max(1, self.dim - 1)
        self.decay_up.bias.copy_(-6 + 5 * along ** (0.7 + 1.3 * rise))
        zigzag = ((torch.arange(self.dim) + 1) % 3 - 1) * 0.1
        self.bonus.copy_((rise * (1 - along) + zigzag).view_as(self.bonus))

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the recurrence; see `Mixer.mix`."""
        terms = self._terms(x, p, pick(state, "shift"))
        before = pick(state, "memory")
        if p.one_token and before is not None:
            o, memory = self._one_token(terms, before)
        else:
            o, memory = self._scan(terms, p, before)
        o = o + self._own_weight(terms) * terms.v
        return self._output(o, terms.gate), {"shift": terms.shift, "memory": memory}

    def _scan(self, terms: Terms, p: Pass, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read the memory before each token.

        ``r_{t+1}·S_t`` is what token t+1 wants: the queries move one token back, and the outputs forward.
        The decays stay where they are, so that a decay of zero is as exact as any other.
        """
        backwards = replace(p, reverse=not p.reverse)
        r, first_r = self.shift(terms.r.flatten(-2), backwards, None)
        o, memory = linear_recurrence(
            r.view_as(terms.r),
            terms.k,
            terms.v,
            terms.decay,
            scale=1.0,
            initial_state=before,
            **p.keywords("linear"),
        )
        if before is None:
            first = torch.zeros_like(memory[:, :, 0])
        else:
            first = torch.einsum("bhk,bhkv->bhv", first_r.view(-1, self.heads, self.size), before)
        return previous(o, first.to(o.dtype), p.cu_seqlens, reverse=p.reverse), memory

    def _one_token(self, terms: Terms, before: Tensor) -> tuple[Tensor, Tensor]:
        r, k, v, decay = (t.squeeze(1) for t in terms[:4])
        o = torch.einsum("bhk,bhkv->bhv", r.to(before.dtype), before)
        _, memory = linear_recurrence_step(r, k, v, decay, before, scale=1.0)
        return o.to(v.dtype).unsqueeze(1), memory

    def _terms(self, x: Tensor, p: Pass, shift: Tensor | None) -> Terms:
        shifted, after = self.shift(x, p, shift)
        difference = shifted - x
        low = torch.tanh(self.lerp_down(x + difference * self.first_lerp))
        low = low.view(*x.shape[:2], *self.lerp_up.shape[:2])
        lerp = torch.einsum("btir,ird->ibtd", low, self.lerp_up) + self.lerp[:, None, None]
        w, k, v, r, g = (x + difference * lerp).to(x.dtype).unbind(0)
        rate = self.decay_up(torch.tanh(self.decay_down(w)))
        r, k, v = (
            projection(t).unflatten(-1, (self.heads, self.size))
            for projection, t in ((self.query_proj, r), (self.key_proj, k), (self.value_proj, v))
        )
        decay = -upcast(rate).exp().view(r.shape)
        return Terms(r, k, v, decay, self.gate_proj(g), after)

    def _own_weight(self, terms: Terms) -> Tensor:
        """``r_t·Diag(u) k_t``: what a token gives to itself, ``(B, T, H, 1)``."""
        weight = (upcast(terms.r) * upcast(self.bonus) * upcast(terms.k)).sum(-1, keepdim=True)
        return weight.to(terms.v.dtype)

    def _output(self, o: Tensor, gate: Tensor) -> Tensor:
        channels = o.reshape(-1, self.dim).to(self.norm.weight.dtype)
        normed = self.norm(channels).view(gate.shape).to(gate.dtype)
        y: Tensor = self.out_proj(normed * F.silu(gate))
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
        """Give A, B, C, u, D with N = 2K: the state holds the memory before the token, and after it.

        That is exact for a decay of zero, where dividing r by w would not be.
        """
        r, k, v, decay, _, _ = terms = self._terms(x, Pass(), None)
        zero = torch.zeros_like(decay)
        identity = torch.ones_like(decay).diag_embed()
        above = torch.cat([zero.diag_embed(), identity], -1)
        below = torch.cat([zero.diag_embed(), decay.exp().diag_embed()], -1)
        B, C = torch.cat([torch.zeros_like(k), k], -1), torch.cat([r, torch.zeros_like(r)], -1)
        return System(torch.cat([above, below], -2), B, C, v, self._own_weight(terms).squeeze(-1))

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalise, gate and project; see `Mixer.read_out`."""
        return self._output(o, self._terms(x, Pass(), None).gate)
