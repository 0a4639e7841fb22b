"""Linear attention and its kin: one class whose rows are papers.

``S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``, ``o_t = S_tᵀ q_t``, then a normaliser, a norm and an output gate.
A `LinearRow` says how each part is made; `ROWS` holds the published choices, and every field can be
overridden by an option.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_recurrence, linear_recurrence_step
from ..norms import GatedNorm, GateName, NormName
from ..positions import check_rotary, positions_after, rotate, token_positions
from ..state import State
from ..system import System
from .base import Mixer, Pass, ShortConvolution, check_choices, head_size, pick, upcast
from .decay import DECAYS


@dataclass(frozen=True, kw_only=True)
class LinearRow:
    """The choices that make a linear mixer.

    Attributes:
        decay: how the state forgets, and what that does to the key; see `mixers.decay`.
        feature_map: of queries and keys; ``elu`` is ``elu(x) + 1``.
        normaliser: ``sum`` divides by ``q·Σk``, ``max`` by ``max(|q·Σk|, 1)``.
        norm, gate, gate_first: the output's norm and gate; see `GatedNorm`.
        conv: width of the short convolution, 0 for none; ``conv_value=False`` leaves the values out of it.
        conv_bias: whether the convolution has a bias.
        rotary: rotate queries and keys by their position.
        skip: add ``D_h v_t`` to the output.
        shared_key: all heads share their queries and keys.
        scaled: multiply the output by ``K^-1/2``.
        expand_k, expand_v: widths of keys and values as a multiple of dim.
        state_size: K, the key channels of a head, in place of ``expand_k``.
    """

    decay: Literal["none", "fixed", "discretised", "low_rank", "lower_bound", "exponential", "running_sum"]
    feature_map: Literal["identity", "elu", "silu"] = "identity"
    normaliser: Literal["none", "sum", "max"] = "none"
    norm: NormName = "rms"
    gate: GateName = "none"
    gate_first: bool = False
    conv: int = 0
    conv_value: bool = True
    conv_bias: bool = False
    rotary: bool = False
    skip: bool = False
    shared_key: bool = False
    scaled: bool = True
    expand_k: float = 1.0
    expand_v: float = 1.0
    state_size: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.skip and self.normaliser != "none":
            raise ValueError(f"skip=True and normaliser={self.normaliser!r} exclude each other")
        if self.rotary and self.decay in ("low_rank", "lower_bound", "running_sum"):
            # Rotation mixes channels: only where they share a decay do products depend on distance alone.
            raise ValueError(f"rotary=True needs one decay a head, not decay={self.decay!r}")


ROWS: dict[str, LinearRow] = {
    # Katharopoulos et al. 2020, arXiv:2006.16236
    "linear_attention": LinearRow(
        decay="none", feature_map="elu", normaliser="sum", norm="none", scaled=False
    ),
    # Sun et al. 2023, arXiv:2307.08621
    "retnet": LinearRow(decay="fixed", gate="swish", rotary=True, expand_v=2.0),
    # Yang et al. 2023, arXiv:2312.06635
    "gla": LinearRow(decay="low_rank", gate="swish", expand_k=0.5),
    # Qin et al. 2024, arXiv:2404.07904
    "hgrn2": LinearRow(decay="lower_bound", feature_map="silu", norm="rms_all"),
    # Dao & Gu 2024, arXiv:2405.21060
    "mamba2": LinearRow(
        decay="discretised",
        norm="rms_all",
        gate="swish",
        gate_first=True,
        conv=4,
        conv_bias=True,
        skip=True,
        shared_key=True,
        scaled=False,
        expand_v=2.0,
        state_size=64,
    ),
    # Beck et al. 2024, arXiv:2405.04517; its up-projection is left to the block's channel mixer
    "mlstm": LinearRow(
        decay="exponential",
        normaliser="max",
        norm="layer",
        gate="sigmoid",
        conv=4,
        conv_value=False,
        conv_bias=True,
    ),
    # Qin et al. 2024, arXiv:2405.21022
    "lightnet": LinearRow(decay="running_sum", feature_map="silu", norm="rms_all", gate="swish"),
}

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "silu": F.silu,
}
EPS = 1e-6


class Terms(NamedTuple):
    """What the recurrence and the read-out take: ``(B, T, H, K|V)`` each, and the state to carry on."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    gate: Tensor | None
    maximum: Tensor | None
    state: State


