"""Where a voxel is, as features: what a group RNN otherwise would not know."""

from math import pi

import torch
from torch import Tensor, nn

from .vfe import RowNorm
from .voxels import Voxels


class PositionEmbedding(nn.Module):
    """A small network over the coordinates of a voxel (LION, section 3.2; DSVT's, arXiv:2301.06051).

    Coordinates are scaled to ``[-π, π)`` over the grid that the voxels have now. Along an axis of one cell
    they are zero.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(3, dim), RowNorm(dim, eps=1e-5, momentum=0.1), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, voxels: Voxels) -> Tensor:
        """Give features ``(N, C)`` for the voxels' index."""
        size = torch.tensor(voxels.size, device=voxels.index.device)
        place = (voxels.index[:, 1:] - size / 2) / size * (2 * pi)
        place = torch.where(size > 1, place, 0.0).flip(1)  # x, y, z
        embedded: Tensor = self.mlp(place.to(next(self.parameters()).dtype))
        return embedded
