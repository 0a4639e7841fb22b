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
    counts = [len(members) for members in groups.values()]
    sizes_q = [length * n for (length, _), n in zip(groups, counts)]
    sizes_k = [length * n for (_, length), n in zip(groups, counts)]
    # One split and no slices: the gradient of a slice is as large as all of q.
    split = torch.split_with_sizes
    pieces = zip(split(q[0], sizes_q), split(k[0], sizes_k), split(v[0], sizes_k), groups, counts)
    outputs = [v.new_zeros(0, q.shape[2], v.shape[3])]
    for x, y, z, (length_q, length_k), n in pieces:
        x = x.reshape(n, length_q, *q.shape[2:])
        y, z = y.reshape(n, length_k, *k.shape[2:]), z.reshape(n, length_k, *v.shape[2:])
        outputs.append(_attend(x, y, z, causal, window, scale).flatten(0, 1))
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
        return pad(q[..., :0], (0, v.shape[3]))
    if blind:
        return pad(_attend(q[:, blind:], k, v, causal, window, scale), (0, 0, 0, 0, blind, 0))
    if window is None and (not causal or queries == keys):
        return _sdpa(q, k, v, None, causal, scale)
    reach = keys if window is None else min(window, keys + queries)
    size = min(max(reach, 32), BLOCK)
    span = size + reach - 1 + (0 if causal else reach - 1)
    if span < keys and span <= 8 * size:
        return _gathered(q, k, v, size, span, causal, reach, scale)
    return _sliced(q, k, v, causal, reach, scale)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, size: int, span: int, causal: bool, reach: int, scale: float
) -> Tensor:
    """Lay every block of ``size`` queries beside the ``span`` keys around it, and attend in one call."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    blocks = -(-queries // size)
    starts = torch.arange(blocks, device=q.device)[:, None] * size + keys - queries
    i = starts + torch.arange(size, device=q.device)
    j = starts - reach + 1 + torch.arange(span, device=q.device)
    mask = _visible(i, j, causal, reach) & ((j >= 0) & (j < keys))[:, None]
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    index = j.clamp(0, keys - 1).flatten()
    q = pad(q, (0, 0, 0, 0, 0, blocks * size - queries)).reshape(batch * blocks, size, *q.shape[2:])
    k, v = (x.index_select(1, index).reshape(batch * blocks, span, *x.shape[2:]) for x in (k, v))
    return _sdpa(q, k, v, mask, False, scale).reshape(batch, blocks * size, *q.shape[2:3], -1)[:, :queries]


def _sliced(q: Tensor, k: Tensor, v: Tensor, causal: bool, reach: int, scale: float) -> Tensor:
    """Attend one block of queries after the other, each to the slice of the keys that it can see."""
    queries, keys = q.shape[1], k.shape[1]
    outputs, begin = [], keys - queries
    sizes = [min(BLOCK, queries - start) for start in range(0, queries, BLOCK)]
    for block, size in zip(torch.split_with_sizes(q, sizes, 1), sizes):
        end = begin + size
        low, high = max(0, begin - reach + 1), min(keys, end if causal else end + reach - 1)
        if high > low:
            i, j = torch.arange(begin, end, device=q.device), torch.arange(low, high, device=q.device)
            mask = _visible(i, j, causal, reach)
            outputs.append(_sdpa(block, k[:, low:high], v[:, low:high], mask, False, scale))
        else:
            outputs.append(pad(block[..., :0], (0, v.shape[3])))
        begin = end
    return torch.cat(outputs, 1)


def _visible(i: Tensor, j: Tensor, causal: bool, reach: int) -> Tensor:
    """Say which query at ``i (…, Tq)`` sees which key at ``j (…, Tk)``."""
    distance = i[..., :, None] - j[..., None, :]
    return (distance < reach) & (distance >= 0 if causal else distance > -reach)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Call PyTorch's attention on ``(B, T, H, D)``; a query that the mask leaves without keys gets 0."""
    blind = None if mask is None else ~mask.any(-1, keepdim=True)
    if mask is not None and blind is not None:
        # Some of PyTorch's kernels answer NaN to a row that is masked throughout.
        mask = mask | blind
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Not `enable_gqa=…`: with dynamic sizes the comparison is a SymBool, which that argument refuses.
    if q.shape[1] == k.shape[1]:
        o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    else:
        o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
    return (o if blind is None else o.masked_fill(blind, 0)).transpose(1, 2)
