"""Group RNN: any token mixer of the backbone, run along groups of voxels."""

from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor, nn

from ...core.block import Block, Branch
from ...core.config import BackboneConfig
from ...core.norms import EPS

NormPlace = Literal["pre", "post"]


class GroupRNN(nn.Module):
    """One residual block of the backbone over groups of voxels; ``(G, T, C)`` to ``(G, T, C)``.

    ``pre`` is `core.block.Block`: ``x + s·mixer(RMSNorm(x))``, then the channel mixer in the same way.
    ``post`` is ``x + LayerNorm(mixer(x))``, as LION does with Mamba. A small ``config.layer_scale`` starts
    the block near the identity: it is the initial s, or the initial weight of the LayerNorm. (From one, the
    untrained block adds noise of unit variance to every voxel.)

    Args:
        config: of the backbone, as deep as the network has RNNs. ``drop_path`` holds for every one of them,
            and drops groups.
        layer: place among all RNNs of the network, from 0.
        norm: where the norm is; ``None`` is as LION has it, ``post`` for Mamba and ``pre`` for the others.
        shared_projections: a bidirectional mixer and its mirror image share ``in_proj`` and ``out_proj``;
            ``None`` is as LION has it, for Mamba only.

    Raises:
        ValueError: ``norm`` is unknown, or there are no projections to share.
    """

    def __init__(
        self,
        config: BackboneConfig,
        layer: int,
        norm: NormPlace | None = None,
        shared_projections: bool | None = None,
    ) -> None:
        super().__init__()
        mamba = config.layers[layer] == "mamba"
        if norm is None:
            norm = "post" if mamba else "pre"
        if shared_projections is None:
            shared_projections = mamba and config.bidirectional
        if norm not in get_args(NormPlace):
            raise ValueError(f"norm={norm!r}: choose one of {', '.join(get_args(NormPlace))}")
        self.config = config
        self.block = Block(config, layer)
        if norm == "post":
            put_norms_after(self.block, config)
        for branch in self.block.modules():
            if isinstance(branch, Branch):
                branch.rate = config.drop_path
        if shared_projections:
            share_projections(self.block)

    def forward(self, groups: Tensor) -> Tensor:
        """Map ``groups`` (G, T, C) to ``(G, T, C)``."""
        mixed: Tensor = self.block(groups)[0]
        return mixed


class NormedBranch(Branch):
    """A branch that ends with a LayerNorm, whose weight starts at the layer scale."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(replace(config, layer_scale=None), config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=EPS)
        if config.layer_scale is not None:
            nn.init.constant_(self.norm.weight, config.layer_scale)

    def forward(self, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Map ``y`` (B, T, D) to ``(B, T, D)``."""
        return super().forward(self.norm(y), cu_seqlens)


def put_norms_after(block: Block, config: BackboneConfig) -> None:
    """Turn the pre-norm ``block`` into a post-norm one."""
    block.register_module("norm", nn.Identity())
    block.register_module("branch", NormedBranch(config))
    if block.channel_norm is not None:
        block.register_module("channel_norm", nn.Identity())
        block.register_module("channel_branch", NormedBranch(config))


def share_projections(block: Block) -> None:
    """Let the two directions of ``block`` use the same projections into and out of the mixer.

    Raises:
        ValueError: there is one direction only, or the mixer has no such projections.
    """
    if block.reverse_mixer is None:
        raise ValueError("shared_projections=True needs backbone.bidirectional=True and a recurrent mixer")
    for name in ("in_proj", "out_proj"):
        if not hasattr(block.mixer, name):
            kind = type(block.mixer).__name__
            raise ValueError(f"shared_projections=True: {kind} has no {name}; leave it False")
        block.reverse_mixer.register_module(name, getattr(block.mixer, name))
