"""Softmax attention by explicit masks, one sequence at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor

from ..checks import accumulator
from ..sequences import spans


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
    if cu_seqlens is None:
        return _attend(q, k, v, causal, window, scale)
    pairs = zip(spans(cu_seqlens, q.shape[0], q.shape[1]), spans(cu_seqlens_k, k.shape[0], k.shape[1]))
    outputs = [v.new_empty(1, 0, q.shape[2], v.shape[3])]
    for (_, q0, q1), (_, k0, k1) in pairs:
        outputs.append(_attend(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], causal, window, scale))
    return torch.cat(outputs, 1)


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Say which query sees which key, ``(Tq, Tk)``; the last query stands at the last key."""
    i = torch.arange(queries, device=device)[:, None] + keys - queries
    j = torch.arange(keys, device=device)
    mask = (j <= i) if causal else torch.ones_like(j <= i)
    if window is not None:
        mask = mask & ((i - j).abs() < window)
    return mask


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    dtype = accumulator(q.dtype)
    groups = q.shape[2] // k.shape[2]
    k, x = (y.to(dtype).repeat_interleave(groups, 2) for y in (k, v))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(dtype), k)
    mask = visible(q.shape[1], k.shape[1], causal, window, q.device)
    blind = ~mask.any(-1, keepdim=True)
    # A row without a key is softmaxed over all of them, to be finite, and then set to zero.
    weights = scores.masked_fill(~(mask | blind), -torch.inf).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, x).to(v.dtype)
