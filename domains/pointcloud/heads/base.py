"""What every detection head is: maps from the bird's-eye view, a loss, and boxes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..detections import Detections
from ..grid import Grid
from ..overlap import nms

Outputs = dict[str, Tensor]


class Head(nn.Module, ABC):
    """From features of the bird's-eye view to boxes.

    Args:
        channels: C of the features ``(B, C, H, W)``; H is y, W is x.
        classes: names of the classes.
        grid: the voxels below the bird's-eye view.
        stride: voxels along an edge of a cell of the bird's-eye view.

    Raises:
        ValueError: no class, a class named twice, or a grid that ``stride`` does not divide.
    """

    def __init__(self, channels: int, classes: Sequence[str], grid: Grid, stride: int) -> None:
        super().__init__()
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes={list(classes)} must be one or more different names")
        _, height, width = grid.size
        if stride < 1 or height % stride or width % stride:
            raise ValueError(f"stride={stride} must divide the {height}×{width} voxels seen from above")
        self.channels, self.classes, self.grid, self.stride = channels, tuple(classes), grid, stride
        self.height, self.width = height // stride, width // stride
        self.cell = (grid.voxel[0] * stride, grid.voxel[1] * stride)

    @abstractmethod
    def forward(self, bev: Tensor) -> Outputs:
        """Raw maps of the head, by name."""

    @abstractmethod
    def loss(
        self,
        outputs: Outputs,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        velocities: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Named parts of the loss, weighted; their sum is to be minimised.

        Boxes whose centre lies outside the grid seen from above, or that have no extent, are ignored.

        Args:
            outputs: of `forward`.
            boxes: for each of the B frames ``(M, 7)``.
            labels: for each frame int64 ``(M,)``, places in the list of classes.
            velocities: for each frame ``(M, 2)`` m/s, NaN where unknown.
        """

    @abstractmethod
    def detections(self, outputs: Outputs) -> list[Detections]:
        """The boxes of each frame, best first."""

    def check(self, bev: Tensor) -> None:
        """Refuse a bird's-eye view of another shape than ``(B, C, H, W)`` of this head.

        Raises:
            ValueError: that is so.
        """
        expected = (self.channels, self.height, self.width)
        if bev.ndim != 4 or bev.shape[1:] != expected:
            raise ValueError(
                f"the head expects features (B, {', '.join(map(str, expected))}) with stride {self.stride},"
                f" got {tuple(bev.shape)}"
            )

    def learnable(self, boxes: Tensor) -> Tensor:
        """Which of ``boxes`` (M, 7) the loss uses: ``(M,)`` booleans; NaN never."""
        low, high = boxes.new_tensor(self.grid.low[:2]), boxes.new_tensor(self.grid.high[:2])
        inside = (boxes[:, :2] >= low) & (boxes[:, :2] < high)
        return inside.all(1) & (boxes[:, 3:6] > 0).all(1) & boxes.isfinite().all(1)

    def places(self, boxes: Tensor) -> Tensor:
        """Where the centres of ``boxes`` (M, 7) lie, in cells: ``(M, 2)`` as x, y; a cell's middle is ½."""
        return (boxes[:, :2] - boxes.new_tensor(self.grid.low[:2])) / boxes.new_tensor(self.cell)


def suppress(found: Detections, thresholds: float | Sequence[float], limit: int) -> Detections:
    """Keep the best of boxes that overlap, best first.

    Args:
        found: M boxes.
        thresholds: greatest overlap seen from above (rotated IoU) of two kept boxes: one number for boxes of
            whatever class, or one for each class, boxes of different classes not disturbing each other.
        limit: most boxes kept.
    """
    if isinstance(thresholds, float | int):
        return found[nms(found.boxes, found.scores, float(thresholds), limit=limit)]
    kept = []
    for label, threshold in enumerate(thresholds):
        rows = (found.labels == label).nonzero()[:, 0]
        kept.append(rows[nms(found.boxes[rows], found.scores[rows], threshold, limit=limit)])
    rows = torch.cat(kept)
    return found[rows[found.scores[rows].argsort(descending=True, stable=True)[:limit]]]


def check_thresholds(thresholds: float | Sequence[float], classes: Sequence[str]) -> None:
    """Refuse thresholds of `suppress` that do not belong to ``classes``.

    Raises:
        ValueError: another number of them, or one outside 0 to 1.
    """
    values = [thresholds] if isinstance(thresholds, float | int) else list(thresholds)
    several = not isinstance(thresholds, float | int)
    if any(not 0 <= value <= 1 for value in values) or (several and len(values) != len(classes)):
        raise ValueError(
            f"nms={thresholds} must be one number from 0 to 1, or one for each of the {len(classes)} classes"
        )
