"""The delta rule: memory that corrects what it holds before it writes.

``S_t = (I − β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``, ``o_t = S_tᵀ q_t``, with q and k of length one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import delta_rule, delta_rule_step
from ..norms import GatedNorm, GateName, l2_normalise
from ..state import State
from ..system import System
from .base import Mixer, Pass, ShortConvolution, check_choices, head_size, pick, upcast
from .decay import DiscretisedDecay


@dataclass(frozen=True, kw_only=True)
class DeltaRow:
    """The choices that make a delta-rule mixer.

    Attributes:
        decay: whether the state also forgets, ``g_t = −e^A softplus(W x_t + b)`` a head.
        eigenvalue_range: of the state transition. ``(0, 1)`` keeps β in (0, 1); ``(-1, 1)`` lets it reach 2,
            which makes reflections, and state tracking, possible (Grazzi et al. 2024, arXiv:2411.12537).
        gate: of the output.
        conv: width of the short convolution over queries, keys and values; 0 for none.
        expand_k, expand_v: widths of keys and values as a multiple of dim.
    """

    decay: bool
    eigenvalue_range: tuple[float, float] = (0, 1)
    gate: GateName = "none"
    conv: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self)
        # A configuration file has lists, not tuples.
        object.__setattr__(self, "eigenvalue_range", tuple(self.eigenvalue_range))
        if self.eigenvalue_range not in ((0, 1), (-1, 1)):
            raise ValueError(f"eigenvalue_range={self.eigenvalue_range} must be (0, 1) or (-1, 1)")


ROWS: dict[str, DeltaRow] = {
    # Yang et al. 2024, arXiv:2406.06484
    "deltanet": DeltaRow(decay=False),
    # Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464
    "gated_deltanet": DeltaRow(decay=True, gate="swish"),
}


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
        keys, values = heads * self.key, heads * self.value
        self.convolved = 2 * keys + values
        self.widths = [keys, keys, values] + ([values] if row.gate != "none" else [])
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.decay = DiscretisedDecay(dim, heads, self.key) if row.decay else None
        self.conv = ShortConvolution(self.convolved, row.conv, bias=False) if row.conv else None
        self.norm = GatedNorm(heads, self.value, "rms", row.gate)
        self.out_proj = nn.Linear(values, dim, bias=False)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the recurrence; see `Mixer.mix`."""
        q, k, v, beta, decay, gate, after = self._terms(x, p, state)
        before = pick(state, "memory")
        if p.one_token and before is not None:
            g = None if decay is None else decay[:, 0]
            o, memory = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], g, before)
            o = o.unsqueeze(1)
        else:
            o, memory = delta_rule(q, k, v, beta, decay, initial_state=before, **p.keywords("delta"))
        return self._output(o, gate), {**after, "memory": memory}

    def _terms(
        self, x: Tensor, p: Pass, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, State]:
        qkv, *gate = self.in_proj(x).split([self.convolved, *self.widths[3:]], -1)
        after: State = {}
        if self.conv is None:
            qkv = F.silu(qkv)
        else:
            qkv, after["conv"] = self.conv(qkv.contiguous(), p, pick(state, "conv"))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in qkv.split(self.widths[:3], -1))
        beta = upcast(self.beta(x)).sigmoid() * (1 - self.row.eigenvalue_range[0])
        decay = None if self.decay is None else self.decay.step_and_decay(x)[1]
        return l2_normalise(q), l2_normalise(k), v, beta, decay, gate[0] if gate else None, after

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
        """Give A, B, C, u; see `Mixer.system`."""
        q, k, v, beta, decay, _, _ = self._terms(x, Pass(), None)
        identity = torch.eye(self.key, dtype=beta.dtype, device=x.device)
        A = identity - beta[..., None, None] * k[..., :, None] * k[..., None, :]
        if decay is not None:
            A = A * decay.exp()[..., None, None]
        return System(A, beta[..., None] * k, self.key**-0.5 * q, v)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Gate and project; see `Mixer.read_out`."""
        return self._output(o, self._terms(x, Pass(), None)[5])
