"""LION's backbone: RNNs over groups of voxels, position embedding, layers, blocks, published sizes."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from mainstem.core import BackboneConfig
from mainstem.core.mixers import MixerName
from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.lion import Lion, LionLayer, Stage
from mainstem.domains.pointcloud.position import PositionEmbedding
from mainstem.domains.pointcloud.rnn import GroupRNN
from mainstem.domains.pointcloud.vfe import VoxelFeatureEncoder
from mainstem.domains.pointcloud.voxels import Voxels, voxel_index
from mainstem.domains.pointcloud.windows import group_order

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs" / "pointcloud").glob("lion_*.yaml"))
KITTI = ROOT.parent / "shared" / "data" / "lidar" / "kitti_object"
SIZE = (8, 12, 10)
DIM = 16
STAGES = [Stage(window=(5, 5, 4), group=16), Stage(window=(5, 5, 2), group=8)]
CLOSING = Stage(window=(5, 5, 2), group=8)


def config(mixer: str = "gla", **settings: Any) -> BackboneConfig:
    plain = {"dim": DIM, "depth": 1, "heads": 2, "bidirectional": True, "channel_mixer": "none"}
    return BackboneConfig(mixer=mixer, **(plain | settings))  # type: ignore[arg-type]


def lion(backbone: BackboneConfig | None = None, **settings: Any) -> Lion:
    torch.manual_seed(0)
    return Lion(backbone or config(), stages=STAGES, closing=CLOSING, **settings)


def cloud(counts: list[int], seed: int = 0) -> Voxels:
    """Random voxels, so many in each sample."""
    generator = torch.Generator().manual_seed(seed)
    cells = SIZE[0] * SIZE[1] * SIZE[2]
    keys = [
        sample * cells + torch.randperm(cells, generator=generator)[:count].sort().values
        for sample, count in enumerate(counts)
    ]
    index = voxel_index(torch.cat(keys), SIZE)
    return Voxels(torch.randn(len(index), DIM, generator=generator), index, SIZE, len(counts))


def only(voxels: Voxels, sample: int) -> Voxels:
    """One sample of a batch as a batch of its own."""
    rows = voxels.index[:, 0] == sample
    index = voxels.index[rows].clone()
    index[:, 0] = 0
    return Voxels(voxels.features[rows], index, voxels.size, 1)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Group RNN


def test_a_pre_norm_rnn_is_the_backbones_block() -> None:
    rnn = GroupRNN(config(layer_scale=0.5), 0)
    x = torch.randn(3, 7, DIM)
    block = rnn.block
    normed = block.norm(x)
    assert block.reverse_mixer is not None
    assert block.branch.scale is not None
    mixed = block.mixer(normed) + block.reverse_mixer(normed, reverse=True)
    torch.testing.assert_close(rnn(x), x + block.branch.scale * mixed)


def test_mamba_is_post_norm_and_shares_its_projections_as_published() -> None:
    torch.manual_seed(0)
    rnn = GroupRNN(config("mamba"), 0)
    x = torch.randn(3, 7, DIM)
    mixer, mirrored = rnn.block.mixer, rnn.block.reverse_mixer
    assert mirrored is not None
    assert mirrored.in_proj is mixer.in_proj
    assert mirrored.out_proj is mixer.out_proj
    assert mirrored.conv is not mixer.conv
    mixed = mixer(x) + mirrored(x.flip(1)).flip(1)
    torch.testing.assert_close(rnn(x), x + nn.functional.layer_norm(mixed, (DIM,)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channel_mixer", ["none", "swiglu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_small_layer_scale_starts_near_the_identity(norm: Any, channel_mixer: str) -> None:
    x = torch.randn(4, 9, DIM)
    torch.manual_seed(0)
    near = GroupRNN(config(layer_scale=1e-3, channel_mixer=channel_mixer), 0, norm)
    torch.manual_seed(0)
    far = GroupRNN(config(channel_mixer=channel_mixer), 0, norm)
    torch.testing.assert_close(near(x), x, rtol=0, atol=0.01)
    assert (far(x) - x).abs().max() > 0.1


def test_drop_path_drops_whole_groups_at_every_layer() -> None:
    torch.manual_seed(0)
    rnn = GroupRNN(config("mamba", drop_path=0.5, depth=4), 0)
    x = torch.randn(64, 5, DIM)
    changed = (rnn(x) - x).abs().amax((1, 2)) > 0
    assert 16 < changed.sum() < 48
    rnn.eval()
    whole = rnn(x) - x
    rnn.train()
    torch.manual_seed(1)
    dropped = rnn(x) - x
    kept = dropped.abs().amax((1, 2)) > 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm='middle': choose one of pre, post"):
        GroupRNN(config(), 0, "middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs backbone\.bidirectional=True"):
        GroupRNN(config(bidirectional=False), 0, shared_projections=True)
    with pytest.raises(ValueError, match="RWKV6Mixer has no in_proj"):
        GroupRNN(config("rwkv6"), 0, shared_projections=True)
    with pytest.raises(ValueError, match="window="):
        Stage(window=(13, 13, 0), group=16)
    with pytest.raises(ValueError, match="stages"):
        Lion(config(), stages=[])


# Position embedding


def test_positions_are_centred_and_flat_axes_are_zero() -> None:
    embedding = PositionEmbedding(DIM).eval()
    seen: list[Tensor] = []
    embedding.mlp[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    index = torch.tensor([[0, 0, 0, 0], [0, 0, 5, 2], [1, 0, 9, 3]])
    embedding(Voxels(torch.zeros(3, DIM), index, (1, 10, 4), 2))
    expected = torch.tensor([[-0.5, -0.5, 0.0], [0.0, 0.0, 0.0], [0.25, 0.4, 0.0]]) * 2 * torch.pi
    torch.testing.assert_close(seen[0], expected)


# Layers


def test_a_layer_runs_over_the_x_order_and_then_over_the_y_order() -> None:
    class Sum(nn.Module):
        def forward(self, groups: Tensor) -> Tensor:
            return groups.cumsum(1)

    voxels = cloud([30, 21])
    order_x, order_y = group_order(voxels, (3, 3, 2), 8, True)
    expected = order_y.scatter(
        order_y.gather(order_x.scatter(order_x.gather(voxels.features).cumsum(1))).cumsum(1)
    )
    layer = LionLayer([Sum(), Sum()], Stage(window=(3, 3, 2), group=8), shift=True, checkpointing=False)
    torch.testing.assert_close(layer(voxels).features, expected)


def test_checkpointing_changes_no_number() -> None:
    grads = []
    for checkpointing in (False, True):
        net = lion(config(checkpointing=checkpointing))
        voxels = cloud([40, 25])
        net(voxels).features.square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


# The whole


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("mixer", ["mamba", "gla", "attention"])
def test_bfloat16_under_autocast_is_close_to_float32(mixer: str) -> None:
    net = lion(config(mixer, layer_scale=0.1), generation=0.0)
    voxels = cloud([40, 25])
    exact = net(voxels).features
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(voxels).features
    rough.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_a_checkpoint_brings_all_back() -> None:
    net, other = lion(config("mamba")).eval(), Lion(config("mamba"), STAGES, CLOSING).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(cloud([30])).features, other(cloud([30])).features)


@pytest.mark.parametrize("mixer", get_args(MixerName))
def test_every_mixer_serves_and_trains(mixer: str) -> None:
    backbone = config(mixer, layer_scale=0.1)
    torch.manual_seed(0)
    net = Lion(backbone, stages=STAGES[1:], closing=CLOSING)
    features = cloud([40, 25]).features.requires_grad_()
    coarse = net(cloud([40, 25]).with_features(features))
    assert coarse.features.isfinite().all()
    coarse.features.square().sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad.abs().sum() > 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_height_halves_at_every_stage_and_generation_adds_voxels() -> None:
    voxels = cloud([40, 25])
    coarse = lion(generation=0.0)(voxels)
    assert coarse.size == (2, 12, 10)
    occupied = torch.unique(
        torch.stack([voxels.index[:, 0], voxels.index[:, 1] // 4, *voxels.index[:, 2:].T], 1), dim=0
    )
    torch.testing.assert_close(coarse.index, occupied)
    assert len(lion(generation=0.5)(voxels).index) > len(occupied)
    flat = lion(generation=0.0, flat=[Stage(window=(5, 5, 1), group=8)])(voxels)
    assert flat.size == (1, 12, 10)


@pytest.mark.parametrize("mixer", ["mamba", "gla", "attention"])
@pytest.mark.parametrize("generation", [0.0, 0.2])
def test_a_sample_alone_and_in_a_batch_are_equal(mixer: str, generation: float) -> None:
    net = lion(config(mixer, depth=2), generation=generation).eval().double()
    voxels = cloud([40, 5, 0, 61])
    voxels = voxels.with_features(voxels.features.double())
    with torch.no_grad():
        together = net(voxels)
        for sample in range(4):
            if sample != 2:
                alone = net(only(voxels, sample))
                expected = only(together, sample)
                torch.testing.assert_close(alone.index, expected.index)
                torch.testing.assert_close(alone.features, expected.features, rtol=0, atol=1e-9)
    assert not (together.index[:, 0] == 2).any()


def test_the_order_of_points_does_not_matter() -> None:
    torch.manual_seed(0)
    grid = Grid((0.0, -4.0, -2.0), (8.0, 4.0, 2.0), (0.5, 0.5, 0.5))
    encoder, net = VoxelFeatureEncoder(grid, 1, DIM).eval().double(), lion().eval().double()
    points = torch.rand(300, 4) * torch.tensor([8.0, 8.0, 4.0, 1.0]) - torch.tensor([0.0, 4.0, 2.0, 0.0])
    points = points.double()
    sample = torch.randint(0, 2, (300,))
    shuffled = torch.randperm(300)
    with torch.no_grad():
        one = net(encoder(points, sample, 2))
        other = net(encoder(points[shuffled], sample[shuffled], 2))
    torch.testing.assert_close(one.index, other.index)
    torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", [[0], [0, 0], [1], [0, 1, 0]])
def test_almost_nothing_is_fine(counts: list[int], training: bool) -> None:
    voxels = cloud(counts)
    coarse = lion().train(training)(voxels)
    assert coarse.batch == len(counts)
    assert coarse.size == (2, 12, 10)
    assert len(coarse.index) >= sum(counts)
    assert coarse.features.isfinite().all()


def test_without_rnns_no_voxel_sees_far() -> None:
    net, far = lion(rnn=False, generation=0.0).eval(), lion(generation=0.0).eval()
    assert not [module for module in net.modules() if isinstance(module, GroupRNN)]
    index = torch.tensor([[0, 0, 0, 0], [0, 0, 11, 9]])
    features = torch.randn(2, DIM)
    with torch.no_grad():
        for module, reaches in ((net, False), (far, True)):
            before = module(Voxels(features, index, SIZE, 1)).features[0]
            after = module(Voxels(features + torch.tensor([[0.0], [1.0]]) * torch.randn(DIM), index, SIZE, 1))
            assert torch.equal(before, after.features[0]) != reaches


# The published configurations


def published(path: Path) -> tuple[Lion, dict[str, Any]]:
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]
    backbone = BackboneConfig(**settings["backbone"])
    keywords = dict(settings["lion"]["init_args"])
    for name in ("stages", "flat"):
        keywords[name] = [Stage(**stage) for stage in keywords.get(name, [])]
    return Lion(backbone, **keywords | {"closing": Stage(**keywords["closing"])}), settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_configurations_have_their_grids_and_numbers_of_rnns(path: Path) -> None:
    net, settings = published(path)
    grid = {
        "lion_kitti": (32, 400, 352),
        "lion_waymo": (32, 472, 472),
        "lion_nuscenes": (32, 360, 360),
        "lion_once": (32, 376, 376),
        "lion_argoverse2": (32, 1000, 1000),
    }[path.stem]
    assert Grid(**{name: tuple(corner) for name, corner in settings["grid"].items()}).size == grid
    rnns = [module for module in net.modules() if isinstance(module, GroupRNN)]
    assert len(rnns) == (40 if "argoverse2" in path.stem else 34)


def test_the_waymo_network_has_the_papers_parameters() -> None:
    """Table 14 of the paper gives 1.4 million; those of its 34 Mamba blocks alone are as many."""
    net, _ = published(next(path for path in CONFIGS if path.stem == "lion_waymo"))
    rnns = nn.ModuleList(module for module in net.modules() if isinstance(module, GroupRNN))
    assert parameters(rnns) == 34 * (
        64 * 256 + 128 * 64 + 2 * (128 * 5 + 128 * 36 + 4 * 128 + 128 + 128 * 17) + 128
    )
    assert round(parameters(rnns) / 1e6, 1) == 1.4
    convolutions = 12 * 27 * 64 * 64
    assert parameters(net) - parameters(rnns) - convolutions < 50_000


def real_frame() -> Tensor:
    """One real frame ``(N, 4)``: undo the packing of the file, differences in millimetres."""
    packed = np.load(KITTI / "velodyne_fov.npz")
    count = int(packed["counts"][0])
    low, middle, high = (plane[:, :count].astype(np.int64) for plane in packed["planes"])
    zigzag = low | middle << 8 | high << 16
    xyz = np.cumsum(zigzag >> 1 ^ -(zigzag & 1), axis=1).T / 1000
    return torch.from_numpy(np.c_[xyz, packed["refl"][:count] / 100].astype(np.float32))


@pytest.mark.skipif(not KITTI.exists(), reason="needs the real frames beside the repository")
@pytest.mark.slow
def test_the_published_kitti_network_runs_on_a_real_frame() -> None:
    net, settings = published(next(path for path in CONFIGS if path.stem == "lion_kitti"))
    grid = Grid(**{name: tuple(corner) for name, corner in settings["grid"].items()})
    points = real_frame()
    encoder = VoxelFeatureEncoder(grid, 1, 64)
    with torch.no_grad():
        voxels = encoder.eval()(points, torch.zeros(len(points), dtype=torch.int64), 1)
        coarse = net.eval()(voxels)
    assert coarse.size == (2, 400, 352)
    assert len(coarse.index) > len(voxels.index) / 4 > 500
    assert coarse.features.isfinite().all()
    assert coarse.features.std() > 0.1
