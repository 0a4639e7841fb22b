"""How a linear recurrence forgets: the gates of ``S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``.

Each class maps the token ``x`` (B, T, D) and the key ``k`` (B, T, H, K) to a `Gates`: the log decay ``g`` ≤ 0
in float32 and the key that is written. Some need a state of their own.
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import logcumsumexp, max_plus_scan
from .. import packed
from ..state import State
from .base import Pass, pick, upcast


class Gates(NamedTuple):
    """Key to write, log decay, running maximum of the stabiliser, and the state after the last token."""

    key: Tensor
    decay: Tensor | None = None
    maximum: Tensor | None = None
    state: State | None = None


class NoDecay(nn.Module):
    """Forget nothing (Katharopoulos et al. 2020, arXiv:2006.16236)."""

    raw_key: ClassVar[bool] = False
    """Whether the gate takes the projection of the key as it is, before any feature map."""

    def __init__(self, dim: int, heads: int, key: int, layer: int = 0, depth: int = 1) -> None:
        super().__init__()
        self.dim, self.heads, self.key = dim, heads, key

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates of ``x`` (B, T, D) and ``k`` (B, T, H, K)."""
        return Gates(k)

    def unstabilised(self, x: Tensor, k: Tensor) -> Gates:
        """Give the gates as the paper writes them, for the linear system; there ``maximum`` is ``None``."""
        gates: Gates = self(x, k, Pass(), None)
        return gates

    def state_sizes(self) -> dict[str, tuple[int, float]]:
        """Width of each entry of the gate's own state, and its value before the first token."""
        return {}


class FixedDecay(NoDecay):
    """``γ_h = 1 − 2^{−5−h}``, one rate a head (RetNet, Sun et al. 2023, arXiv:2307.08621)."""

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates; the rates are computed here, since a buffer would be rounded with the model."""
        exact = upcast(x).dtype
        head = torch.arange(self.heads, device=x.device, dtype=exact)
        return Gates(k, torch.log1p(-torch.exp2(-5.0 - head)))


class DiscretisedDecay(NoDecay):
    """``Δ_t = softplus(W x_t + b)``, ``g_t = −Δ_t e^{A}`` a head (Mamba-2, Dao & Gu 2024, arXiv:2405.21060).

    ``A`` starts as log U(1, 16) and ``b`` so that Δ lies log-uniformly in [0.001, 0.1].
    """

    def __init__(self, dim: int, heads: int, key: int, layer: int = 0, depth: int = 1) -> None:
        super().__init__(dim, heads, key)
        self.step_size = nn.Linear(dim, heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def step_and_decay(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give Δ and g, both ``(B, T, H)``."""
        step = F.softplus(upcast(self.step_size(x)) + upcast(self.step_bias))
        return step, -step * upcast(self.log_rate).exp()

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates; the key is scaled by Δ."""
        step, decay = self.step_and_decay(x)
        return Gates((k * step[..., None]).to(k.dtype), decay)


class LowRankDecay(NoDecay):
    """``g_t = logsigmoid(W_2 W_1 x_t + b) / 16`` a key channel (GLA, Yang et al. 2023, arXiv:2312.06635)."""

    rank: ClassVar[int] = 16
    temperature: ClassVar[float] = 16.0

    def __init__(self, dim: int, heads: int, key: int, layer: int = 0, depth: int = 1) -> None:
        super().__init__(dim, heads, key)
        self.down = nn.Linear(dim, min(self.rank, dim), bias=False)
        self.up = nn.Linear(min(self.rank, dim), heads * key)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates."""
        logits = upcast(self.up(self.down(x))).view(k.shape)
        return Gates(k, F.logsigmoid(logits) / self.temperature)


