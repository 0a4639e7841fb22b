"""TTT-Linear (Sun et al. 2024, arXiv:2407.04620): the state is a linear model that is trained as it reads."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ttt_linear, ttt_linear_step
from .. import packed
from ..norms import EPS
from ..positions import check_rotary, rotate
from ..state import State
from .base import Mixer, Pass, ShortConvolution, pick, upcast


class TTTMixer(Mixer):
    """Test-time training of a linear model; ``(B, T, D)`` to ``(B, T, D)``.

    In mini-batches of tokens the inner model ``f(x) = x + LN(W x + b)`` takes a gradient step towards
    ``f(k_t) = v_t`` and answers with ``f(q_t)``; see `ttt_linear`. Its learning rate is
    ``base_rate · σ(w·x_t + c) / K`` a head, times ``1/j`` (plus a learned correction) at place j of a
    mini-batch, so that a token sees the mean of the gradients up to its own. W and b start from learned
    values. Queries and keys are rotated by their place in the mini-batch. A LayerNorm over all heads follows.

    The paper's stack with a Mamba block has a short convolution over q and k and a gate; its Transformer
    block, the default here, has neither.

    Args:
        dim: D.
        heads: H.
        backend: of the kernels.
        mini_batch: tokens of a mini-batch.
        base_rate: largest inner learning rate.
        rotary: rotate queries and keys.
        conv: width of a short convolution over q and k, 0 for none.
        gate: ``gelu`` multiplies the normalised output by ``gelu(z)``.
    """

    operation = "ttt"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        mini_batch: int = 16,
        base_rate: float = 1.0,
        rotary: bool = True,
        conv: int = 0,
        gate: Literal["none", "gelu"] = "none",
    ) -> None:
        super().__init__(dim, heads, backend)
        if mini_batch < 1:
            raise ValueError(f"mini_batch={mini_batch} must be at least 1 token")
        if gate not in ("none", "gelu"):
            raise ValueError(f"backbone.options: gate = {gate!r}: choose one of none, gelu")
        self.size = K = dim // heads
        if rotary:
            check_rotary(K)
        self.mini_batch, self.base_rate, self.rotary = mini_batch, base_rate, rotary
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.rate = nn.Linear(dim, heads)
        self.conv = ShortConvolution(2 * dim, conv, bias=True) if conv else None
        self.gate_proj = nn.Linear(dim, dim, bias=False) if gate == "gelu" else None
        self.place = nn.Parameter(torch.zeros(mini_batch))  # added to 1/j
        self.weight = nn.Parameter(torch.randn(heads, K, K) * 0.02)  # Wᵀ, input by output
        self.bias = nn.Parameter(torch.zeros(heads, K))
        self.inner_gain = nn.Parameter(torch.ones(heads, K))
        self.inner_offset = nn.Parameter(torch.zeros(heads, K))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.rate.bias)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Train and ask the inner model; see `Mixer.mix`."""
        after: State = {}
        memory = pick(state, "memory")
        if memory is None:
            sequences = x.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
            memory = self._start(sequences, upcast(x).dtype)
        qk, v = self.in_proj(x).split([2 * self.dim, self.dim], -1)
        if self.conv is not None:
            qk, after["conv"] = self.conv(qk.contiguous(), p, pick(state, "conv"))
        q, k, v = (t.unflatten(-1, (self.heads, self.size)) for t in (*qk.chunk(2, -1), v))
        if self.rotary:
            place = self._place(x.shape[1], memory, p)
            q, k = rotate(q, place), rotate(k, place)
        rate = upcast(self.rate(x)).sigmoid() * (self.base_rate / self.size)
        inner = (self._schedule(), self.inner_gain, self.inner_offset)
        if p.one_token:
            q, k, v, rate = (t.squeeze(1) for t in (q, k, v, rate))
            o, memory = ttt_linear_step(q, k, v, rate, *inner, memory)
            o = o.unsqueeze(1)
        else:
            o, memory = ttt_linear(q, k, v, rate, *inner, initial_state=memory, **p.keywords("ttt"))
        y = self.norm(o.flatten(-2).to(self.norm.weight.dtype)).to(x.dtype)
        if self.gate_proj is not None:
            y = y * F.gelu(self.gate_proj(x), approximate="tanh")
        return self.out_proj(y), {**after, "memory": memory}

    def _schedule(self) -> Tensor:
        place = upcast(self.place)
        steps = torch.arange(1, self.mini_batch + 1, device=place.device, dtype=place.dtype)
        return (1 / steps + place).clamp_min(0.0)

    def _place(self, length: int, memory: Tensor, p: Pass) -> Tensor:
        """Place of each token in its mini-batch, from 0: ``(B, T)``, or ``(1, T)`` packed."""
        before = memory[:, 0, -1, 0].detach().round().long()
        if p.cu_seqlens is None:
            walk = torch.arange(length, device=memory.device)
            place = before[:, None] + (walk.flip(0) if p.reverse else walk)
        else:
            walk = packed.positions(p.cu_seqlens, length, from_end=p.reverse)
            place = (walk + before[packed.sequence_ids(p.cu_seqlens, length)])[None]
        return place % self.mini_batch

    def _start(self, sequences: int, dtype: torch.dtype) -> Tensor:
        """W and b as they were learned, and an empty mini-batch."""
        model = torch.cat([self.weight, self.bias[:, None]], 1).to(dtype)
        state = F.pad(model, (0, 0, 0, self.size + 2))
        return state.expand(sequences, *state.shape)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """W and b as they were learned; see `Mixer.init_state`."""
        zeros = self._zeros(batch, self.heads, 2 * self.size + 3, self.size, device=device, dtype=dtype)
        state: State = {"memory": zeros + self._start(batch, zeros.dtype).to(zeros.device)}
        if self.conv is not None:
            width = self.conv.weight.shape[1] - 1
            state["conv"] = self._zeros(batch, 2 * self.dim, width, device=device, dtype=dtype)
        return state
