from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem.kernels import chunk_table as tables
from mainstem.kernels import sequences
from mainstem.kernels.chunk_table import ChunkTable, chunk_table
from mainstem.kernels.sequences import spans

CPU = torch.device("cpu")


def walks(table: ChunkTable, chunk: int, step: int) -> list[list[int]]:
    """The flat tokens of every sequence, in the order in which its chunks visit them."""
    found: list[list[int]] = [[] for _ in range(len(table.sequences))]
    for sequence, position, start, n in table.chunks.tolist():
        found[sequence] += [start + p * step for p in range(position, min(position + chunk, n))]
    return found


def expected(bounds: list[int], reverse: bool) -> list[list[int]]:
    return [list(range(a, b))[:: -1 if reverse else 1] for a, b in pairwise(bounds)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), max_size=6), chunk=st.sampled_from([16, 64]), reverse=st.booleans()
)
def test_chunks_visit_every_token_in_its_order(lengths: list[int], chunk: int, reverse: bool) -> None:
    bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    table = chunk_table(cu_seqlens, 1, bounds[-1], chunk, reverse, CPU)
    assert table.sequences.dtype == table.chunks.dtype == torch.int32
    assert walks(table, chunk, -1 if reverse else 1) == expected(bounds, reverse)
    sequences = table.chunks[:, 0].tolist()
    for i, (start, n, first, count) in enumerate(table.sequences.tolist()):
        assert count == -(-n // chunk)
        assert sequences[first : first + count] == [i] * count
        assert table.chunks[first : first + count, 1].tolist() == list(range(0, n, chunk))
        assert all(row == [start, n] for row in table.chunks[first : first + count, 2:].tolist())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("batch", "length"), [(3, 70), (2, 0), (0, 5), (1, 1)])
def test_without_bounds_every_row_is_a_sequence(batch: int, length: int, reverse: bool) -> None:
    table = chunk_table(None, batch, length, 64, reverse, CPU)
    bounds = [row * length for row in range(batch + 1)]
    assert walks(table, 64, -1 if reverse else 1) == expected(bounds, reverse)


def test_bounds_are_read_once_and_again_when_they_were_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []

    def counted(cu_seqlens: Tensor | None, batch: int, length: int) -> list[tuple[int, int, int]]:
        assert cu_seqlens is not None
        read.append(cu_seqlens)
        return spans(cu_seqlens, batch, length)

    monkeypatch.setattr(tables, "spans", counted)
    bounds = torch.tensor([0, 30, 90], dtype=torch.int32)
    first = chunk_table(bounds, 1, 90, 64, False, CPU)
    assert chunk_table(bounds, 1, 90, 64, False, CPU) is first
    assert len(read) == 1
    chunk_table(bounds, 1, 90, 64, True, CPU)  # the way back is a table of its own
    assert len(read) == 2
    bounds[1] = 40
    second = chunk_table(bounds, 1, 90, 64, False, CPU)
    assert len(read) == 3
    assert second.sequences[:, 1].tolist() == [40, 50]


def test_a_table_goes_with_its_bounds() -> None:
    before = len(sequences._REMEMBERED)
    bounds = torch.tensor([0, 7], dtype=torch.int32)
    chunk_table(bounds, 1, 7, 64, False, CPU)
    assert len(sequences._REMEMBERED) == before + 1
    del bounds
    assert len(sequences._REMEMBERED) == before


def test_bounds_of_inference_mode() -> None:
    with torch.inference_mode():
        bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
        assert chunk_table(bounds, 1, 7, 64, False, CPU).sequences[:, 1].tolist() == [3, 4]
        bounds[1] = 5
        assert chunk_table(bounds, 1, 7, 64, False, CPU).sequences[:, 1].tolist() == [5, 2]


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 6]], ids=str)
def test_bounds_must_rise_from_0_to_T(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=5"):
        chunk_table(torch.tensor(bounds), 1, 5, 64, False, CPU)
