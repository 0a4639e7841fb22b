"""Softmax attention by `scaled_dot_product_attention`, without padding and without a T × T mask.

Packed sequences of one length go through one call; under a window, or where causal queries stand at the end
of longer keys, blocks of queries meet only the keys that they can see.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..sequences import check_cu_seqlens

BLOCK = 256


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Return ``o (B, Tq, H, V)``."""
    if cu_seqlens is None or cu_seqlens_k is None:
        return _attend(q, k, v, causal, window, scale)
    bounds_q = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    bounds_k = check_cu_seqlens(cu_seqlens_k, k.shape[0], k.shape[1])
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (q0, q1, k0, k1) in enumerate(zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:])):
        groups.setdefault((q1 - q0, k1 - k0), []).append(i)
    queries, back = _order(bounds_q, groups, q.device)
    keys = queries if bounds_k == bounds_q else _order(bounds_k, groups, q.device)[0]
    q, k, v = _take(q, queries), _take(k, keys), _take(v, keys)
    outputs, begin_q, begin_k = [], 0, 0
    for (length_q, length_k), members in groups.items():
        end_q, end_k = begin_q + length_q * len(members), begin_k + length_k * len(members)
        x = q[0, begin_q:end_q].reshape(len(members), length_q, *q.shape[2:])
        y, z = (t[0, begin_k:end_k].reshape(len(members), length_k, *t.shape[2:]) for t in (k, v))
        outputs.append(_attend(x, y, z, causal, window, scale).flatten(0, 1))
        begin_q, begin_k = end_q, end_k
    if not outputs:
        return v.new_zeros(1, 0, q.shape[2], v.shape[3])
    return _take(torch.cat(outputs)[None], back)


def _order(
    bounds: list[int], groups: dict[tuple[int, int], list[int]], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Say how to lay sequences of one length side by side, and back; ``None`` where they already are."""
    members = [i for group in groups.values() for i in group]
    if members == sorted(members):
        return None, None
    cuts = torch.tensor(bounds)
    index, lengths = torch.tensor(members), cuts.diff()
    starts = cuts[:-1][index] - torch.cat((cuts[:1], lengths[index].cumsum(0)[:-1]))
    order = torch.arange(bounds[-1]) + starts.repeat_interleave(lengths[index])
    return order.to(device), order.argsort().to(device)


def _take(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """Attend within a batch of sequences of one length."""
    queries, keys = q.shape[1], k.shape[1]
    # The first queries stand this far before the first key.
    blind = max(0, queries - keys) if causal else 0
    if keys == 0 or blind >= queries:
        return (q[..., :1] * 0).to(v.dtype).expand(*q.shape[:3], v.shape[3])
    if blind:
        return pad(_attend(q[:, blind:], k, v, causal, window, scale), (0, 0, 0, 0, blind, 0))
    shift = keys - queries
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None and (not causal or shift == 0):
        return _sdpa(q, k, v, None, causal, scale).transpose(1, 2)
    reach = keys if window is None else window
    outputs = []
    size = BLOCK if window is None else min(max(window, 32), BLOCK)
    for begin in range(0, queries, size):
        end = min(begin + size, queries)
        low = max(0, begin + shift - reach + 1)
        high = min(keys, end + shift if causal else end + shift + reach - 1)
        if high <= low:
            outputs.append((q[:, :, begin:end, :1] * 0).expand(-1, -1, -1, v.shape[3]))
            continue
        mask = _visible(begin + shift, end + shift, low, high, causal, reach, q.device)
        outputs.append(_sdpa(q[:, :, begin:end], k[:, :, low:high], v[:, :, low:high], mask, False, scale))
    return torch.cat(outputs, 2).transpose(1, 2)


def _visible(
    begin: int, end: int, low: int, high: int, causal: bool, reach: int, device: torch.device
) -> Tensor:
    """Say which query at ``begin … end`` sees which key at ``low … high``."""
    i = torch.arange(begin, end, device=device)[:, None]
    j = torch.arange(low, high, device=device)
    distance = i - j
    return (distance < reach) & (distance >= 0 if causal else distance > -reach)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    # Some of PyTorch's kernels answer NaN to a row that is masked throughout.
    blind = None if mask is None else ~mask.any(-1, keepdim=True)
    if mask is not None and blind is not None:
        mask = mask | blind
    # Not `enable_gqa=…`: with dynamic sizes the comparison is a SymBool, which that argument refuses.
    if q.shape[1] == k.shape[1]:
        o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    else:
        o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
    return o if blind is None else o.masked_fill(blind, 0)
