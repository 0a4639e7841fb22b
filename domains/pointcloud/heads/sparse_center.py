"""The centre head over occupied cells only, for ranges whose bird's-eye view is too large to be dense."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..detections import Detections
from ..grid import Grid
from ..sparse_conv import SubMConv3d
from ..voxels import Voxels
from .base import Outputs, check_thresholds, suppress
from .codes import PRIOR, CentreCodes, Objects, rectify
from .losses import heatmap_focal


class SparseCenterHead(CentreCodes):
    """Heat map, offset, height, size, heading, and optionally IoU and velocity at each occupied cell.

    VoxelNeXt (Chen et al. 2023), as LION uses it for Argoverse 2. An object belongs to the occupied cell
    nearest to its centre; those of a frame without any cell are ignored. Groups of classes have towers of
    their own, and overlap is looked for inside a group only.

    Args:
        channels: C of the voxels' features.
        classes: names of the classes.
        grid: the voxels that the points were put into.
        stride: those voxels along an edge, seen from above, of the ones that the head gets.
        groups: names of the classes of each group; one group of all by default.
        width: channels inside the head.
        iou: predict the overlap that each box reaches.
        velocity: predict velocities.
        min_overlap: from which the radius of the Gaussians follows.
        min_radius: least radius, in cells.
        box_weight: of the boxes' error in the loss.
        velocity_weight: of the velocities' error, beside the boxes' own.
        candidates: peaks of a group that are looked at.
        max_boxes: boxes of a group that are given.
        min_score: least score of a peak.
        iou_power: α of the score s^(1 − α)·IoU^α.
        nms: greatest overlap of two boxes of a group.

    Raises:
        ValueError: groups that do not hold each class once.
    """

    def __init__(
        self,
        channels: int,
        classes: Sequence[str],
        grid: Grid,
        stride: int,
        *,
        groups: Sequence[Sequence[str]] | None = None,
        width: int = 64,
        iou: bool = False,
        velocity: bool = False,
        min_overlap: float = 0.1,
        min_radius: int = 2,
        box_weight: float = 0.25,
        velocity_weight: float = 0.2,
        candidates: int = 500,
        max_boxes: int = 83,
        min_score: float = 0.1,
        iou_power: float = 0.5,
        nms: float = 0.2,
    ) -> None:
        super().__init__(channels, classes, grid, stride)
        check_thresholds(nms, classes)
        groups = [classes] if groups is None else groups
        if sorted(name for group in groups for name in group) != sorted(classes) or not all(groups):
            raise ValueError(
                f"groups={[list(group) for group in groups]} must hold each of {', '.join(classes)} once"
            )
        self.min_overlap, self.min_radius = min_overlap, min_radius
        self.weights = {"box": box_weight, "velocity": box_weight * velocity_weight, "iou": 1.0}
        self.candidates, self.max_boxes = candidates, max_boxes
        self.min_score, self.iou_power, self.nms = min_score, iou_power, nms
        # Places in the list of classes, group by group.
        self.groups = [[self.classes.index(name) for name in group] for group in groups]
        self.sizes = {"offset": 2, "height": 1, "size": 3, "heading": 2}
        self.sizes |= {"iou": 1} if iou else {}
        self.sizes |= {"velocity": 2} if velocity else {}
        self.shared = _Convolution(channels, width)
        self.towers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: nn.ModuleList([_Convolution(width, width), nn.Linear(width, size)])
                    for name, size in {"heatmap": len(group), **self.sizes}.items()
                }
            )
            for group in self.groups
        )
        for towers in self.towers:
            nn.init.constant_(towers["heatmap"][1].bias, PRIOR)  # type: ignore[index]

    # Not the dense view that other heads get.
    def forward(self, voxels: Voxels) -> Outputs:  # type: ignore[override]
        """What is said of N occupied cells.

        Args:
            voxels: features ``(N, C)`` on a grid ``(1, H, W)``.

        Returns:
            ``index`` int64 (N, 4), ``frames`` int64 (B,) the number of cells of each, and ``(N, ·)`` by group
            and name, such as ``0/heatmap`` and ``0/offset``.

        Raises:
            ValueError: voxels of another grid or other features than the head's.
        """
        expected = (1, self.height, self.width)
        if voxels.size != expected or voxels.features.shape[1] != self.channels:
            raise ValueError(
                f"the head expects voxels of {self.channels} features on a grid {expected},"
                f" got {voxels.features.shape[1]} on {voxels.size}"
            )
        shared = self.shared(voxels)
        outputs: Outputs = {"index": voxels.index, "frames": voxels.counts}
        for number, towers in enumerate(self.towers):
            for name, (first, last) in towers.items():  # type: ignore[operator]
                outputs[f"{number}/{name}"] = last(first(shared).features)
        return outputs

    def loss(
        self,
        outputs: Outputs,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        velocities: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss of the heat maps and errors of the objects' codes, each summed over the groups."""
        objects = self.objects(boxes, labels, velocities)
        owner, heatmap = self.targets(outputs, objects)
        cells = outputs["index"][:, [3, 2]]
        totals: dict[str, list[Tensor]] = {}
        for number, group in enumerate(self.groups):
            logits = outputs[f"{number}/heatmap"].float()
            totals.setdefault("heatmap", []).append(heatmap_focal(logits, heatmap[:, group]))
            mine = torch.isin(objects.labels, objects.labels.new_tensor(group)) & (owner >= 0)
            at = owner[mine]
            codes = {name: outputs[f"{number}/{name}"][at].float() for name in self.sizes}
            errors = self.code_losses(codes, cells[at], objects.boxes[mine], objects.velocities[mine])
            for name, error in errors.items():
                totals.setdefault(name, []).append(self.weights[name] * error)
        return {name: torch.stack(parts).sum() for name, parts in totals.items()}

    @torch.no_grad()
    def targets(self, outputs: Outputs, objects: Objects) -> tuple[Tensor, Tensor]:
        """The cell of each object, int64 (M,), −1 where its frame has none; the heat map ``(N, K)``."""
        owner = torch.full_like(objects.labels, -1)
        heatmaps, first = [], 0
        for frame, index in enumerate(torch.split(outputs["index"], outputs["frames"].tolist())):
            heat = torch.zeros(len(self.classes), len(index), device=index.device)
            rows = (objects.sample == frame).nonzero()[:, 0]
            if len(index) and len(rows):
                cells = index[:, [3, 2]]
                middle = self.places(objects.boxes[rows]) - 0.5
                nearest = torch.cdist(middle, cells.to(middle)).argmin(1)
                owner[rows] = first + nearest
                step = (cells[nearest, None] - cells).abs()
                radius = self.radius(objects.boxes[rows])[:, None]
                bell = torch.exp(-step.square().sum(2) / (2 * ((2 * radius + 1) / 6).square()))
                bell = bell * (step.amax(2) <= radius)
                heat.scatter_reduce_(0, objects.labels[rows, None].expand_as(bell), bell, "amax")
            heatmaps.append(heat.T)
            first += len(index)
        return owner, torch.cat(heatmaps)

    @torch.no_grad()
    def detections(self, outputs: Outputs) -> list[Detections]:
        """The boxes of each frame, best first."""
        frames: list[int] = outputs["frames"].tolist()
        parts = {name: torch.split(values, frames) for name, values in outputs.items() if name != "frames"}
        results = []
        for frame in range(len(frames)):
            found = [
                self._group({name: of[frame] for name, of in parts.items()}, g)
                for g in range(len(self.groups))
            ]
            velocities = [one.velocities for one in found if one.velocities is not None]
            joined = Detections(
                torch.cat([one.boxes for one in found]),
                torch.cat([one.scores for one in found]),
                torch.cat([one.labels for one in found]),
                torch.cat(velocities) if velocities else None,
            )
            results.append(joined[joined.scores.argsort(descending=True, stable=True)])
        return results

    def _group(self, outputs: Outputs, number: int) -> Detections:
        """The boxes of one group in one frame."""
        heat = outputs[f"{number}/heatmap"].float().sigmoid()
        scores, best = heat.flatten().topk(min(self.candidates, heat.numel()))
        best, scores = best[scores > self.min_score], scores[scores > self.min_score]
        row, label = best // heat.shape[1], best % heat.shape[1]
        codes = {name: outputs[f"{number}/{name}"][row].float() for name in self.sizes}
        if "iou" in codes:
            scores = rectify(scores, codes["iou"][:, 0], self.iou_power)
        boxes = self.decode(codes, outputs["index"][row][:, [3, 2]])
        labels = label.new_tensor(self.groups[number])[label]
        return suppress(Detections(boxes, scores, labels, codes.get("velocity")), self.nms, self.max_boxes)


class _Convolution(nn.Module):
    """Convolution seen from above at the occupied cells, normalisation, ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = SubMConv3d(before, after, (1, 3, 3))
        self.norm = nn.BatchNorm1d(after)

    def forward(self, voxels: Voxels) -> Voxels:
        voxels = self.convolution(voxels)
        return voxels.with_features(self.norm(voxels.features).relu())
