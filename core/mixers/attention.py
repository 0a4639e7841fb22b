"""Softmax attention, the other side of every comparison: full or in a window, causal or not."""

import torch
from torch import Tensor, nn

from ...kernels import attention
from ..packed import cu_seqlens_of, lengths_of, unpack
from ..positions import check_rotary, positions_after, rotate, token_positions
from ..state import State
from .base import Mixer, Pass, pick


class AttentionMixer(Mixer):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762); ``(B, T, D)`` to ``(B, T, D)``.

    The state is the cache of keys and values: it grows by a token a step, up to ``window − 1`` of them where
    there is a window. After packed sequences the caches differ in length; they are then aligned at their end,
    and ``cached`` counts what is real.

    Args:
        dim: D.
        heads: H.
        backend: of the kernels.
        causal: whether a token sees earlier ones only.
        window: W; a token sees itself and W−1 before it (without ``causal`` also W−1 after it). ``None``:
            all.
        rotary: rotate queries and keys by their position (arXiv:2104.09864).
        rotary_base: the slowest rotation takes about this many tokens.
        kv_heads: heads of keys and values, shared by groups of query heads (arXiv:2305.13245). ``None``: H.
    """

    operation = "attention"
    recurrent = False

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        causal: bool = True,
        *,
        window: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10_000.0,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__(dim, heads, backend)
        self.causal, self.window, self.rotary, self.rotary_base = causal, window, rotary, rotary_base
        self.kv_heads = kv_heads or heads
        self.size = dim // heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1, or None for all tokens")
        if rotary:
            check_rotary(self.size)
        self.widths = [dim, self.kv_heads * self.size, self.kv_heads * self.size]
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Attend; see `Mixer.mix`."""
        if p.reverse:
            raise ValueError("reverse=True has no meaning for attention: causal=False sees both sides")
        if not self.causal and (p.keep_state or state is not None):
            raise ValueError("attention that is not causal has no state: every token sees the later ones")
        q, k, v = (t.unflatten(-1, (-1, self.size)) for t in self.in_proj(x).split(self.widths, -1))
        offset = pick(state, "position")
        if self.rotary:
            places = token_positions(x.shape[1], offset, p.cu_seqlens, x.device)
            q, k = rotate(q, places, self.rotary_base), rotate(k, places, self.rotary_base)
        if state is not None and (p.cu_seqlens is not None or "cached" in state):
            o, after = self._attend_ragged(q, k, v, p, state)
        else:
            cu_k = p.cu_seqlens
            if state is not None:
                k, v = torch.cat([state["key"], k], 1), torch.cat([state["value"], v], 1)
            o = self._attend(q, k, v, p, p.cu_seqlens, cu_k)
            after = self._cache(k, v, cu_k) if p.keep_state else {}
        if p.keep_state:
            after["position"] = positions_after(x, offset, p.cu_seqlens)
        return self.out_proj(o.flatten(-2)), after

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, p: Pass, cu_q: Tensor | None, cu_k: Tensor | None
    ) -> Tensor:
        return attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            cu_seqlens=cu_q,
            cu_seqlens_k=cu_k,
            backend=p.backends.get("attention", "auto"),
        )

    def _attend_ragged(self, q: Tensor, k: Tensor, v: Tensor, p: Pass, state: State) -> tuple[Tensor, State]:
        """Attend with caches or new tokens that differ in length, by packing them end to end."""
        sequences, slots = state["key"].shape[:2]
        if p.cu_seqlens is None:
            new = torch.full((sequences,), q.shape[1], device=q.device)
        else:
            new = lengths_of(p.cu_seqlens).long()
            k, v = unpack(k, p.cu_seqlens), unpack(v, p.cu_seqlens)
        cached = state.get("cached", torch.full_like(new, slots))
        old_real = torch.arange(slots, device=q.device) >= slots - cached[:, None]
        new_real = torch.arange(k.shape[1], device=q.device) < new[:, None]
        real = torch.cat([old_real, new_real], 1)
        k = torch.cat([state["key"], k], 1)[real].unsqueeze(0)
        v = torch.cat([state["value"], v], 1)[real].unsqueeze(0)
        cu_k = cu_seqlens_of(cached + new)
        o = self._attend(q.flatten(0, 1).unsqueeze(0), k, v, p, cu_seqlens_of(new), cu_k)
        return o.view(q.shape), self._cache(k, v, cu_k) if p.keep_state else {}

    def _cache(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> State:
        """Keep what later tokens may still see, aligned at the end."""
        if cu_seqlens is None:
            begin = 0 if self.window is None else max(0, k.shape[1] - (self.window - 1))
            return {"key": k[:, begin:], "value": v[:, begin:]}
        cached = lengths_of(cu_seqlens).long()
        slots = int(cached.max()) if cached.numel() else 0
        real = torch.arange(slots, device=k.device) >= slots - cached[:, None]
        if self.window is not None:
            cached = cached.clamp_max(self.window - 1)
        cache: State = {"cached": cached}
        for name, packed in (("key", k), ("value", v)):
            padded = packed.new_zeros(*real.shape, *packed.shape[2:])
            padded[real] = packed[0]
            cache[name] = padded if self.window is None else padded[:, max(0, slots - (self.window - 1)) :]
        return cache

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Give an empty cache; see `Mixer.init_state`."""
        device, dtype = self._device(device), dtype or self.out_proj.weight.dtype
        empty = torch.zeros(batch, 0, self.kv_heads, self.size, device=device, dtype=dtype)
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        return {"key": empty, "value": empty, "position": position}

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the cache of ``batch`` sequences after ``length`` tokens."""
        slots = length if self.window is None else min(length, self.window - 1)
        numbers = 2 * slots * self.kv_heads * self.size
        return batch * (numbers * self.out_proj.weight.element_size() + 8)
