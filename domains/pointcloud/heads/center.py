"""CenterPoint's head: objects as peaks of a heat map, and what else is known of them read off at the peak."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..detections import Detections
from ..grid import Grid
from .base import Outputs, check_thresholds, suppress
from .codes import CentreCodes, convolution, heatmap_tower, rectify


class CenterHead(CentreCodes):
    """One heat map a class; offset, height, size, heading, and optionally IoU and velocity at each cell.

    CenterPoint (Yin et al. 2021) as LION uses it for Waymo (``iou_power=(0.68, 0.71, 0.65)``,
    ``nms=(0.75, 0.6, 0.55)``) and ONCE (``iou=False, box_weight=1, nms=0.01``). Where the IoU that a box
    reaches is predicted, its score is s^(1 − α)·IoU^α (CIA-SSD, Zheng et al. 2021).

    Args:
        channels: C of the features.
        classes: names of the classes.
        grid: the voxels below the bird's-eye view.
        stride: voxels along an edge of a cell of the bird's-eye view.
        width: channels inside the head.
        separate: a tower of its own for each kind of output; else one for the heat map and one for the rest,
            which is cheaper.
        iou: predict the overlap that each box reaches.
        velocity: predict velocities.
        axis: code a heading's axis apart from its direction; not LION's, but it learns faster where the
            points do not tell front from back.
        min_overlap: from which the radius of the Gaussians follows.
        min_radius: least radius, in cells.
        box_weight: of the boxes' error in the loss.
        velocity_weight: of the velocities' error, beside the boxes' own.
        max_boxes: peaks that are looked at, and boxes given.
        min_score: least score of a peak.
        iou_power: α, one number or one for each class.
        nms: greatest overlap of two boxes: one number for whatever classes, or one for each class apart.
    """

    def __init__(
        self,
        channels: int,
        classes: Sequence[str],
        grid: Grid,
        stride: int,
        *,
        width: int = 64,
        separate: bool = True,
        iou: bool = True,
        velocity: bool = False,
        axis: bool = False,
        min_overlap: float = 0.1,
        min_radius: int = 2,
        box_weight: float = 2.0,
        velocity_weight: float = 0.2,
        max_boxes: int = 500,
        min_score: float = 0.1,
        iou_power: float | Sequence[float] = 0.68,
        nms: float | Sequence[float] = 0.2,
    ) -> None:
        super().__init__(channels, classes, grid, stride)
        check_thresholds(nms, classes)
        self.min_overlap, self.min_radius, self.axis = min_overlap, min_radius, axis
        self.box_weight, self.velocity_weight = box_weight, velocity_weight
        self.max_boxes, self.min_score, self.nms = max_boxes, min_score, nms
        powers = [iou_power] * len(classes) if isinstance(iou_power, float | int) else list(iou_power)
        if len(powers) != len(classes) or any(not 0 <= power <= 1 for power in powers):
            raise ValueError(
                f"iou_power={iou_power} must be one number from 0 to 1,"
                f" or one for each of the {len(classes)} classes"
            )
        self.register_buffer("iou_power", torch.tensor(powers), persistent=False)
        sizes = {"offset": 2, "height": 1, "size": 3, "heading": 2}
        sizes |= {"direction": 1} if axis else {}
        sizes |= {"iou": 1} if iou else {}
        sizes |= {"velocity": 2} if velocity else {}
        self.sizes = sizes
        self.shared = convolution(channels, width)
        groups = {name: [size] for name, size in sizes.items()} if separate else {"box": list(sizes.values())}
        self.towers = nn.ModuleDict(
            {
                name: nn.Sequential(convolution(width, width), nn.Conv2d(width, sum(group), 3, padding=1))
                for name, group in groups.items()
            }
        )
        self.towers["heatmap"] = heatmap_tower(width, len(classes))

    iou_power: Tensor

    def forward(self, bev: Tensor) -> Outputs:
        """Maps ``(B, ·, H, W)``: the heat map's logits, and every kind of output by name.

        Raises:
            ValueError: features of another shape than the grid's.
        """
        self.check(bev)
        shared = self.shared(bev)
        outputs: Outputs = {name: tower(shared) for name, tower in self.towers.items()}
        if "box" in outputs:
            parts = torch.split(outputs.pop("box"), list(self.sizes.values()), 1)
            outputs |= dict(zip(self.sizes, parts))
        return outputs

    def loss(
        self,
        outputs: Outputs,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        velocities: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss of the heat map; L1 of the codes, summed, a mean over objects; L1 of 2·IoU − 1."""
        objects = self.objects(boxes, labels, velocities)
        codes = self.codes(outputs, objects.sample, objects.cells)
        errors = self.code_losses(codes, objects.cells, objects.boxes, objects.velocities)
        weights = {"box": self.box_weight, "velocity": self.box_weight * self.velocity_weight}
        parts = {name: weights.get(name, 1.0) * error for name, error in errors.items()}
        return {"heatmap": self.heatmap_loss(outputs["heatmap"], objects)} | parts

    @torch.no_grad()
    def detections(self, outputs: Outputs) -> list[Detections]:
        """The boxes of each frame, best first."""
        heat = outputs["heatmap"].float().sigmoid()
        B, _, H, W = heat.shape
        best, place = heat.flatten(1).topk(min(self.max_boxes, heat[0].numel()))
        results = []
        for sample in range(B):
            good = best[sample] > self.min_score
            scores, label = best[sample][good], place[sample][good] // (H * W)
            cell = place[sample][good] % (H * W)
            cells = torch.stack([cell % W, cell // W], 1)
            codes = self.codes(outputs, torch.full_like(label, sample), cells)
            if "iou" in codes:
                scores = rectify(scores, codes["iou"][:, 0], self.iou_power[label])
            found = Detections(self.decode(codes, cells), scores, label, codes.get("velocity"))
            results.append(suppress(found, self.nms, self.max_boxes))
        return results

    def codes(self, outputs: Outputs, sample: Tensor, cells: Tensor) -> dict[str, Tensor]:
        """What the maps say at cells (M, 2) as x, y: ``(M, ·)`` float32 by name."""
        x, y = cells.unbind(1)
        return {name: outputs[name][sample, :, y, x].float() for name in self.sizes}
