"""Sparse voxels: the occupied cells of a grid, of all samples of a batch."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Voxels:
    """N occupied voxels of B samples.

    Attributes:
        features: ``(N, C)``.
        index: int64 ``(N, 4)``: sample, z, y, x; each row once, in ascending order.
        size: cells along z, y and x: ``(D, H, W)``.
        batch: B; a sample may have no voxel.
        plans: what was worked out from the same index and may be used again (neighbours, orders), by name.
    """

    features: Tensor
    index: Tensor
    size: tuple[int, int, int]
    batch: int
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def with_features(self, features: Tensor) -> "Voxels":
        """The same voxels with other features; they share the plans."""
        return replace(self, features=features)

    @property
    def key(self) -> Tensor:
        """One number for each voxel, in ascending order: int64 ``(N,)``."""
        return voxel_key(self.index, self.size)

    @property
    def counts(self) -> Tensor:
        """Voxels of each sample: int64 ``(B,)``."""
        return torch.bincount(self.index[:, 0], minlength=self.batch)


def voxel_key(index: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Number of each voxel ``index`` (N, 4), counted sample by sample, x fastest: int64 ``(N,)``."""
    depth, height, width = size
    sample, z, y, x = index.unbind(1)
    return ((sample * depth + z) * height + y) * width + x


def voxel_index(key: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Undo `voxel_key`: int64 ``(N, 4)``."""
    depth, height, width = size
    x, rest = key % width, key // width
    y, rest = rest % height, rest // height
    return torch.stack([rest // depth, rest % depth, y, x], 1)
