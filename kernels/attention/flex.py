"""Packed attention on a GPU by `torch.nn.attention.flex_attention`, compiled: all sequences in one launch.

Softmax attention has well-kept kernels in PyTorch, and this project writes none of its own. Which blocks of
queries meet which blocks of keys follows from ``cu_seqlens`` alone: it is found once a batch and used by
every layer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..sequences import check_cu_seqlens, remembered

SIZES = range(16, 257)
"""Head sizes that its kernels have."""


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these go through `forward`: eager tensors on a CUDA device, of no more than 32 bits."""
    return (
        q.is_cuda
        and q.dtype != torch.float64
        and q.shape[-1] in SIZES
        and v.shape[-1] in SIZES
        and min(q.shape[1], k.shape[1]) > 0
        and not torch.compiler.is_compiling()
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    *,
    compiled: bool = True,
) -> Tensor:
    """Return ``o (1, Tq, H, V)``; ``compiled=False`` computes all scores, for a test."""
    mask = _block_mask(cu_seqlens, cu_seqlens_k, q.shape[1], k.shape[1], causal, window)
    attend: Any = flex_attention
    run = _compiled() if compiled else attend
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o: Tensor = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _block_mask(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, causal: bool, window: int | None
) -> BlockMask:
    def build() -> tuple[BlockMask, Tensor | None]:
        mask = _build(cu_seqlens, cu_seqlens_k, queries, keys, causal, window)
        # The bounds of the keys stay alive with the mask, so that their id is theirs.
        return mask, None if cu_seqlens_k is cu_seqlens else cu_seqlens_k

    if cu_seqlens_k.is_inference():  # such a tensor counts no writes
        return build()[0]
    of_keys = (id(cu_seqlens_k), cu_seqlens_k._version)
    return remembered(cu_seqlens, ("mask", of_keys, queries, keys, causal, window), build)[0]


def _build(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, causal: bool, window: int | None
) -> BlockMask:
    check_cu_seqlens(cu_seqlens, 1, queries)
    check_cu_seqlens(cu_seqlens_k, 1, keys)
    bounds, bounds_k = cu_seqlens.long(), cu_seqlens_k.long()
    sequence = _sequence(bounds, queries)
    sequence_k = _sequence(bounds_k, keys)
    # Places counted from the end of the sequence, where the last query stands at the last key.
    place = torch.arange(queries, device=bounds.device) - bounds[sequence + 1]
    place_k = torch.arange(keys, device=bounds.device) - bounds_k[sequence_k + 1]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = sequence[i] == sequence_k[j]
        distance = place[i] - place_k[j]
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window) & (distance > -window)
        return seen

    return create_block_mask(visible, None, None, queries, keys, device=bounds.device)


def _sequence(bounds: Tensor, length: int) -> Tensor:
    return torch.searchsorted(bounds[1:], torch.arange(length, device=bounds.device), right=True)
