"""The submanifold convolution against PyTorch's dense one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mainstem.domains.pointcloud.sparse_conv import (
    Kernel,
    SubMConv3d,
    neighbours,
    submanifold_convolution,
    why_not_spconv,
)
from mainstem.domains.pointcloud.voxels import Voxels


def random_voxels(
    seed: int, size: tuple[int, int, int], batch: int = 2, channels: int = 3, share: float = 0.4
) -> Voxels:
    generator = torch.Generator().manual_seed(seed)
    index = (torch.rand(batch, *size, generator=generator) < share).nonzero()
    features = torch.randn(len(index), channels, dtype=torch.float64, generator=generator)
    return Voxels(features, index, size, batch)


def dense(voxels: Voxels, features: Tensor, weight: Tensor) -> Tensor:
    """The same by `conv3d` over the whole grid."""
    places = tuple(voxels.index.T)
    grid = features.new_zeros(voxels.batch, *voxels.size, features.shape[1]).index_put(places, features)
    padding = [edge // 2 for edge in weight.shape[1:4]]
    out = F.conv3d(grid.permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3), padding=padding)
    return out.permute(0, 2, 3, 4, 1)[places]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    kernel=st.sampled_from([(3, 3, 3), (1, 3, 3), (5, 3, 1), (1, 1, 1), (3, 5, 7)]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_is_the_dense_convolution(
    seed: int, size: tuple[int, int, int], kernel: Kernel, share: float
) -> None:
    voxels = random_voxels(seed, size, share=share)
    weight = torch.randn(2, *kernel, 3, dtype=torch.float64, requires_grad=True)
    features = voxels.features.requires_grad_()
    ours, expected = submanifold_convolution(voxels, weight), dense(voxels, features, weight)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    back = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, [features, weight], back),
        torch.autograd.grad(expected, [features, weight], back),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradients() -> None:
    voxels = random_voxels(0, (3, 3, 4), channels=2)
    weight = torch.randn(3, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: submanifold_convolution(voxels.with_features(x), w),
        (voxels.features.requires_grad_(), weight),
    )


def test_two_threads_give_the_same_bits() -> None:
    voxels = random_voxels(1, (6, 16, 16), channels=16, share=0.2)
    voxels = voxels.with_features(voxels.features.float())
    conv = SubMConv3d(16, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = conv(voxels).features
        torch.set_num_threads(2)
        again = [conv(voxels).features for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    # Two threads may cut a product differently from one, but twice the same way.
    assert all(torch.equal(one, again[0]) for one in again)
    torch.testing.assert_close(again[0], expected, rtol=0, atol=1e-5)


def test_bfloat16_under_autocast_is_summed_in_float32() -> None:
    voxels = random_voxels(2, (3, 6, 6), channels=8)
    voxels = voxels.with_features(voxels.features.float().requires_grad_())
    conv = SubMConv3d(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(voxels).features
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv(voxels).features, rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(y.float().sum(), [conv.weight])
    assert gradient.dtype == torch.float32
    rounded = conv.weight.detach().bfloat16().float().requires_grad_()
    x = voxels.features.detach().bfloat16().float()
    (expected,) = torch.autograd.grad(dense(voxels, x, rounded).sum(), [rounded])
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.05)


def test_neighbours_are_found_once_and_are_pairs() -> None:
    voxels = random_voxels(4, (3, 5, 5))
    found = neighbours(voxels, (3, 3, 3))
    assert neighbours(voxels.with_features(-voxels.features), (3, 3, 3)) is found
    offsets = [(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)][:13]
    rows = {tuple(row): at for at, row in enumerate(voxels.index.tolist())}
    for (z, y, x), (p, q) in zip(offsets, found.pairs):
        expected = [
            (at, rows[b, k + z, j + y, i + x])
            for (b, k, j, i), at in rows.items()
            if (b, k + z, j + y, i + x) in rows
        ]
        assert list(zip(p.tolist(), q.tolist())) == expected


def test_bias_and_weight_layout() -> None:
    voxels = random_voxels(5, (2, 3, 3))
    conv = SubMConv3d(3, 4, (1, 3, 3), bias=True).double()
    assert conv.weight.shape == (4, 1, 3, 3, 3)
    assert conv.bias is not None
    expected = dense(voxels, voxels.features, conv.weight) + conv.bias
    torch.testing.assert_close(conv(voxels).features, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2}, "odd"),
        ({"backend": "cuda"}, "auto, spconv, torch"),
        ({"kernel_size": (3, 3)}, "three"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubMConv3d(3, 3, **arguments)  # type: ignore[arg-type]


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="must have 5 channels, got 3"):
        SubMConv3d(5, 3)(random_voxels(0, (2, 2, 2)))


def test_spconv_is_never_used_for_cpu_tensors() -> None:
    reason = why_not_spconv()
    if reason is not None:
        with pytest.raises(ValueError, match="'spconv' cannot run"):
            SubMConv3d(3, 3, backend="spconv")
    else:
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            SubMConv3d(3, 3, backend="spconv")(random_voxels(0, (2, 2, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_cuda_gives_what_the_cpu_gives(backend: str) -> None:
    voxels = random_voxels(6, (4, 9, 9), channels=16)
    voxels = voxels.with_features(voxels.features.float())
    conv = SubMConv3d(16, 32, backend=backend)  # type: ignore[arg-type]
    expected = conv(voxels).features
    moved = Voxels(voxels.features.cuda(), voxels.index.cuda(), voxels.size, voxels.batch)
    # TF32 keeps ten bits.
    torch.testing.assert_close(conv.cuda()(moved).features.cpu(), expected, rtol=0, atol=5e-3)
