"""The delta rule: memory that corrects what it holds before it writes.

``S_t = (I − β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``, ``o_t = S_tᵀ q_t``, with q and k of length one;
once or several times a token. A `DeltaRow` says how each part is made; `ROWS` holds the published choices,
and every field can be overridden by an option.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import delta_product, delta_product_step, delta_rule, delta_rule_step
from ..norms import GatedNorm, GateName, l2_normalise
from ..state import State
from ..system import System
from .base import Mixer, Pass, ShortConvolution, check_choices, head_size, pick, upcast
from .decay import DiscretisedDecay


@dataclass(frozen=True, kw_only=True)
class DeltaRow:
    """The choices that make a delta-rule mixer.

    Attributes:
        decay: how the state also forgets: not, at one rate a head, ``g_t = −e^A softplus(W x_t + b)``, or at
        one
            a key channel, where W is a product of two matrices of rank K.
        eigenvalue_range: of the state transition. ``(0, 1)`` keeps β in (0, 1); ``(-1, 1)`` lets it reach 2,
            which makes reflections, and state tracking, possible (Grazzi et al. 2024, arXiv:2411.12537).
        householder: R, how many times the rule acts a token, each with a key, a value and a β of its own.
        gate: of the output.
        low_rank_gate: whether the gate is a product of two matrices of rank V, with a bias.
        conv: width of the short convolution over queries, keys and values; 0 for none.
        expand_k, expand_v: widths of keys and values as a multiple of dim.
    """

    decay: Literal["none", "head", "channel"] = "none"
    eigenvalue_range: tuple[float, float] = (0, 1)
    householder: int = 1
    gate: GateName = "none"
    low_rank_gate: bool = False
    conv: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self)
        # A configuration file has lists, not tuples.
        object.__setattr__(self, "eigenvalue_range", tuple(self.eigenvalue_range))
        if self.eigenvalue_range not in ((0, 1), (-1, 1)):
            raise ValueError(f"eigenvalue_range={self.eigenvalue_range} must be (0, 1) or (-1, 1)")
        if self.householder < 1:
            raise ValueError(f"householder={self.householder} must be at least 1")
        if self.low_rank_gate and self.gate == "none":
            raise ValueError("low_rank_gate=True needs a gate: choose gate='swish' or gate='sigmoid'")


ROWS: dict[str, DeltaRow] = {
    # Yang et al. 2024, arXiv:2406.06484
    "deltanet": DeltaRow(),
    # Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464
    "gated_deltanet": DeltaRow(decay="head", gate="swish"),
    # Siems et al. 2025, arXiv:2502.10297; decay="head" with gate="swish" is its gated form
    "deltaproduct": DeltaRow(householder=2, eigenvalue_range=(-1, 1)),
    # Kimi Team 2025, arXiv:2510.26692: Kimi Delta Attention
    "kda": DeltaRow(decay="channel", gate="sigmoid", low_rank_gate=True),
}


class ChannelDecay(nn.Module):
    """``g_t = −e^A softplus(W_2 W_1 x_t + b)`` a key channel, A a head (Kimi Team 2025, arXiv:2510.26692).

    A and b start as `DiscretisedDecay`'s do.
    """

    def __init__(self, dim: int, heads: int, key: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, key, bias=False)
        self.up = nn.Linear(key, heads * key, bias=False)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads * key).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """Give g ``(B, T, H, K)``."""
        step = F.softplus(upcast(self.up(self.down(x))) + upcast(self.step_bias))
        rate = upcast(self.log_rate).exp()
        heads = rate.shape[0]
        return -step.view(*x.shape[:2], heads, step.shape[-1] // heads) * rate[:, None]


class Terms(NamedTuple):
    """What the recurrence and the read-out take; k, v and β have R factors a token, ``(B, T, R, H, ·)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None
    gate: Tensor | None
    state: State


