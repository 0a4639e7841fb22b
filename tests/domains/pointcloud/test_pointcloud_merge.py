"""Merging sums what falls together, expanding gives it back, generation adds diagonal neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.merge import (
    Scale,
    SpatialDescriptor,
    VoxelGeneration,
    VoxelMerge,
    expand,
    merge,
)
from mainstem.domains.pointcloud.voxels import Voxels


def random_voxels(
    seed: int, size: tuple[int, int, int], batch: int = 2, channels: int = 3, share: float = 0.3
) -> Voxels:
    generator = torch.Generator().manual_seed(seed)
    index = (torch.rand(batch, *size, generator=generator) < share).nonzero()
    features = torch.randn(len(index), channels, dtype=torch.float64, generator=generator)
    return Voxels(features, index, size, batch)


def without_generation(module: VoxelMerge) -> VoxelMerge:
    """The same weights in a module that generates nothing."""
    plain = VoxelMerge(module.norm.normalized_shape[0], module.scale).double()
    plain.load_state_dict(module.state_dict())
    return plain


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    scale=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    share=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_merge_sums_members(seed: int, size: tuple[int, int, int], scale: Scale, share: float) -> None:
    voxels = random_voxels(seed, size, share=share)
    coarse, inverse = merge(voxels, scale)
    sums: dict[tuple[int, ...], torch.Tensor] = {}
    for row, feature in zip(voxels.index.tolist(), voxels.features):
        cell: tuple[int, ...] = (row[0], row[1] // scale[2], row[2] // scale[1], row[3] // scale[0])
        sums[cell] = sums.get(cell, torch.zeros(3, dtype=torch.float64)) + feature
    assert [tuple(row) for row in coarse.index.tolist()] == sorted(sums)
    for place, feature in zip(sorted(sums), coarse.features):
        torch.testing.assert_close(feature, sums[place], rtol=0, atol=1e-12)
    assert coarse.size == tuple(-(-cells // step) for cells, step in zip(size, reversed(scale)))
    assert (coarse.index[:, 1:] < torch.tensor(coarse.size)).all()
    steps = torch.tensor([1, *reversed(scale)])
    assert torch.equal(coarse.index[inverse], voxels.index // steps)


def test_expand_adds_the_coarse_row_to_each_member() -> None:
    voxels = random_voxels(1, (4, 5, 6))
    coarse, inverse = merge(voxels, (2, 2, 2))
    number = torch.arange(len(coarse.index), dtype=torch.float64)
    numbered = coarse.with_features(number[:, None].expand(-1, 3))
    joined = expand(numbered, voxels, inverse)
    expected = voxels.features + inverse[:, None]
    torch.testing.assert_close(joined.features, expected, rtol=0, atol=1e-12)
    assert joined.plans is voxels.plans


def test_gradients() -> None:
    voxels = random_voxels(2, (3, 3, 4), channels=2)
    generated = VoxelGeneration(0.3)(voxels)
    fine = voxels.features.requires_grad_()
    coarse, inverse = merge(voxels, (2, 2, 2))
    rows = coarse.features.detach().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: merge(voxels.with_features(x), (2, 2, 2))[0].features, (fine,))
    assert check(lambda x: merge(voxels.with_features(x), (2, 1, 2), generated)[0].features, (fine,))
    assert check(
        lambda x, y: expand(coarse.with_features(x), voxels.with_features(y), inverse).features, (rows, fine)
    )


def test_merging_is_worked_out_once_and_shares_its_plans() -> None:
    voxels = random_voxels(3, (4, 4, 4))
    first, inverse = merge(voxels, (2, 2, 2))
    second, same = merge(voxels.with_features(2 * voxels.features), (2, 2, 2))
    assert same.data_ptr() == inverse.data_ptr()
    assert second.plans is first.plans
    torch.testing.assert_close(second.features, 2 * first.features)
    assert merge(voxels, (1, 1, 2))[0].plans is not first.plans


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    ratio=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_generation_chooses_the_highest_means(seed: int, size: tuple[int, int, int], ratio: float) -> None:
    voxels = random_voxels(seed, size)
    expected = []
    for sample in range(voxels.batch):
        rows = [row for row, at in enumerate(voxels.index[:, 0].tolist()) if at == sample]
        rows.sort(key=lambda row: -voxels.features[row].float().mean().item())
        for row in rows[: int(ratio * len(rows))]:
            _, z, y, x = voxels.index[row].tolist()
            for dy, dx in ((1, -1), (1, 1), (-1, -1), (-1, 1)):
                expected.append(
                    [sample, z, min(max(y + dy, 0), size[1] - 1), min(max(x + dx, 0), size[2] - 1)]
                )
    assert sorted(VoxelGeneration(ratio)(voxels).tolist()) == sorted(expected)


def test_generated_voxels_are_zeros_and_leave_the_others_as_they_were() -> None:
    voxels = random_voxels(5, (4, 6, 6), share=0.1)
    generated = VoxelGeneration(0.5)(voxels)
    plain, before = merge(voxels, (1, 1, 2))
    more, after = merge(voxels, (1, 1, 2), generated)
    assert len(more.index) > len(plain.index)
    assert torch.equal(more.index[after], plain.index[before])
    assert torch.equal(more.features[after], plain.features[before])
    new = torch.ones(len(more.index), dtype=torch.bool).index_fill(0, after, False)
    assert not more.features[new].any()
    halved = torch.cat([voxels.index, generated]) // torch.tensor([1, 2, 1, 1])
    cells = {tuple(row) for row in halved.tolist()}
    assert [tuple(row) for row in more.index.tolist()] == sorted(cells)


def test_module_describes_generates_merges_and_normalises() -> None:
    voxels = random_voxels(6, (4, 6, 6), share=0.2)
    module = VoxelMerge(3, (1, 1, 2), generation=0.4).double()
    coarse, inverse = module(voxels)
    described = module.descriptor(voxels)
    expected, _ = merge(described, (1, 1, 2), module.generation(described) if module.generation else None)
    assert torch.equal(coarse.index, expected.index)
    normal = torch.nn.functional.layer_norm(expected.features, (3,))
    torch.testing.assert_close(coarse.features, normal, rtol=0, atol=1e-12)
    plain, before = without_generation(module)(voxels)
    torch.testing.assert_close(coarse.features[inverse], plain.features[before], rtol=0, atol=1e-12)


def test_a_sample_gives_the_same_alone() -> None:
    voxels = random_voxels(7, (4, 6, 6))
    module = VoxelMerge(3, (2, 2, 2), generation=0.3).double()
    coarse, _ = module(voxels)
    mine = voxels.index[:, 0] == 1
    alone = Voxels(voxels.features[mine], voxels.index[mine] - torch.tensor([1, 0, 0, 0]), voxels.size, 1)
    torch.testing.assert_close(
        module(alone)[0].features, coarse.features[coarse.index[:, 0] == 1], rtol=0, atol=1e-12
    )


def test_descriptor_sees_neighbours_only() -> None:
    index = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 3]])
    voxels = Voxels(torch.randn(3, 4), index, (1, 1, 4), 1)
    descriptor = SpatialDescriptor(4)
    changed = voxels.features.clone()
    changed[0] += torch.randn(4)
    difference = descriptor(voxels).features - descriptor(voxels.with_features(changed)).features
    assert difference[:2].abs().amax(1).gt(1e-3).all()
    assert torch.equal(difference[2], torch.zeros(4))


def test_no_voxel_stays_no_voxel() -> None:
    voxels = random_voxels(0, (4, 4, 4), share=0)
    coarse, inverse = VoxelMerge(3, (2, 2, 2), generation=0.2).double()(voxels)
    assert (len(coarse.index), len(inverse), coarse.size, coarse.batch) == (0, 0, (2, 2, 2), 2)
    assert expand(coarse, voxels, inverse).features.shape == (0, 3)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_ratios_outside_0_to_1_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        VoxelGeneration(ratio)


def test_scale_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        merge(random_voxels(0, (2, 2, 2)), (1, 0, 1))
