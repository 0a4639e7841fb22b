"""Packed batches: sequences of different lengths laid end to end, without padding.

A packed tensor is ``(1, N, …)`` and ``cu_seqlens`` ``(S+1,)`` holds where each sequence begins: 0, then the
running sum of the lengths. Functions whose result has a fixed shape use no host synchronisation, so they
compile and export.

>>> x, cu = join([torch.ones(2, 3), torch.zeros(1, 3)])
>>> tuple(x.shape), cu.tolist(), positions(cu, 3).tolist()
((1, 3, 3), [0, 2, 3], [0, 1, 0])
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    """Running sum of ``lengths`` (S,) with a leading zero: int32 ``(S+1,)``."""
    cu_seqlens = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return cu_seqlens


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Lengths of the sequences: ``(S,)``."""
    return cu_seqlens.diff()


def sequence_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which sequence each of ``length`` packed tokens belongs to: int64 ``(N,)``."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)


def positions(cu_seqlens: Tensor, length: int, *, from_end: bool = False) -> Tensor:
    """Place of each of ``length`` packed tokens within its sequence, from 0: int64 ``(N,)``.

    With ``from_end`` the last token of each sequence has place 0.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    ids = sequence_ids(cu_seqlens, length)
    bounds = cu_seqlens.long()
    return bounds[ids + 1] - 1 - tokens if from_end else tokens - bounds[ids]


def check_lengths(lengths: Tensor, batch: int, length: int) -> None:
    """Raise ``ValueError`` unless ``lengths`` holds ``batch`` integers between 0 and ``length``."""
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {batch} integers, one a sequence, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > length):
        raise ValueError(f"lengths must lie between 0 and T={length}, got {lengths.tolist()}")


def pack(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding of ``x`` (B, T, …): ``((1, N, …), cu_seqlens)``.

    Raises:
        ValueError: ``lengths`` (B,) does not fit ``x``.
    """
    check_lengths(lengths, *x.shape[:2])
    keep = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
    return x[keep].unsqueeze(0), cu_seqlens_of(lengths.to(x.device))


def unpack(x: Tensor, cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Undo `pack`: ``(1, N, …)`` to ``(S, T, …)`` padded with zeros, T = ``length`` or the longest."""
    lengths = lengths_of(cu_seqlens)
    if length is None:
        length = int(lengths.max()) if lengths.numel() else 0
    keep = torch.arange(length, device=x.device) < lengths[:, None]
    out = x.new_zeros(lengths.shape[0], length, *x.shape[2:])
    out[keep] = x[0]
    return out


def split(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Cut ``x`` (1, N, …) into its sequences: a list of ``(T_i, …)``."""
    return list(torch.split(x[0], lengths_of(cu_seqlens).tolist()))


def join(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay sequences ``(T_i, …)`` end to end: ``((1, N, …), cu_seqlens)``."""
    lengths = torch.tensor([s.shape[0] for s in sequences], device=sequences[0].device)
    return torch.cat(list(sequences)).unsqueeze(0), cu_seqlens_of(lengths)


def sort_within(key: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Order that sorts tokens by ``key`` (N,) within each sequence (stable): ``(N,)`` for `permute`."""
    by_key = key.argsort(stable=True)
    return by_key[sequence_ids(cu_seqlens, key.shape[0])[by_key].argsort(stable=True)]


def flip_within(cu_seqlens: Tensor, length: int) -> Tensor:
    """Order that reverses each sequence: indices ``(N,)`` for `permute`; its own inverse."""
    ends = cu_seqlens.long()[sequence_ids(cu_seqlens, length) + 1]
    return ends - 1 - positions(cu_seqlens, length)


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of ``x`` (1, N, …): token i of the result is token ``order[i]`` of ``x``."""
    return x[:, order]


def inverse(order: Tensor) -> Tensor:
    """Order that undoes ``order``."""
    undo = torch.empty_like(order)
    undo[order] = torch.arange(order.shape[0], device=order.device)
    return undo


def previous(
    x: Tensor, initial: Tensor, cu_seqlens: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """Shift ``x`` (B, T, …) by one token within each sequence; ``initial`` (B|S, …) enters at its first
    token.

    With ``reverse`` the shift is the other way, and ``initial`` enters at the last token.
    """
    T = x.shape[1]
    if cu_seqlens is None:
        entering = initial.unsqueeze(1)
        return torch.cat([x[:, 1:], entering] if reverse else [entering, x[:, :-1]], 1)[:, :T]
    first = positions(cu_seqlens, T, from_end=reverse) == 0
    entering = initial[sequence_ids(cu_seqlens, T)].unsqueeze(0)
    return torch.where(first.view(1, T, *[1] * (x.ndim - 2)), entering, x.roll(-1 if reverse else 1, 1))
