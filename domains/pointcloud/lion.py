"""LION's 3D backbone: linear group RNNs over sparse voxels (Liu et al. 2024, arXiv:2407.18232).

Only the height shrinks from stage to stage; a block sees coarser scales in a small U-net of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core import BackboneConfig
from .merge import VoxelMerge, expand
from .position import PositionEmbedding
from .rnn import GroupRNN, NormPlace
from .voxels import Voxels
from .windows import group_order


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How a LION layer orders and groups voxels.

    Attributes:
        window: voxels along x, y and z of the windows that voxels are visited by.
        group: voxels of a group, a sequence for the RNNs.

    Raises:
        ValueError: a size below 1.
    """

    window: tuple[int, int, int]
    group: int

    def __post_init__(self) -> None:
        if len(self.window) != 3 or min(*self.window, self.group) < 1:
            raise ValueError(
                f"window={self.window} must be three sizes (x, y, z) and group={self.group} one,"
                " all at least 1"
            )


WAYMO_STAGES = (
    Stage(window=(13, 13, 32), group=4096),
    Stage(window=(13, 13, 16), group=2048),
    Stage(window=(13, 13, 8), group=1024),
    Stage(window=(13, 13, 4), group=512),
)
HALVE_ALL, HALVE_HEIGHT = (2, 2, 2), (1, 1, 2)


class LionLayer(nn.Module):
    """A group RNN over the X order of the voxels, then one over their Y order.

    Args:
        rnns: the two.
        stage: windows and groups.
        shift: move the windows by half their size.
        checkpointing: recompute in the backward pass, to save memory.
    """

    def __init__(self, rnns: Sequence[nn.Module], stage: Stage, shift: bool, checkpointing: bool) -> None:
        super().__init__()
        self.rnns = nn.ModuleList(rnns)
        self.stage, self.shift, self.checkpointing = stage, shift, checkpointing

    def forward(self, voxels: Voxels) -> Voxels:
        """Change the features of ``voxels``."""
        if len(voxels.index) == 0:
            return voxels
        features = voxels.features
        orders = group_order(voxels, self.stage.window, self.stage.group, self.shift)
        for rnn, order in zip(self.rnns, orders):
            groups = order.gather(features)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                groups = checkpoint(rnn, groups, use_reentrant=False)
            else:
                groups = rnn(groups)
            features = order.scatter(groups)
        return voxels.with_features(features)


class LionBlock(nn.Module):
    """A U-net of LION layers: down ``depth`` times by two along x, y and z, and up again.

    Args:
        layers: 2·depth LION layers, those on the way down first.
        dim: C.
    """

    def __init__(self, layers: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        depth = len(layers) // 2
        self.positions = nn.ModuleList(PositionEmbedding(dim) for _ in range(depth))
        self.encoder = nn.ModuleList(layers[:depth])
        self.merges = nn.ModuleList(VoxelMerge(dim, HALVE_ALL) for _ in range(depth))
        self.decoder = nn.ModuleList(layers[depth:])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))

    def forward(self, voxels: Voxels) -> Voxels:
        """Change the features of ``voxels``."""
        fine: list[tuple[Voxels, Tensor]] = []
        for position, layer, merge in zip(self.positions, self.encoder, self.merges):
            voxels = layer(voxels.with_features(voxels.features + position(voxels)))
            coarse, inverse = merge(voxels)
            fine.append((voxels, inverse))
            voxels = coarse
        for layer, norm, (skip, inverse) in zip(self.decoder, self.norms, reversed(fine)):
            joined = expand(layer(voxels), skip, inverse)
            voxels = joined.with_features(norm(joined.features))
        return voxels


class Lion(nn.Module):
    """The 3D backbone; voxels to fewer layers of voxels, of the same width.

    Each stage is a `LionBlock` and a merge that halves the height, before which the strongest voxels grow
    neighbours. One more LION layer closes. A network of S stages has ``2 (2·S·depth + 1)`` RNNs.

    Args:
        backbone: the RNNs: ``dim`` is C, ``depth`` the levels of a block's U-net, and a pattern of mixers
            repeats over the RNNs of the network, which alternate between the X and the Y order.
        stages: windows and groups of each block; None takes the paper's.
        closing: windows and groups of the layer that closes.
        flat: of further layers, after one more merge: LION's for Argoverse 2, over voxels without height.
        generation: share of the voxels that grow neighbours at a merge between stages.
        norm, shared_projections: of the RNNs; see `GroupRNN`.
        rnn: whether there are RNNs at all; without, what is left is the convolutions, embeddings and merges.

    Raises:
        ValueError: no stage, or a setting that does not fit.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        stages: Sequence[Stage] | None = None,
        closing: Stage = Stage(window=(13, 13, 2), group=256),
        flat: Sequence[Stage] = (),
        generation: float = 0.2,
        norm: NormPlace | None = None,
        shared_projections: bool | None = None,
        rnn: bool = True,
    ) -> None:
        super().__init__()
        stages = WAYMO_STAGES if stages is None else stages
        if not stages:
            raise ValueError("stages=[]: give the window and the group of at least one stage")
        dim, depth = backbone.dim, backbone.depth
        count = 2 * (2 * len(stages) * depth + 1 + len(flat))
        config = replace(backbone, depth=count)
        made = 0

        def layer(stage: Stage, shift: bool) -> nn.Module:
            nonlocal made
            made += 2
            if not rnn:
                return nn.Identity()
            rnns = [GroupRNN(config, place, norm, shared_projections) for place in (made - 2, made - 1)]
            return LionLayer(rnns, stage, shift, config.checkpointing)

        def merge() -> VoxelMerge:
            return VoxelMerge(dim, HALVE_HEIGHT, generation)

        # On either way of a U-net only the first layer has its windows where they are.
        shifts = [level > 0 for level in range(depth)] * 2
        self.blocks = nn.ModuleList(
            LionBlock([layer(stage, shift) for shift in shifts], dim) for stage in stages
        )
        self.merges = nn.ModuleList(merge() for _ in stages)
        self.closing = layer(closing, True)
        self.flat = nn.Sequential(*(layer(stage, True) for stage in flat))
        self.flatten = merge() if flat else None

    def forward(self, voxels: Voxels) -> Voxels:
        """Map voxels of C features to others, ``2^stages`` times lower (one more with ``flat``)."""
        for block, merge in zip(self.blocks, self.merges):
            voxels, _ = merge(block(voxels))
        voxels = self.closing(voxels)
        if self.flatten is not None:
            voxels = self.flat(self.flatten(voxels)[0])
        return voxels