class LowerBoundDecay(NoDecay):
    """``f_t = β + (1−β) σ(k_t)``, ``g = log f``, key ``1 − f`` (HGRN2, Qin et al. 2024, arXiv:2404.07904).

    β is zero in the first layer and starts at layer/depth above it, so that higher layers remember longer. It
    is learned a layer; the paper ties the layers by one cumulative softmax, which starts at the same values.
    """

    raw_key = True

    def __init__(self, dim: int, heads: int, key: int, layer: int = 0, depth: int = 1) -> None:
        super().__init__(dim, heads, key)
        bound = layer / depth
        self.bound = nn.Parameter(torch.full((heads, key), math.log(bound / (1 - bound)))) if layer else None

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates."""
        logits = upcast(k)
        decay, key = F.logsigmoid(logits), torch.sigmoid(-logits)
        if self.bound is not None:
            bound = upcast(self.bound)
            decay = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + decay)
            key = torch.sigmoid(-bound) * key
        return Gates(key.to(k.dtype), decay)


class ExponentialGates(NoDecay):
    """``f_t = σ(f̃_t)``, key ``e^{ĩ_t} k_t`` (mLSTM, Beck et al. 2024, arXiv:2405.04517).

    Both are kept in range by ``m_t = max(m_{t-1} + log f_t, ĩ_t)``: the decay becomes ``log f_t + m_{t-1} −
    m_t`` and the key ``e^{ĩ_t − m_t} k_t``. The mixer's output does not depend on m, so m carries no
    gradient. The forget bias starts between 3 and 6 over the heads, the input bias near zero.
    """

    def __init__(self, dim: int, heads: int, key: int, layer: int = 0, depth: int = 1) -> None:
        super().__init__(dim, heads, key)
        self.gates = nn.Linear(dim, 2 * heads)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[:heads].normal_(0, 0.1)
            self.gates.bias[heads:] = torch.linspace(3, 6, heads)

    def input_and_forget(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give ĩ and log f, both ``(B, T, H)``."""
        i, f = upcast(self.gates(x)).chunk(2, -1)
        return i, F.logsigmoid(f)

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates and m."""
        i, log_f = self.input_and_forget(x)
        before = pick(state, "maximum")
        maximum, after = max_plus_scan(log_f, i, initial_state=before, **p.keywords("scan"))
        if before is None:
            before = torch.full_like(after, -math.inf)
        entering = packed.previous(maximum, before, p.cu_seqlens, reverse=p.reverse)
        # Before the first token the state is zero, so that any finite decay is right and −∞ is needless.
        rescale = torch.where(entering.isinf(), 0.0, entering - maximum)
        key = (k * (i - maximum).exp()[..., None]).to(k.dtype)
        return Gates(key, log_f + rescale, maximum, {"maximum": after})

    def unstabilised(self, x: Tensor, k: Tensor) -> Gates:
        """Give ``log f`` and ``e^{ĩ} k``."""
        i, log_f = self.input_and_forget(x)
        return Gates(k * i.exp()[..., None], log_f)

    def state_sizes(self) -> dict[str, tuple[int, float]]:
        """One running maximum a head."""
        return {"maximum": (self.heads, -math.inf)}


class RunningSum(NoDecay):
    """``z_t = log Σ_{i≤t} e^{k_i}``, ``g_t = z_{t-1} − z_t``, key ``e^{k_t − z_t}``: a running softmax of the
    keys.

    LightNet (Qin et al. 2024, arXiv:2405.21022).
    """

    raw_key = True

    def forward(self, x: Tensor, k: Tensor, p: Pass, state: State | None) -> Gates:
        """Give the gates."""
        logits = upcast(k).flatten(-2)
        before = pick(state, "log_sum")
        total, after = logcumsumexp(logits, initial_state=before, **p.keywords("scan"))
        if before is None:
            before = torch.full_like(after, -math.inf)
        entering = packed.previous(total, before, p.cu_seqlens, reverse=p.reverse)
        # Before the first token the state is zero, so that any finite decay is right and −∞ is needless.
        first = entering.isinf()
        decay = torch.where(first, 0.0, entering.masked_fill(first, 0.0) - total)
        key = (logits - total).exp().view(k.shape).to(k.dtype)
        return Gates(key, decay.view(k.shape), None, {"log_sum": after})

    def state_sizes(self) -> dict[str, tuple[int, float]]:
        """One running sum a key channel."""
        return {"log_sum": (self.heads * self.key, -math.inf)}


DECAYS: dict[str, type[NoDecay]] = {
    "none": NoDecay,
    "fixed": FixedDecay,
    "discretised": DiscretisedDecay,
    "low_rank": LowRankDecay,
    "lower_bound": LowerBoundDecay,
    "exponential": ExponentialGates,
    "running_sum": RunningSum,
}
