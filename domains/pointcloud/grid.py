"""The grid of voxels over the range that is looked at."""

from dataclasses import dataclass
from math import isclose, isfinite

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """A box of space cut into voxels; all in metres, in the order x, y, z.

    Attributes:
        low: corner with the smallest coordinates, which belongs to the grid.
        high: opposite corner, which does not.
        voxel: edges of a voxel.

    Raises:
        ValueError: the range is empty or endless, or not a whole number of voxels along each axis.
    """

    low: Triple
    high: Triple
    voxel: Triple

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.voxel) == 3:
            raise ValueError(
                "grid: low, high and voxel need one number for each of x, y and z,"
                f" got {self.low}, {self.high} and {self.voxel}"
            )
        for axis, low, high, edge in zip("xyz", self.low, self.high, self.voxel):
            if not (edge > 0 and high > low and isfinite(high - low)):
                raise ValueError(
                    f"grid: along {axis} the range {low}…{high} m with voxels of {edge} m is empty or endless"
                )
            count = (high - low) / edge
            if round(count) < 1 or not isclose(count, round(count), abs_tol=1e-3):
                raise ValueError(
                    f"grid: along {axis} the range {low}…{high} m holds {count:.3f} voxels of {edge} m:"
                    f" give a whole number, such as {low}…{low + max(1, round(count)) * edge:g}"
                )

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels along z, y and x: ``(D, H, W)``."""
        nx, ny, nz = (round((h - l) / v) for l, h, v in zip(self.low, self.high, self.voxel))
        return nz, ny, nx

    def inside(self, points: Tensor) -> Tensor:
        """Which of ``points`` (N, 3+F) lie in the range: ``(N,)`` booleans; NaN does not."""
        xyz = points[:, :3]
        return ((xyz >= xyz.new_tensor(self.low)) & (xyz < xyz.new_tensor(self.high))).all(1)

    def cells(self, points: Tensor) -> Tensor:
        """Voxel ``(z, y, x)`` of each of ``points`` (N, 3+F) that lie inside: int64 ``(N, 3)``."""
        xyz = points[:, :3]
        cells = torch.floor((xyz - xyz.new_tensor(self.low)) / xyz.new_tensor(self.voxel)).long().flip(1)
        # A point just below the upper corner may round up to it.
        return torch.minimum(cells, cells.new_tensor(self.size) - 1)

    def centres(self, cells: Tensor) -> Tensor:
        """Centre ``(x, y, z)`` of the voxels ``cells`` (N, 3) as z, y, x: float32 ``(N, 3)`` metres."""
        places = cells.flip(1).float() + 0.5
        return places * places.new_tensor(self.voxel) + places.new_tensor(self.low)
