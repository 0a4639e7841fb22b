"""From points to voxels: one learned feature vector for each occupied cell, of however many points."""

# PyTorch leaves the calls of its autograd functions untyped.
# mypy: allow-untyped-calls

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .grid import Grid
from .voxels import Voxels, voxel_index, voxel_key


class _Highest(torch.autograd.Function):
    """Maximum over the points of each voxel; points that share it share its gradient.

    `segment_reduce` has a gradient too, several times slower.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, voxel: Tensor, counts: Tensor) -> Tensor:
        highest = _segment(points, "max", counts)
        ctx.save_for_backward(points, highest, voxel, counts)
        return highest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        points, highest, voxel, counts = ctx.saved_tensors
        share = (points == highest.index_select(0, voxel)).to(grad.dtype)
        grad = grad / _segment(share, "sum", counts)
        return share.mul_(grad.index_select(0, voxel)), None, None


def _segment(rows: Tensor, reduce: Literal["max", "mean", "sum"], counts: Tensor) -> Tensor:
    """Reduce the first ``counts[0]`` of ``rows`` (P, C), the next ``counts[1]``, and so on: ``(N, C)``."""
    # Its checks refuse an empty cloud.
    return torch.segment_reduce(rows, reduce, lengths=counts, unsafe=True)


class RowNorm(nn.BatchNorm1d):
    """BatchNorm over rows ``(N, C)``; fewer than two rows in training use the running statistics."""

    def __init__(self, channels: int, eps: float = 1e-3, momentum: float = 0.01) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (N, C)."""
        if len(input) > 1 or not self.training:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class PointLayer(nn.Module):
    """ReLU(BatchNorm(Linear(x))) of each point, and its maximum over the points of each voxel.

    Args:
        inputs: features of a point.
        outputs: features of a point and of a voxel.
        momentum: of the running statistics.
    """

    def __init__(self, inputs: int, outputs: int, momentum: float = 0.01) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = RowNorm(outputs, momentum=momentum)

    def forward(self, points: Tensor, voxel: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``points`` (P, inputs) to outputs of the points and of the N voxels.

        Args:
            points: sorted by voxel.
            voxel: int64 ``(P,)``: the voxel of each.
            counts: int64 ``(N,)``: the points of each voxel.
        """
        points = F.relu(self.norm(self.linear(points)))
        highest: Tensor = _Highest.apply(points, voxel, counts)
        return points, highest


class VoxelFeatureEncoder(nn.Module):
    """Dynamic voxel feature encoder: no limit on points or voxels (Zhou et al. 2020, MVF; as in LION).

    A point enters with its coordinates and features, its offset from the mean of its voxel's points and its
    offset from the voxel's centre. Two layers follow; between them every point gets its voxel's maximum.
    Points outside the grid are dropped.

    Args:
        grid: range and voxels.
        features: F, the features of a point besides x, y and z.
        channels: C, even.
        momentum: of the running statistics; larger for short trainings.

    Raises:
        ValueError: ``channels`` is odd or not positive.
    """

    def __init__(self, grid: Grid, features: int, channels: int, momentum: float = 0.01) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be a positive even number, got {channels}")
        self.grid, self.features, self.channels = grid, features, channels
        self.first = PointLayer(3 + features + 6, channels // 2, momentum)
        self.second = PointLayer(channels, channels, momentum)

    def forward(self, points: Tensor, sample: Tensor, batch: int) -> Voxels:
        """Encode points.

        Args:
            points: ``(N, 3 + F)``: x, y, z in metres, features.
            sample: int64 ``(N,)``: the sample of each point, below ``batch``.
            batch: B; a sample may have no point.

        Raises:
            ValueError: ``points`` has another number of columns.
        """
        if points.ndim != 2 or points.shape[1] != 3 + self.features:
            raise ValueError(
                f"points must be (N, {3 + self.features}): x, y, z and {self.features} features;"
                f" got {tuple(points.shape)}"
            )
        size = self.grid.size
        inside = self.grid.inside(points)
        points, sample = points[inside], sample[inside]
        point_key = voxel_key(torch.cat([sample[:, None], self.grid.cells(points)], 1), size)
        point_key, order = point_key.sort(stable=True)
        points = points[order]
        key, voxel, counts = torch.unique_consecutive(point_key, return_inverse=True, return_counts=True)
        index = voxel_index(key, size)

        xyz = points[:, :3]
        mean = _segment(xyz, "mean", counts)
        centre = self.grid.centres(index[:, 1:]).to(xyz.dtype)
        x = torch.cat([points, xyz - mean[voxel], xyz - centre[voxel]], 1)
        x, highest = self.first(x, voxel, counts)
        _, highest = self.second(torch.cat([x, highest[voxel]], 1), voxel, counts)
        return Voxels(highest, index, size, batch)
