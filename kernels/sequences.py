"""Where each sequence of a batch begins and ends."""

from itertools import pairwise

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """Return ``cu_seqlens`` as a list after checking it against a packed tensor ``(1, T, …)``.

    Args:
        cu_seqlens: ``(S+1,)`` integers: 0, then the running sum of the sequence lengths.
        batch: first dimension of the packed tensor.
        length: T, the second dimension of the packed tensor.

    Raises:
        ValueError: it is not a vector of integers, does not rise from 0 to T, or the batch is not 1.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be an int32 vector (S+1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1 (sequences lie end to end), got {batch}")
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) < 12 else [*bounds[:5], "…", bounds[-1]]
        raise ValueError(f"cu_seqlens must rise from 0 to T={length}, got {shown}")
    return bounds


def spans(cu_seqlens: Tensor | None, batch: int, length: int) -> list[tuple[int, int, int]]:
    """List every sequence as ``(row, begin, end)``: one a row, or what ``cu_seqlens`` cuts from row 0."""
    if cu_seqlens is None:
        return [(row, 0, length) for row in range(batch)]
    bounds = check_cu_seqlens(cu_seqlens, batch, length)
    return [(0, begin, end) for begin, end in pairwise(bounds)]


def num_sequences(cu_seqlens: Tensor | None, batch: int) -> int:
    """Count the sequences, which is the first dimension of every state."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
