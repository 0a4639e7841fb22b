import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem.domains.pointcloud.bev import PlainBEV, ResidualBEV, to_bev
from mainstem.domains.pointcloud.voxels import Voxels, voxel_index


def _voxels(seed: int, batch: int, size: tuple[int, int, int], channels: int) -> Voxels:
    generator = torch.Generator().manual_seed(seed)
    cells = batch * size[0] * size[1] * size[2]
    key = (torch.rand(cells, generator=generator) < 0.3).nonzero()[:, 0]
    features = torch.randn(len(key), channels, generator=generator, dtype=torch.float64)
    return Voxels(features, voxel_index(key, size), size, batch)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 3),
)
def test_every_voxel_stands_in_its_column(
    seed: int, batch: int, size: tuple[int, int, int], channels: int
) -> None:
    voxels = _voxels(seed, batch, size, channels)
    slow = torch.zeros(batch, channels * size[0], *size[1:], dtype=torch.float64)
    for feature, (b, z, y, x) in zip(voxels.features, voxels.index.tolist()):
        for channel in range(channels):
            slow[b, channel * size[0] + z, y, x] = feature[channel]
    torch.testing.assert_close(to_bev(voxels), slow, rtol=0, atol=0)


def test_gradient_reaches_every_voxel() -> None:
    voxels = _voxels(0, 2, (2, 3, 4), 2)
    features = voxels.features.requires_grad_()

    def laid_out(features: Tensor) -> Tensor:
        return to_bev(voxels.with_features(features))

    assert torch.autograd.gradcheck(laid_out, (features,))


def test_no_voxel_gives_an_empty_view() -> None:
    empty = Voxels(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64), (2, 3, 5), 2)
    bev = to_bev(empty)
    assert bev.shape == (2, 8, 3, 5)
    assert not bev.any()


@pytest.mark.parametrize(
    ("network", "channels", "stride"),
    [
        (PlainBEV(6), 512, 1),
        (PlainBEV(6, (1, 1), (1, 2), (32, 64), (1, 2), (32, 32)), 64, 1),
        (ResidualBEV(6), 384, 1),
        (ResidualBEV(6, up_strides=(0.5, 1, 2)), 384, 2),
        (ResidualBEV(6, (0,), (4,), (8,), (2,), (5,)), 5, 2),
    ],
    ids=["plain", "plain-small", "residual", "residual-nuscenes", "residual-one-level"],
)
def test_networks_give_the_channels_and_stride_they_state(
    network: PlainBEV | ResidualBEV, channels: int, stride: int
) -> None:
    assert (network.out_channels, network.stride) == (channels, stride)
    bev = torch.randn(2, 6, 8, 12)
    out = network(bev)
    assert out.shape == (2, channels, 8 // stride, 12 // stride)
    out.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_published_sizes() -> None:
    # Each level has one convolution to start with and five more; 128 → 128, then 128 → 256.
    levels = 9 * (128 * 128 * 6 + 128 * 256 + 256 * 256 * 5) + 2 * (128 * 6 + 256 * 6)
    ups = 128 * 256 + 2 * 256 + 4 * 256 * 256 + 2 * 256
    assert sum(p.numel() for p in PlainBEV(128).parameters()) == levels + ups


def test_published_sizes_of_the_residual_network() -> None:
    # Channels of both convolutions and the projection of each level's first block, and of the further ones.
    levels = 128 * 128 * (9 + 9 + 1) + 2 * 128 * 3 + 1 * (18 * 128**2 + 4 * 128)
    levels += 128 * 128 * (9 + 9 + 1) + 2 * 128 * 3 + 2 * (18 * 128**2 + 4 * 128)
    levels += 9 * 128 * 256 + 9 * 256**2 + 128 * 256 + 2 * 256 * 3 + 2 * (18 * 256**2 + 4 * 256)
    ups = 128 * 128 + 4 * 128 * 128 + 16 * 256 * 128 + 3 * 2 * 128
    assert sum(p.numel() for p in ResidualBEV(128).parameters()) == levels + ups


@pytest.mark.parametrize("kind", [PlainBEV, ResidualBEV])
def test_a_shift_of_the_scene_shifts_the_features(kind: type[PlainBEV] | type[ResidualBEV]) -> None:
    torch.manual_seed(0)
    network = kind(3, (1, 1), (1, 2), (8, 8), (1, 2), (8, 8)).eval()
    scene = torch.zeros(1, 3, 40, 40)
    scene[:, :, 18:20, 18:20] = torch.randn(1, 3, 2, 2)
    moved = network(scene.roll((4, -2), (2, 3)))
    away = slice(12, 28)
    torch.testing.assert_close(
        moved[:, :, away, away], network(scene).roll((4, -2), (2, 3))[:, :, away, away], atol=1e-5, rtol=0
    )


def test_a_view_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 8×9 cells, which the BEV network's overall stride, 2, must"):
        PlainBEV(2, (1, 1), (1, 2), (4, 4), (1, 2), (4, 4))(torch.zeros(1, 2, 8, 9))


@pytest.mark.parametrize(
    ("strides", "up_strides", "message"),
    [
        ((1, 2), (1, 1), r"leave levels at 1/\[1.0, 2.0\]"),
        ((1, 2), (2, 4), r"one over a whole number"),
        ((3, 2), (1.5, 3), r"up_strides=\[1.5, 3\] must be whole numbers"),
        ((1, 2), (0, 1), r"up_strides=\[0, 1\] must be whole numbers"),
        ((1,), (1, 2), "one entry a level in each list, got .*'strides': 1"),
    ],
)
def test_levels_that_do_not_fit_are_refused(
    strides: tuple[int, ...], up_strides: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PlainBEV(2, (1, 1), strides, (4, 4), up_strides, (4, 4))