class LinearMixer(Mixer):
    """Linear recurrence with a matrix state; ``(B, T, D)`` to ``(B, T, D)``.

    Args:
        dim: D.
        heads: H.
        row: the choices.
        backend: of the kernels.
        layer, depth: place in the stack, for gates that differ from layer to layer.
    """

    operation = "linear"

    def __init__(
        self, dim: int, heads: int, row: LinearRow, backend: str = "auto", layer: int = 0, depth: int = 1
    ) -> None:
        super().__init__(dim, heads, backend)
        self.row = row
        self.key = row.state_size or head_size(dim, heads, row.expand_k, "expand_k")
        self.value = head_size(dim, heads, row.expand_v, "expand_v")
        self.key_heads = 1 if row.shared_key else heads
        if row.rotary:
            check_rotary(self.key)
        keys, values = self.key_heads * self.key, heads * self.value
        self.widths = [keys, keys, values] + ([values] if row.gate != "none" else [])
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.decay = DECAYS[row.decay](dim, heads, self.key, layer, depth)
        self.convolved = 2 * keys + (values if row.conv_value else 0)
        self.conv = ShortConvolution(self.convolved, row.conv, row.conv_bias) if row.conv else None
        self.skip = nn.Parameter(torch.ones(heads)) if row.skip else None
        self.norm = GatedNorm(heads, self.value, row.norm, row.gate, row.gate_first)
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.scale = self.key**-0.5 if row.scaled else 1.0

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the recurrence; see `Mixer.mix`."""
        terms = self._terms(x, p, state)
        before = pick(state, "memory")
        if p.one_token and before is not None:
            q, k, v = (t.squeeze(1) for t in terms[:3])
            g = terms.decay if terms.decay is None or terms.decay.ndim == 1 else terms.decay.squeeze(1)
            o, memory = linear_recurrence_step(q, k, v, g, before, scale=self.scale)
            o = o.unsqueeze(1)
        else:
            o, memory = linear_recurrence(
                *terms[:4], scale=self.scale, initial_state=before, **p.keywords("linear")
            )
        if self.skip is not None:
            o = o + (self.skip[:, None] * terms.v).to(o.dtype)
        return self._output(o, terms), {**terms.state, "memory": memory}

    def _terms(self, x: Tensor, p: Pass, state: State | None, stabilised: bool = True) -> Terms:
        projected, after = self.in_proj(x), {}
        if self.conv is not None:
            head, tail = projected[..., : self.convolved], projected[..., self.convolved :]
            head, after["conv"] = self.conv(head.contiguous(), p, pick(state, "conv"))
            projected = torch.cat([head, tail], -1)
        q, k, v, *gate = projected.split(self.widths, -1)
        q, k = (t.unflatten(-1, (self.key_heads, self.key)).expand(-1, -1, self.heads, -1) for t in (q, k))
        v = v.unflatten(-1, (self.heads, self.value))
        feature_map = FEATURE_MAPS[self.row.feature_map]
        q, k = feature_map(q), k if self.decay.raw_key else feature_map(k)
        if self.row.rotary:
            offset = pick(state, "position")
            places = token_positions(x.shape[1], offset, p.cu_seqlens, x.device)
            places = -places if p.reverse else places  # so that reverse is the mirror image
            q, k = rotate(q, places), rotate(k, places)
            after["position"] = positions_after(x, offset, p.cu_seqlens)
        gates = self.decay(x, k, p, state) if stabilised else self.decay.unstabilised(x, k)
        if self.row.normaliser != "none":
            v = F.pad(v, (0, 1), value=1.0)
        after |= gates.state or {}
        return Terms(q, gates.key, v, gates.decay, gate[0] if gate else None, gates.maximum, after)

    def _output(self, o: Tensor, terms: Terms) -> Tensor:
        if self.row.normaliser != "none":
            o, total = upcast(o[..., :-1]), upcast(o[..., -1:])
            if self.row.normaliser == "max":
                floor = 1.0 if terms.maximum is None else (-terms.maximum).exp()[..., None]
                total = torch.maximum(total.abs(), torch.as_tensor(floor, dtype=total.dtype, device=o.device))
            else:
                total = total + EPS
            o = o / total
        y: Tensor = self.out_proj(self.norm(o.to(terms.v.dtype), terms.gate))
        return y

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, and what the decay keeps; see `Mixer.init_state`."""
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        state: State = {}
        if self.conv is not None:
            state["conv"] = self._zeros(batch, self.convolved, self.row.conv - 1, **where)
        if self.row.rotary:
            state["position"] = torch.zeros(batch, dtype=torch.int64, device=self._device(device))
        for name, (width, fill) in self.decay.state_sizes().items():
            state[name] = self._zeros(batch, width, **where, fill=fill)
        value = self.value + (self.row.normaliser != "none")
        state["memory"] = self._zeros(batch, self.heads, self.key, value, **where)
        return state

    def system(self, x: Tensor) -> System:
        """Give A (diagonal), B, C, u, D; see `Mixer.system`. A normaliser adds a channel of ones to u."""
        terms = self._terms(x, Pass(), None, stabilised=False)
        q, k, v, decay = terms[:4]
        if decay is None:
            decay = torch.zeros_like(k)
        A = (decay if decay.ndim == 4 else decay[..., None]).exp().expand(k.shape)
        D = None if self.skip is None else self.skip.expand(v.shape[:-1])
        return System(A, k, self.scale * q, v, D)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalise, gate and project; see `Mixer.read_out`."""
        return self._output(o, self._terms(x, Pass(), None, stabilised=False))
