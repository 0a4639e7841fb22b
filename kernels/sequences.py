"""Where each sequence of a batch begins and ends."""

from collections.abc import Callable, Hashable, MutableMapping
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Found = TypeVar("Found")

# By the tensor of bounds: its version, which counts the writes to it, and what was found since the last.
_REMEMBERED: MutableMapping[Tensor, tuple[int, dict[Hashable, Any]]] = WeakIdKeyDictionary()


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


def remembered(cu_seqlens: Tensor, key: Hashable, make: Callable[[], Found]) -> Found:
    """Call ``make`` once for these bounds: what follows from them is found once a batch, for every layer.

    Args:
        cu_seqlens: the bounds. What was found is forgotten with them, or when they are written to.
        key: what is to be found, and everything but the bounds that it depends on.
        make: finds it. It must not return ``cu_seqlens`` itself, which would then keep itself alive.
    """
    if cu_seqlens.is_inference():  # such a tensor counts no writes
        return make()
    version, found = _REMEMBERED.get(cu_seqlens, (-1, {}))
    if version != cu_seqlens._version:
        found = {}
        _REMEMBERED[cu_seqlens] = (cu_seqlens._version, found)
    if key not in found:
        found[key] = make()
    result: Found = found[key]
    return result
