"""Groups hold every voxel once, in window order, with copies only at the end of a sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.voxels import Voxels
from mainstem.domains.pointcloud.windows import GroupOrder, group_order

SIZE = (3, 5, 7)  # z, y, x


def random_voxels(seed: int, counts: list[int], channels: int = 2) -> Voxels:
    """The given number of distinct random voxels in each sample."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(SIZE[0] * SIZE[1] * SIZE[2], generator=generator)[:count].sort().values
        z, y, x = cells // (SIZE[1] * SIZE[2]), cells // SIZE[2] % SIZE[1], cells % SIZE[2]
        rows.append(torch.stack([torch.full_like(z, sample), z, y, x], 1))
    features = torch.randn(sum(counts), channels, dtype=torch.float64, generator=generator)
    return Voxels(features, torch.cat(rows), SIZE, len(counts))


def slow_order(voxels: Voxels, window: tuple[int, int, int], shift: bool, along: str) -> list[list[int]]:
    """Rows of each sample's voxels in order, by sorting tuples."""

    def place(row: int) -> tuple[int, ...]:
        _, z, y, x = voxels.index[row].tolist()
        moved = [at + (edge // 2 if shift else 0) for at, edge in zip((x, y, z), window)]
        (X, ix), (Y, iy), (Z, iz) = (divmod(at, edge) for at, edge in zip(moved, window))
        return (X, Y, Z, ix, iy, iz) if along == "x" else (Y, X, Z, iy, ix, iz)

    samples = voxels.index[:, 0].tolist()
    return [
        sorted((row for row, at in enumerate(samples) if at == sample), key=place)
        for sample in range(voxels.batch)
    ]


def slow_groups(order: list[list[int]], group: int) -> list[list[int]]:
    """Cut each sample's rows into groups, the last one filled slot by slot as the rule says."""
    groups = []
    for rows in order:
        slots = -(-len(rows) // group) * group
        filled = list(rows)
        while len(filled) < slots:
            filled.append(filled[len(filled) - (group if slots > group else len(rows))])
        groups += [filled[start : start + group] for start in range(0, slots, group)]
    return groups


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    window=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4)),
    group=st.integers(1, 50),
    shift=st.booleans(),
)
def test_groups_are_those_of_the_rule(
    seed: int, counts: list[int], window: tuple[int, int, int], group: int, shift: bool
) -> None:
    voxels = random_voxels(seed, counts)
    for along, order in zip("xy", group_order(voxels, window, group, shift)):
        expected = slow_groups(slow_order(voxels, window, shift, along), group)
        assert order.rows.tolist() == expected
        groups = order.gather(voxels.features)
        assert torch.equal(groups, voxels.features[order.rows])
        assert torch.equal(order.scatter(groups), voxels.features)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), counts=st.lists(st.integers(1, 30), min_size=2, max_size=3))
def test_a_sample_has_the_same_groups_alone(seed: int, counts: list[int]) -> None:
    voxels = random_voxels(seed, counts)
    together = group_order(voxels, (3, 2, 2), 4, True)[0].gather(voxels.features)
    last = voxels.index[:, 0] == len(counts) - 1
    index = voxels.index[last] - torch.tensor([len(counts) - 1, 0, 0, 0])
    alone = Voxels(voxels.features[last], index, SIZE, 1)
    groups = group_order(alone, (3, 2, 2), 4, True)[0].gather(alone.features)
    assert torch.equal(together[-len(groups) :], groups)


def test_values_in_copies_are_dropped() -> None:
    voxels = random_voxels(3, [5, 2])
    order = group_order(voxels, (2, 2, 2), 4)[0]
    groups = order.gather(voxels.features).flatten(0, 1)
    groups[order.copies] = torch.nan
    assert len(order.copies) == 3 * 4 - 7
    assert torch.equal(order.scatter(groups.view(3, 4, 2)), voxels.features)


@pytest.mark.parametrize("counts", [[9, 0, 3], [2, 6], [1]])
def test_gradients_count_every_copy(counts: list[int]) -> None:
    voxels = random_voxels(1, counts)
    order = group_order(voxels, (3, 3, 2), 4, True)[1]
    features = voxels.features.requires_grad_()
    assert torch.autograd.gradcheck(order.gather, (features,))
    assert torch.autograd.gradcheck(order.scatter, (order.gather(features).detach().requires_grad_(),))


def test_orders_are_worked_out_once() -> None:
    voxels = random_voxels(0, [10])
    first = group_order(voxels, (3, 3, 3), 4)
    assert group_order(voxels.with_features(-voxels.features), (3, 3, 3), 4) is first
    other: tuple[GroupOrder, GroupOrder] = group_order(voxels, (3, 3, 3), 4, True)
    assert other is not first


def test_no_voxel_gives_no_group() -> None:
    voxels = random_voxels(0, [0, 0])
    order = group_order(voxels, (3, 3, 3), 4)[0]
    assert order.gather(voxels.features).shape == (0, 4, 2)
    assert order.scatter(order.gather(voxels.features)).shape == (0, 2)


@pytest.mark.parametrize(("window", "group", "name"), [((3, 0, 3), 4, "window"), ((3, 3, 3), 0, "group")])
def test_empty_windows_and_groups_are_refused(window: tuple[int, int, int], group: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        group_order(random_voxels(0, [3]), window, group)
