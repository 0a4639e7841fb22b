"""The bird's-eye view: dense maps from sparse voxels, and the 2-D networks over them.

Both networks are levels of convolutions at falling resolution, whose results are brought to one resolution
and laid side by side (SECOND, Yan et al. 2018). LION takes the residual one for Waymo and nuScenes, the plain
one for KITTI and ONCE.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from math import isclose

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .voxels import Voxels

# Of SECOND, which all BEV networks have kept.
_EPS = 1e-3


def to_bev(voxels: Voxels) -> Tensor:
    """Lay the voxels of each column on top of each other; empty cells are zero.

    Args:
        voxels: features ``(N, C)`` on a grid ``(D, H, W)``.

    Returns:
        ``(B, C·D, H, W)``, feature by feature, from the lowest voxel up; channels last in memory.
    """
    depth, height, width = voxels.size
    channels = voxels.features.shape[1]
    sample, z, y, x = voxels.index.unbind(1)
    dense = voxels.features.new_zeros(voxels.batch, height, width, channels, depth)
    dense[sample, y, x, :, z] = voxels.features
    return dense.flatten(3).permute(0, 3, 1, 2)


class BEVBackbone(nn.Module, ABC):
    """Levels of 2-D blocks, each brought to one resolution; ``(B, C, H, W)`` to ``(B, C', H/s, W/s)``.

    Args:
        in_channels: C.
        layers: blocks of each level, after the first, which changes resolution and channels.
        strides: stride of each level's first block.
        channels: channels of each level.
        up_strides: by how much each level's result is made larger; below 1, smaller.
        up_channels: channels of each level's result.
        momentum: of the running statistics; larger for short trainings.

    Attributes:
        out_channels: C', all the results side by side.
        stride: s, cells of the input along an edge of an output's cell.

    Raises:
        ValueError: lists of different lengths, levels that end at different resolutions, or ``up_strides``
            that are not whole either way.
    """

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        up_strides: Sequence[float],
        up_channels: Sequence[int],
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        lists = {
            "layers": layers,
            "strides": strides,
            "channels": channels,
            "up_strides": up_strides,
            "up_channels": up_channels,
        }
        lengths = {name: len(values) for name, values in lists.items()}
        if not layers or len(set(lengths.values())) > 1:
            raise ValueError(f"a BEV network needs one entry a level in each list, got {lengths}")
        if any(up <= 0 or not isclose(max(up, 1 / up), round(max(up, 1 / up))) for up in up_strides):
            raise ValueError(
                f"up_strides={list(up_strides)} must be whole numbers, or one over whole numbers"
            )
        reached, ends = 1, []
        for stride, up in zip(strides, up_strides):
            reached *= stride
            ends.append(reached / up)
        if max(ends) - min(ends) > 1e-6 or not float(ends[0]).is_integer():
            raise ValueError(
                f"strides={list(strides)} and up_strides={list(up_strides)} leave levels at 1/{ends}"
                " of the resolution: it must be the same for all, one over a whole number"
            )
        self.stride, self.coarsest = int(ends[0]), max(reached, int(ends[0]))
        self.out_channels = sum(up_channels)
        self.momentum = momentum
        self.levels = nn.ModuleList(
            nn.Sequential(self.first_block(before, after, stride), *(self.block(after) for _ in range(count)))
            for (before, after), stride, count in zip(pairwise([in_channels, *channels]), strides, layers)
        )
        self.ups = nn.ModuleList(
            nn.Sequential(_resample(before, after, up), self.norm(after), nn.ReLU())
            for before, after, up in zip(channels, up_channels, up_strides)
        )

    def forward(self, bev: Tensor) -> Tensor:
        """Features of the bird's-eye view.

        Raises:
            ValueError: a map that the strides do not divide.
        """
        height, width = bev.shape[2:]
        if height % self.coarsest or width % self.coarsest:
            raise ValueError(
                f"the bird's-eye view has {height}×{width} cells, which the BEV network's overall stride,"
                f" {self.coarsest}, must divide: change the grid's range or voxels, or the strides"
            )
        results = []
        for level, up in zip(self.levels, self.ups):
            bev = level(bev)
            results.append(up(bev))
        return torch.cat(results, 1)

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """The normalisation used throughout."""
        return nn.BatchNorm2d(channels, eps=_EPS, momentum=self.momentum)

    @abstractmethod
    def first_block(self, before: int, after: int, stride: int) -> nn.Module:
        """The block that begins a level, from ``before`` to ``after`` channels."""

    @abstractmethod
    def block(self, channels: int) -> nn.Module:
        """One of the further blocks of a level."""


class PlainBEV(BEVBackbone):
    """Plain convolutions; the default is that of LION on KITTI. Arguments as in `ResidualBEV`."""

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[int] = (5, 5),
        strides: Sequence[int] = (1, 2),
        channels: Sequence[int] = (128, 256),
        up_strides: Sequence[float] = (1, 2),
        up_channels: Sequence[int] = (256, 256),
        momentum: float = 0.01,
    ) -> None:
        super().__init__(in_channels, layers, strides, channels, up_strides, up_channels, momentum)

    def first_block(self, before: int, after: int, stride: int) -> nn.Module:
        """Convolution, normalisation, ReLU."""
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, self.norm(after), nn.ReLU())

    def block(self, channels: int) -> nn.Module:
        """The same at one resolution."""
        return self.first_block(channels, channels, 1)


class ResidualBEV(BEVBackbone):
    """Residual blocks; the default is that of LION on Waymo, and ``up_strides=(0.5, 1, 2)`` on nuScenes.

    Args:
        in_channels: channels of the bird's-eye view.
        layers: blocks of each level, after the first, which changes resolution and channels.
        strides: stride of each level's first block.
        channels: channels of each level.
        up_strides: by how much each level's result is made larger; below 1, smaller.
        up_channels: channels of each level's result.
        momentum: of the running statistics; larger for short trainings.
    """

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[int] = (1, 2, 2),
        strides: Sequence[int] = (1, 2, 2),
        channels: Sequence[int] = (128, 128, 256),
        up_strides: Sequence[float] = (1, 2, 4),
        up_channels: Sequence[int] = (128, 128, 128),
        momentum: float = 0.01,
    ) -> None:
        super().__init__(in_channels, layers, strides, channels, up_strides, up_channels, momentum)

    def first_block(self, before: int, after: int, stride: int) -> nn.Module:
        """A basic residual block whose shortcut is a projection."""
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), self.norm(after))
        return _Residual(self._branch(before, after, stride), shortcut)

    def block(self, channels: int) -> nn.Module:
        """A basic residual block."""
        return _Residual(self._branch(channels, channels, 1), nn.Identity())

    def _branch(self, before: int, after: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            self.norm(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            self.norm(after),
        )


class _Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, bev: Tensor) -> Tensor:
        return F.relu(self.branch(bev) + self.shortcut(bev))


def _resample(before: int, after: int, up: float) -> nn.Module:
    """A convolution that makes a map ``up`` times as large, each cell seen once."""
    if up > 1:
        return nn.ConvTranspose2d(before, after, round(up), round(up), bias=False)
    down = round(1 / up)
    return nn.Conv2d(before, after, down, down, bias=False)
