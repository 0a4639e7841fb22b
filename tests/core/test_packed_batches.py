import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.core import packed

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(LENGTHS)
def test_pack_and_unpack_undo_each_other(lengths: list[int]) -> None:
    x = torch.randn(len(lengths), 5, 2)
    flat, cu = packed.pack(x, torch.tensor(lengths))
    assert flat.shape == (1, sum(lengths), 2)
    assert cu.dtype == torch.int32
    padding = torch.arange(5) >= torch.tensor(lengths)[:, None]
    assert torch.equal(packed.unpack(flat, cu, 5), x.masked_fill(padding[..., None], 0))
    assert packed.lengths_of(cu).tolist() == lengths


@settings(max_examples=30, deadline=None)
@given(LENGTHS)
def test_split_and_join_undo_each_other(lengths: list[int]) -> None:
    sequences = [torch.randn(n, 3) for n in lengths]
    x, cu = packed.join(sequences)
    assert all(torch.equal(a, b) for a, b in zip(packed.split(x, cu), sequences, strict=True))


@settings(max_examples=30, deadline=None)
@given(LENGTHS)
def test_places_within_sequences(lengths: list[int]) -> None:
    cu, total = packed.cu_seqlens_of(torch.tensor(lengths)), sum(lengths)
    assert packed.sequence_ids(cu, total).tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]
    assert packed.positions(cu, total).tolist() == [i for n in lengths for i in range(n)]
    assert packed.positions(cu, total, from_end=True).tolist() == [
        n - 1 - i for n in lengths for i in range(n)
    ]


@settings(max_examples=30, deadline=None)
@given(LENGTHS)
def test_orders_stay_within_sequences(lengths: list[int]) -> None:
    cu, total = packed.cu_seqlens_of(torch.tensor(lengths)), sum(lengths)
    x = torch.randn(1, total, 2)
    flipped = packed.split(packed.permute(x, packed.flip_within(cu, total)), cu)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(flipped, packed.split(x, cu)))
    order = packed.sort_within(x[0, :, 0], cu)
    keys = packed.split(packed.permute(x, order), cu)
    assert all(torch.equal(k[:, 0], k[:, 0].sort().values) for k in keys)
    assert torch.equal(packed.permute(packed.permute(x, order), packed.inverse(order)), x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 4], [0, 0], [2]])
def test_previous_shifts_within_sequences(lengths: list[int], reverse: bool) -> None:
    sequences = [torch.randn(n, 2) for n in lengths]
    x, cu = packed.join(sequences)
    initial = torch.randn(len(lengths), 2)
    shifted = packed.split(packed.previous(x, initial, cu, reverse=reverse), cu)
    for s, (sequence, got) in enumerate(zip(sequences, shifted)):
        alone = packed.previous(sequence[None], initial[s : s + 1], reverse=reverse)[0]
        assert torch.equal(got, alone)
        if sequence.shape[0]:
            kept = sequence[1:] if reverse else sequence[:-1]
            expected = [kept, initial[s : s + 1]] if reverse else [initial[s : s + 1], kept]
            assert torch.equal(got, torch.cat(expected))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 2, 3]), "lengths must be 2 integers"),
        (torch.tensor([1.0, 2.0]), "lengths must be 2 integers"),
        (torch.tensor([1, 6]), "between 0 and T=5"),
        (torch.tensor([-1, 5]), "between 0 and T=5"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed.pack(torch.zeros(2, 5, 1), lengths)
