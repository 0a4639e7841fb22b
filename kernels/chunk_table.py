"""Where every chunk of every sequence lies, as tables on the device that a Triton program reads."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import remembered, spans


class ChunkTable(NamedTuple):
    """Sequences and their chunks, in the order of the walk.

    Position p of a sequence is the flat token ``start + p`` of the ``(B·T, …)`` view, or ``start − p``
    in reverse.

    Attributes:
        sequences: int32 ``(S, 4)``: start, number of tokens, index of the first chunk, number of chunks.
        chunks: int32 ``(N, 4)``: sequence, position of the first token, and the start and number of
            tokens of the sequence once more. Chunks of one sequence lie side by side.
    """

    sequences: Tensor
    chunks: Tensor


def chunk_table(
    cu_seqlens: Tensor | None, batch: int, length: int, chunk: int, reverse: bool, device: torch.device
) -> ChunkTable:
    """Cut the sequences of a batch into chunks of ``chunk`` tokens.

    Args:
        cu_seqlens: bounds ``(S+1,)`` of packed sequences, or ``None`` for one sequence a row.
        batch: B.
        length: T.
        chunk: tokens a chunk.
        reverse: whether the walk begins at the last token.
        device: of the tables.

    Raises:
        ValueError: ``cu_seqlens`` does not rise from 0 to T, or the batch is not 1.
    """
    if cu_seqlens is None:
        return _of_rows(batch, length, chunk, reverse, device)
    return remembered(
        cu_seqlens,
        ("chunks", batch, length, chunk, reverse, device),
        lambda: _build(spans(cu_seqlens, batch, length), length, chunk, reverse, device),
    )


@lru_cache(maxsize=64)
def _of_rows(batch: int, length: int, chunk: int, reverse: bool, device: torch.device) -> ChunkTable:
    return _build(spans(None, batch, length), length, chunk, reverse, device)


def _build(
    found: list[tuple[int, int, int]], length: int, chunk: int, reverse: bool, device: torch.device
) -> ChunkTable:
    rows = torch.tensor(found, dtype=torch.int64).reshape(-1, 3)
    row, begin, end = rows.unbind(1)
    n = end - begin
    start = row * length + (end - 1 if reverse else begin)
    count = (n + chunk - 1) // chunk
    first = count.cumsum(0) - count
    sequence = torch.arange(len(found)).repeat_interleave(count)
    position = (torch.arange(len(sequence)) - first[sequence]) * chunk
    sequences = torch.stack([start, n, first, count], 1)
    chunks = torch.stack([sequence, position, start[sequence], n[sequence]], 1)
    return ChunkTable(sequences.int().to(device), chunks.int().to(device))
