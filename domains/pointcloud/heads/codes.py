"""What heads that find objects by their centres share: heat maps, and boxes as codes at a place."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import wrap_angle
from ..overlap import paired_iou_3d
from .base import Head
from .heatmap import draw_heatmap, gaussian_radius
from .losses import heatmap_focal

# A tenth at the start, so that the many empty cells do not drown the rest.
PRIOR = -2.19
# No object is longer than 100 m; keeps an untrained network's sizes finite.
_MAX_LOG_SIZE = log(100)
# Of the direction's loss, SECOND's.
_DIRECTION_WEIGHT = 0.2
# An axis turns into its opposite here, far from the ways along and across that most objects face.
_SEAM = -pi / 4


@dataclass(frozen=True)
class Objects:
    """M labelled objects of all frames of a batch.

    Attributes:
        boxes: ``(M, 7)``.
        labels: int64 ``(M,)``.
        velocities: ``(M, 2)``, NaN where unknown.
        sample: int64 ``(M,)``: which frame an object belongs to.
        cells: int64 ``(M, 2)``: x and y of the cell of its centre.
    """

    boxes: Tensor
    labels: Tensor
    velocities: Tensor
    sample: Tensor
    cells: Tensor


class CentreCodes(Head):
    """A head with a heat map of centres, that codes boxes by offset, height, size and heading."""

    min_overlap: float
    min_radius: int
    axis: bool = False
    """Code the heading as its axis, (cos 2θ, sin 2θ), and apart from it which of the two ways it faces.

    As (cos θ, sin θ) an object whose front is not seen has no good code: the mean of its two is zero, and
    the axis is lost with the direction.
    """

    def heatmap_loss(self, logits: Tensor, objects: Objects) -> Tensor:
        """Focal loss of the heat map's logits ``(B, K, H, W)``."""
        radius = self.radius(objects.boxes)
        shape = (len(logits), len(self.classes), self.height, self.width)
        target = draw_heatmap(shape, objects.sample, objects.labels, objects.cells, radius)
        return heatmap_focal(logits.float(), target)

    def radius(self, boxes: Tensor) -> Tensor:
        """Radii of the Gaussians of boxes (M, 7), in cells: int64 ``(M,)``."""
        extent = boxes[:, 3:5] / boxes.new_tensor(self.cell)
        return gaussian_radius(extent, self.min_overlap).long().clamp_min(self.min_radius)

    def code_losses(
        self, codes: dict[str, Tensor], places: Tensor, boxes: Tensor, velocities: Tensor
    ) -> dict[str, Tensor]:
        """Errors of M objects' codes, each a mean over objects.

        Args:
            codes: what the network says at ``places``, ``(M, ·)`` by name.
            places: ``(M, 2)``, to which the offsets belong.
            boxes: ``(M, 7)`` of the objects.
            velocities: ``(M, 2)``, NaN where unknown.

        Returns:
            ``box``, the L1 of the codes, summed; where predicted, ``velocity``, the same of the known ones,
            ``direction``, a cross entropy, and ``iou``, the L1 to 2·IoU − 1 of the decoded box.
        """
        wanted = self.encode(boxes, places)
        direction = wanted.pop("direction", None)
        count = max(len(boxes), 1)
        parts = {
            "box": torch.stack([(codes[name] - wanted[name]).abs().sum() for name in wanted]).sum() / count
        }
        if direction is not None:
            entropy = F.binary_cross_entropy_with_logits(codes["direction"], direction, reduction="sum")
            parts["direction"] = _DIRECTION_WEIGHT * entropy / count
        if "velocity" in codes:
            known = velocities.isfinite()
            error = torch.where(known, codes["velocity"] - velocities.nan_to_num(), 0).abs()
            parts["velocity"] = error.sum() / known.all(1).sum().clamp_min(1)
        if "iou" in codes:
            with torch.no_grad():
                reached = paired_iou_3d(self.decode(codes, places), boxes)
            parts["iou"] = (codes["iou"][:, 0] - (2 * reached - 1)).abs().sum() / count
        return parts

    def objects(
        self, boxes: Sequence[Tensor], labels: Sequence[Tensor], velocities: Sequence[Tensor]
    ) -> Objects:
        """The objects of all frames that the loss uses."""
        kept = [self.learnable(of) for of in boxes]
        joined = torch.cat([of[keep] for of, keep in zip(boxes, kept)]).float()
        sample = torch.cat(
            [torch.full_like(of[keep], row) for row, (of, keep) in enumerate(zip(labels, kept))]
        )
        cells = self.places(joined).floor().long()
        # Rounding may lift a centre just below the upper border over it.
        cells = torch.minimum(cells, cells.new_tensor([self.width, self.height]) - 1)
        return Objects(
            joined,
            torch.cat([of[keep] for of, keep in zip(labels, kept)]),
            torch.cat([of[keep] for of, keep in zip(velocities, kept)]).float(),
            sample,
            cells,
        )

    def encode(self, boxes: Tensor, places: Tensor) -> dict[str, Tensor]:
        """Codes ``(M, ·)`` of boxes (M, 7) at places (M, 2), in cells: inverse of `decode`."""
        yaw = boxes[:, 6:]
        codes = {
            "offset": self.places(boxes) - places,
            "height": boxes[:, 2:3],
            "size": boxes[:, 3:6].log(),
        }
        if not self.axis:
            return codes | {"heading": torch.cat([yaw.cos(), yaw.sin()], 1)}
        heading = torch.cat([(2 * yaw).cos(), (2 * yaw).sin()], 1)
        forward = (yaw - axis_of(heading)).cos() > 0
        return codes | {"heading": heading, "direction": forward.to(yaw.dtype)}

    def decode(self, codes: dict[str, Tensor], places: Tensor) -> Tensor:
        """Boxes ``(M, 7)`` of codes at places (M, 2)."""
        offset = codes["offset"]
        centre = (places + offset) * offset.new_tensor(self.cell) + offset.new_tensor(self.grid.low[:2])
        if self.axis:
            axis = axis_of(codes["heading"])
            yaw = wrap_angle(torch.where(codes["direction"] > 0, axis, axis + pi))
        else:
            yaw = torch.atan2(codes["heading"][:, 1:], codes["heading"][:, :1])
        size = codes["size"].clamp_max(_MAX_LOG_SIZE).exp()
        return torch.cat([centre, codes["height"], size, yaw], 1)


def axis_of(heading: Tensor) -> Tensor:
    """The angle, from −π/4 to 3π/4, whose double has the cosine and sine ``heading`` (M, 2): ``(M, 1)``."""
    cosine, sine = heading[:, :1], heading[:, 1:]
    # Turned by twice the seam, so that the arc tangent's own seam falls on it.
    turned = torch.atan2(-cosine, sine)
    return (turned + pi) / 2 + _SEAM


def rectify(scores: Tensor, iou: Tensor, power: Tensor | float) -> Tensor:
    """s^(1 − α)·IoU^α of scores s (M,) and the predicted 2·IoU − 1 (M,): CIA-SSD, Zheng et al. 2021."""
    return scores.pow(1 - power) * ((iou + 1) / 2).clamp(0, 1).pow(power)


def heatmap_tower(channels: int, classes: int) -> nn.Sequential:
    """From features to the logits of a heat map, whose start is a tenth everywhere."""
    last = nn.Conv2d(channels, classes, 3, padding=1)
    nn.init.constant_(last.bias, PRIOR)  # type: ignore[arg-type]
    return nn.Sequential(convolution(channels, channels), last)


def convolution(before: int, after: int) -> nn.Sequential:
    """Convolution, normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
