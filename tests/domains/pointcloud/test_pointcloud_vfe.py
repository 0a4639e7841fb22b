"""The voxel feature encoder against a loop over voxels, and what it does with few points or none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.vfe import RowNorm, VoxelFeatureEncoder

GRID = Grid((-2.0, 0.0, -1.0), (4.0, 4.0, 1.0), (0.5, 1.0, 2.0))  # 12 × 4 × 1 voxels


def random_points(seed: int, count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Points of which about half lie in the grid, of four columns."""
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(count, 4, generator=generator, dtype=torch.float64) - 0.4) * 8
    return points, torch.randint(0, batch, (count,), generator=generator)


def make_encoder(seed: int = 0) -> VoxelFeatureEncoder:
    torch.manual_seed(seed)
    encoder = VoxelFeatureEncoder(GRID, 1, 6).double()
    for layer in (encoder.first, encoder.second):
        torch.nn.init.normal_(layer.norm.running_mean, std=0.5)  # type: ignore[arg-type]
    return encoder


def slow_encode(
    encoder: VoxelFeatureEncoder, points: Tensor, sample: Tensor
) -> dict[tuple[int, ...], Tensor]:
    """Features of each voxel (sample, z, y, x) in evaluation mode, voxel by voxel."""
    members: dict[tuple[int, ...], list[Tensor]] = {}
    for point, at in zip(points, sample.tolist()):
        cell = [int((point[a] - GRID.low[a]) // GRID.voxel[a]) for a in range(3)]
        if all(GRID.low[a] <= point[a] < GRID.high[a] for a in range(3)):
            members.setdefault((at, cell[2], cell[1], cell[0]), []).append(point)
    features = {}
    for cell_, rows in members.items():
        cloud = torch.stack(rows)
        centre = [GRID.low[a] + (cell_[3 - a] + 0.5) * GRID.voxel[a] for a in range(3)]
        xyz = cloud[:, :3]
        x = torch.cat([cloud, xyz - xyz.mean(0), xyz - torch.tensor(centre, dtype=xyz.dtype)], 1)
        x = encoder.first.norm(encoder.first.linear(x)).relu()
        x = torch.cat([x, x.amax(0).expand_as(x)], 1)
        features[cell_] = encoder.second.norm(encoder.second.linear(x)).relu().amax(0)
    return features


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), count=st.integers(0, 80), batch=st.integers(1, 3))
def test_is_the_loop_over_voxels(seed: int, count: int, batch: int) -> None:
    encoder = make_encoder(seed).eval()
    points, sample = random_points(seed, count, batch)
    voxels = encoder(points, sample, batch)
    expected = slow_encode(encoder, points, sample)
    assert [tuple(row) for row in voxels.index.tolist()] == sorted(expected)
    for cell, feature in zip(sorted(expected), voxels.features):
        torch.testing.assert_close(feature, expected[cell], rtol=0, atol=1e-9)
    assert (voxels.size, voxels.batch) == ((1, 4, 12), batch)


def test_the_order_of_points_does_not_matter() -> None:
    encoder = make_encoder().eval()
    points, sample = random_points(1, 200)
    order = torch.randperm(200)
    one, other = encoder(points, sample, 2), encoder(points[order], sample[order], 2)
    assert torch.equal(one.index, other.index)
    torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-12)


def test_a_sample_gives_the_same_alone() -> None:
    encoder = make_encoder().eval()
    points, sample = random_points(2, 200)
    both = encoder(points, sample, 2)
    alone = encoder(points[sample == 1], torch.zeros_like(sample[sample == 1]), 1)
    mine = both.index[:, 0] == 1
    assert torch.equal(alone.index[:, 1:], both.index[mine][:, 1:])
    torch.testing.assert_close(alone.features, both.features[mine], rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool) -> None:
    encoder = make_encoder().train(training)
    points, sample = random_points(3, 30)
    for layer in (encoder.first, encoder.second):
        torch.nn.init.constant_(layer.norm.bias, 0.7)  # far from ReLU's kink

    def encode(first: Tensor, second: Tensor) -> Tensor:
        weights = {"first.linear.weight": first, "second.linear.weight": second}
        voxels = torch.func.functional_call(encoder, weights, (points, sample, 2))
        features: Tensor = voxels.features
        return features

    weights = encoder.first.linear.weight, encoder.second.linear.weight
    assert torch.autograd.gradcheck(encode, weights)


def test_equal_points_share_the_gradient() -> None:
    encoder = make_encoder().eval()
    for layer in (encoder.first, encoder.second):
        torch.nn.init.constant_(layer.norm.bias, 0.7)
    point = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    twice = point.repeat(2, 1).requires_grad_()
    once = point.clone().requires_grad_()
    encoder(twice, torch.zeros(2, dtype=torch.int64), 1).features.sum().backward()
    encoder(once, torch.zeros(1, dtype=torch.int64), 1).features.sum().backward()
    assert once.grad is not None
    assert twice.grad is not None
    assert once.grad.abs().max() > 1e-3
    torch.testing.assert_close(twice.grad.sum(0), once.grad[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_point(training: bool, count: int) -> None:
    encoder = make_encoder().train(training)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    points = torch.full((count, 4), 0.5, dtype=torch.float64)
    voxels = encoder(points, torch.ones(count, dtype=torch.int64), 3)
    assert voxels.features.shape == (count, 6)
    assert voxels.features.isfinite().all()
    assert voxels.counts.tolist() == [0, count, 0]
    voxels.features.sum().backward()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_points_outside_and_not_numbers_are_dropped() -> None:
    points = torch.tensor([[0.0, 1, 0, 9], [9, 1, 0, 9], [torch.nan, 1, 0, 9], [4, 1, 0, 9]])
    voxels = VoxelFeatureEncoder(GRID, 1, 4)(points, torch.zeros(4, dtype=torch.int64), 1)
    assert voxels.index.tolist() == [[0, 0, 1, 4]]


def test_row_norm_is_batch_norm_where_there_are_rows() -> None:
    norm, expected = RowNorm(3), torch.nn.BatchNorm1d(3, eps=1e-3, momentum=0.01)
    x = torch.randn(5, 3)
    torch.testing.assert_close(norm(x), expected(x))
    torch.testing.assert_close(norm.running_var, expected.running_var)
    torch.testing.assert_close(norm(x[:1]), expected.eval()(x[:1]))


def test_other_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, 5\).*got \(7, 4\)"):
        VoxelFeatureEncoder(GRID, 2, 4)(torch.zeros(7, 4), torch.zeros(7, dtype=torch.int64), 1)


def test_odd_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        VoxelFeatureEncoder(GRID, 1, 5)
