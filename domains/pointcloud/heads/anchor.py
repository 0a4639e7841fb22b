"""SECOND's head: boxes of fixed sizes at every cell, each judged and corrected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..detections import Detections
from ..grid import Grid
from .base import Head, Outputs, check_thresholds, suppress
from .losses import sigmoid_focal
from .matching import AnchorTargets, match_anchors, nearest_iou
from .residuals import decode_residuals, encode_residuals

_PRIOR = 0.01


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """The anchors of one class.

    Attributes:
        size: length, width, height in metres.
        bottom: height of its underside, in metres.
        positive: overlap from which an anchor belongs to an object.
        negative: overlap below which it belongs to none; in between it is not asked.

    Raises:
        ValueError: a size that is not positive, or thresholds that are not 0 < negative ≤ positive ≤ 1.
    """

    size: tuple[float, float, float]
    bottom: float
    positive: float
    negative: float

    def __post_init__(self) -> None:
        if len(self.size) != 3 or min(self.size) <= 0:
            raise ValueError(f"anchor size={self.size} must be a length, width and height above 0")
        if not 0 < self.negative <= self.positive <= 1:
            raise ValueError(
                f"anchor negative={self.negative} and positive={self.positive} must satisfy"
                " 0 < negative ≤ positive ≤ 1"
            )


KITTI_ANCHORS: Mapping[str, Anchor] = {
    "Car": Anchor(size=(3.9, 1.6, 1.56), bottom=-1.78, positive=0.6, negative=0.45),
    "Pedestrian": Anchor(size=(0.8, 0.6, 1.73), bottom=-0.6, positive=0.5, negative=0.35),
    "Cyclist": Anchor(size=(1.76, 0.6, 1.73), bottom=-0.6, positive=0.5, negative=0.35),
}


class AnchorHead(Head):
    """At each cell, for each class and rotation an anchor: the class it shows, its residuals, its direction.

    SECOND (Yan et al. 2018) as LION uses it for KITTI. The middle of an anchor is that of its cell. The loss
    matches anchors to objects of their class by the overlap of the upright rectangles nearest to them.

    Args:
        channels: C of the features.
        classes: names of the classes.
        grid: the voxels below the bird's-eye view.
        stride: voxels along an edge of a cell of the bird's-eye view.
        anchors: those of each class, by name; None takes KITTI's.
        rotations: yaws of the anchors of a cell, radians; multiples of π/2, since the matching is upright.
        class_weight: of the focal loss.
        box_weight: of the residuals' smooth L1 loss.
        direction_weight: of the direction's cross entropy.
        direction_offset: yaw, in radians, where the first of the two half turns begins.
        min_score: least score of a box.
        max_candidates: boxes that compete, the best of a frame.
        max_boxes: boxes given.
        nms: greatest overlap of two boxes: one number for whatever classes, or one for each class apart.

    Raises:
        ValueError: a class without anchors, or rotations that are no quarter turns.
    """

    def __init__(
        self,
        channels: int,
        classes: Sequence[str],
        grid: Grid,
        stride: int,
        *,
        anchors: Mapping[str, Anchor] | None = None,
        rotations: Sequence[float] = (0.0, pi / 2),
        class_weight: float = 1.0,
        box_weight: float = 2.0,
        direction_weight: float = 0.2,
        direction_offset: float = pi / 4,
        min_score: float = 0.1,
        max_candidates: int = 4096,
        max_boxes: int = 500,
        nms: float | Sequence[float] = 0.01,
    ) -> None:
        super().__init__(channels, classes, grid, stride)
        check_thresholds(nms, classes)
        anchors = KITTI_ANCHORS if anchors is None else anchors
        missing = [name for name in classes if name not in anchors]
        if missing:
            raise ValueError(f"anchors has none for {', '.join(missing)}: it has {', '.join(anchors)}")
        turns = torch.tensor(rotations) / (pi / 2)
        if not len(turns) or (turns - turns.round()).abs().max() > 1e-3:
            raise ValueError(f"rotations={list(rotations)} must be one or more multiples of π/2")
        self.anchors = [anchors[name] for name in classes]
        self.class_weight, self.box_weight = class_weight, box_weight
        self.direction_weight, self.direction_offset = direction_weight, direction_offset
        self.min_score, self.max_candidates = min_score, max_candidates
        self.max_boxes, self.nms = max_boxes, nms
        self.register_buffer("shapes", self._shapes(rotations), persistent=False)
        count = len(classes) * len(rotations)
        # For each anchor of a cell.
        self.sizes = {"class": len(classes), "box": 7, "direction": 2}
        self.outputs = nn.ModuleDict(
            {name: nn.Conv2d(channels, count * size, 1) for name, size in self.sizes.items()}
        )
        nn.init.constant_(self.outputs["class"].bias, -torch.tensor(1 / _PRIOR - 1).log())  # type: ignore[arg-type]
        nn.init.normal_(self.outputs["box"].weight, std=0.001)  # type: ignore[arg-type]

    shapes: Tensor

    def forward(self, bev: Tensor) -> Outputs:
        """Maps ``(B, A·n, H, W)``, A anchors a cell: ``class`` logits n = K, ``box`` 7, ``direction`` 2.

        Raises:
            ValueError: features of another shape than the grid's.
        """
        self.check(bev)
        return {name: layer(bev) for name, layer in self.outputs.items()}

    def loss(
        self,
        outputs: Outputs,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        velocities: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss, smooth L1, cross entropy: sums over anchors by a frame's positives, mean of frames."""
        flat = self._flat(outputs)
        parts: dict[str, list[Tensor]] = {"class": [], "box": [], "direction": []}
        for sample, (of, label) in enumerate(zip(boxes, labels)):
            keep = self.learnable(of)
            targets = self.targets(of[keep].float(), label[keep])
            positive, counts = targets.anchor, max(len(targets.anchor), 1)
            logits = flat["class"][sample]
            shown = torch.zeros_like(logits)
            shown[positive, targets.label] = 1
            focal = sigmoid_focal(logits, shown) * targets.asked[:, None]
            parts["class"].append(self.class_weight * focal.sum() / counts)
            found = flat["box"][sample][positive]
            wanted = encode_residuals(targets.boxes, self.anchor_boxes(positive))
            error = torch.cat([found[:, :6] - wanted[:, :6], (found[:, 6:] - wanted[:, 6:]).sin()], 1)
            smooth = F.smooth_l1_loss(error, torch.zeros_like(error), beta=1 / 9, reduction="sum")
            parts["box"].append(self.box_weight * smooth / counts)
            turned = self._half_turns(targets.boxes[:, 6])
            direction = F.cross_entropy(flat["direction"][sample][positive], turned, reduction="sum")
            parts["direction"].append(self.direction_weight * direction / counts)
        return {name: torch.stack(values).mean() for name, values in parts.items()}

    @torch.no_grad()
    def detections(self, outputs: Outputs) -> list[Detections]:
        """The boxes of each frame, best first."""
        flat = self._flat(outputs)
        results = []
        for logits, residuals, direction in zip(flat["class"], flat["box"], flat["direction"]):
            score, label = logits.sigmoid().max(1)
            good = (score > self.min_score).nonzero()[:, 0]
            order = score[good].argsort(descending=True, stable=True)
            best = good[order[: self.max_candidates]]
            boxes = decode_residuals(residuals[best], self.anchor_boxes(best))
            # The residual is known up to half turns only; the direction says which one.
            half = torch.remainder(boxes[:, 6] - self.direction_offset, pi) + self.direction_offset
            yaw = half + pi * direction[best].argmax(1)
            boxes = torch.cat([boxes[:, :6], torch.remainder(yaw[:, None] + pi, 2 * pi) - pi], 1)
            results.append(suppress(Detections(boxes, score[best], label[best]), self.nms, self.max_boxes))
        return results

    def targets(self, boxes: Tensor, labels: Tensor) -> AnchorTargets:
        """Which anchors belong to boxes (M, 7) of one frame with labels (M,)."""
        rotations = len(self.shapes) // len(self.classes)
        parts = []
        for label, anchor in enumerate(self.anchors):
            rows = (labels == label).nonzero()[:, 0]
            first = label * rotations
            overlap = nearest_iou(self._centres(), self.shapes[first : first + rotations], boxes[rows])
            parts.append(match_anchors(overlap, anchor.positive, anchor.negative))
        # (H, W, A): anchors of a cell are numbered class by class, then rotation by rotation.
        asked = torch.cat([part.asked for part in parts], 2).flatten()
        per_cell = len(self.shapes)
        number = [
            part.anchor // rotations * per_cell + label * rotations + part.anchor % rotations
            for label, part in enumerate(parts)
        ]
        shown = [torch.full_like(part.anchor, label) for label, part in enumerate(parts)]
        owner = [boxes[labels == label][part.object] for label, part in enumerate(parts)]
        return AnchorTargets(torch.cat(number), torch.cat(shown), torch.cat(owner), asked)

    def anchor_boxes(self, anchor: Tensor) -> Tensor:
        """Anchors (P,), numbered by row, column and place in the cell, as boxes ``(P, 7)``."""
        per_cell = len(self.shapes)
        x, y = self._centres()
        cell = anchor // per_cell
        shape = self.shapes[anchor % per_cell]
        place = torch.stack([x[cell % self.width], y[cell // self.width]], 1)
        return torch.cat([place, shape], 1)

    def _flat(self, outputs: Outputs) -> Outputs:
        """Outputs as ``(B, H·W·A, n)`` float32."""
        return {
            name: outputs[name].float().permute(0, 2, 3, 1).reshape(len(outputs[name]), -1, size)
            for name, size in self.sizes.items()
        }

    def _centres(self) -> tuple[Tensor, Tensor]:
        """x of each column ``(W,)`` and y of each row ``(H,)``, metres."""
        step = torch.arange(max(self.height, self.width), device=self.shapes.device) + 0.5
        x = self.grid.low[0] + step[: self.width] * self.cell[0]
        return x, self.grid.low[1] + step[: self.height] * self.cell[1]

    def _shapes(self, rotations: Sequence[float]) -> Tensor:
        """Of each anchor of a cell z, dx, dy, dz, yaw: ``(A, 5)``, class by class."""
        return torch.tensor(
            [
                (anchor.bottom + anchor.size[2] / 2, *anchor.size, rotation)
                for anchor in self.anchors
                for rotation in rotations
            ]
        )

    def _half_turns(self, yaw: Tensor) -> Tensor:
        """Which half turn from ``direction_offset`` on a yaw lies in: 0 or 1."""
        return (torch.remainder(yaw - self.direction_offset, 2 * pi) >= pi).long()