class DeltaMixer(Mixer):
    """Delta rule with a matrix state; ``(B, T, D)`` to ``(B, T, D)``.

    Args:
        dim: D.
        heads: H.
        row: the choices.
        backend: of the kernels.
    """

    operation = "delta"

    def __init__(self, dim: int, heads: int, row: DeltaRow, backend: str = "auto") -> None:
        super().__init__(dim, heads, backend)
        self.row = row
        self.key = head_size(dim, heads, row.expand_k, "expand_k")
        self.value = head_size(dim, heads, row.expand_v, "expand_v")
        keys, values, R = heads * self.key, heads * self.value, row.householder
        self.widths = [keys, R * keys, R * values]
        self.convolved = sum(self.widths)
        wide_gate = row.gate != "none" and not row.low_rank_gate
        self.in_proj = nn.Linear(dim, self.convolved + values * wide_gate, bias=False)
        self.beta = nn.Linear(dim, R * heads, bias=False)
        self.decay: DiscretisedDecay | ChannelDecay | None = None
        if row.decay != "none":
            kind = DiscretisedDecay if row.decay == "head" else ChannelDecay
            self.decay = kind(dim, heads, self.key)
        self.gate: nn.Module | None = None
        if row.low_rank_gate:
            self.gate = nn.Sequential(nn.Linear(dim, self.value, bias=False), nn.Linear(self.value, values))
        self.conv = ShortConvolution(self.convolved, row.conv, bias=False) if row.conv else None
        self.norm = GatedNorm(heads, self.value, "rms", row.gate)
        self.out_proj = nn.Linear(values, dim, bias=False)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the recurrence; see `Mixer.mix`."""
        terms = self._terms(x, p, state)
        q, k, v, beta, decay = terms[:5]
        before = pick(state, "memory")
        if self.row.householder == 1:
            k, v, beta = k.squeeze(2), v.squeeze(2), beta.squeeze(2)
        if p.one_token and before is not None:
            step = delta_rule_step if self.row.householder == 1 else delta_product_step
            g = None if decay is None else decay[:, 0]
            o, memory = step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], g, before)
            o = o.unsqueeze(1)
        else:
            rule: Any = delta_rule if self.row.householder == 1 else delta_product
            o, memory = rule(q, k, v, beta, decay, initial_state=before, **p.keywords("delta"))
        return self._output(o, terms.gate), {**terms.state, "memory": memory}

    def _terms(self, x: Tensor, p: Pass, state: State | None) -> Terms:
        qkv, gate = self.in_proj(x).tensor_split((self.convolved,), -1)
        after: State = {}
        if self.conv is None:
            qkv = F.silu(qkv)
        else:
            qkv, after["conv"] = self.conv(qkv.contiguous(), p, pick(state, "conv"))
        q, k, v = qkv.split(self.widths, -1)
        q = q.unflatten(-1, (self.heads, self.key))
        k, v, beta = (t.unflatten(-1, (self.row.householder, self.heads, -1)) for t in (k, v, self.beta(x)))
        beta = upcast(beta[..., 0]).sigmoid() * (1 - self.row.eigenvalue_range[0])
        decay: Tensor | None = None
        if self.decay is not None:
            rates = self.decay
            decay = rates.step_and_decay(x)[1] if isinstance(rates, DiscretisedDecay) else rates(x)
        if self.gate is not None:
            gate = self.gate(x)
        opening = None if self.row.gate == "none" else gate
        return Terms(l2_normalise(q), l2_normalise(k), v, beta, decay, opening, after)

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        y: Tensor = self.out_proj(self.norm(o, gate))
        return y

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; see `Mixer.init_state`."""
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        state: State = {}
        if self.conv is not None:
            state["conv"] = self._zeros(batch, self.convolved, self.row.conv - 1, **where)
        state["memory"] = self._zeros(batch, self.heads, self.key, self.value, **where)
        return state

    def system(self, x: Tensor) -> System:
        """Give A, the product of the factors, B, C, u with a column a factor; see `Mixer.system`."""
        q, k, v, beta, decay = self._terms(x, Pass(), None)[:5]
        A = torch.eye(self.key, dtype=beta.dtype, device=x.device).expand(*q.shape, -1)
        if decay is not None:
            A = (decay if decay.ndim == 4 else decay[..., None]).exp()[..., None] * A
        columns: list[Tensor] = []
        for k_i, beta_i in zip(k.unbind(2), beta.unbind(2)):
            key, written = k_i[..., None], (beta_i[..., None] * k_i)[..., None]
            # What came before, the columns of earlier factors too, passes through this factor.
            A = A - written @ (key.mT @ A)
            columns = [column - written @ (key.mT @ column) for column in columns] + [written]
        B, u, C = torch.cat(columns, -1), v.transpose(2, 3), self.key**-0.5 * q
        return System(A, B, C, u) if self.row.householder > 1 else System(A, B[..., 0], C, u[..., 0, :])

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Gate and project; see `Mixer.read_out`."""
        return self._output(o, self._terms(x, Pass(), None).gate)
