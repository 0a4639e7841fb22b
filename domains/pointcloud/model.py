"""The detector: points to voxels, LION over the voxels, the bird's-eye view, and a head."""

from collections.abc import Callable, Sequence
from math import ceil

from torch import Tensor, nn

from ...core import BackboneConfig
from .batch import SceneBatch
from .bev import BEVBackbone, to_bev
from .detections import Detections
from .grid import Grid
from .heads.base import Head, Outputs
from .heads.sparse_center import SparseCenterHead
from .lion import Lion
from .vfe import VoxelFeatureEncoder

MakeLion = Callable[[BackboneConfig], Lion]
MakeBEV = Callable[[int], BEVBackbone]
MakeHead = Callable[[int, Sequence[str], Grid, int], Head]


class Detector(nn.Module):
    """From points to boxes.

    Args:
        backbone: the group RNNs.
        grid: range and voxels.
        classes: K names.
        features: F, the features of a point besides x, y and z.
        lion: makes the 3D backbone of ``backbone``.
        bev: makes the 2D backbone for a number of channels; ``None`` where the head takes the voxels.
        head: makes the head for channels, classes, grid and stride.
        momentum: of the running statistics of the voxel feature encoder.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        grid: Grid,
        classes: Sequence[str],
        features: int,
        lion: MakeLion,
        bev: MakeBEV | None,
        head: MakeHead,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.encoder = VoxelFeatureEncoder(grid, features, backbone.dim, momentum)
        self.lion = lion(backbone)
        halvings = len(self.lion.merges) + (self.lion.flatten is not None)
        self.bev = None if bev is None else bev(backbone.dim * ceil(grid.size[0] / 2**halvings))
        channels, stride = (backbone.dim, 1) if self.bev is None else (self.bev.out_channels, self.bev.stride)
        self.head = head(channels, tuple(classes), grid, stride)
        if isinstance(self.head, SparseCenterHead) != (self.bev is None):
            raise ValueError("bev=null belongs to a SparseCenterHead, and any other head needs a bev")

    def forward(self, batch: SceneBatch) -> Outputs:
        """Raw maps of the head for B frames."""
        voxels = self.encoder(batch.points, batch.sample, len(batch))
        voxels = self.lion(voxels)
        outputs: Outputs = self.head(voxels if self.bev is None else self.bev(to_bev(voxels)))
        return outputs

    def loss(self, outputs: Outputs, batch: SceneBatch) -> dict[str, Tensor]:
        """Named parts of the loss; see `Head.loss`."""
        return self.head.loss(outputs, batch.boxes, batch.labels, batch.velocities)

    def detections(self, outputs: Outputs) -> list[Detections]:
        """The boxes of each frame, best first."""
        return self.head.detections(outputs)
