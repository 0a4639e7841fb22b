"""TransFusion's head: the peaks of a heat map look at the map around them and at each other."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from ..detections import Detections
from ..grid import Grid
from ..overlap import iou_3d
from .base import Outputs, check_thresholds, suppress
from .codes import CentreCodes, Objects, heatmap_tower, rectify
from .decoder import Decoder, PlaceEmbedding, Reader
from .losses import sigmoid_focal

# Weights of class, place and overlap in the cost of giving a proposal to an object.
_COSTS = (0.15, 0.25, 0.25)


class TransFusionHead(CentreCodes):
    """Proposals from a heat map, refined by one layer of attention, given to objects one to one.

    The LiDAR part of TransFusion (Bai et al. 2022), with local attention and predicted overlap as LION uses
    it for nuScenes. A proposal is the peak of its class in its 3×3 neighbourhood; an object belongs to the
    proposal that the Hungarian method gives it.

    Args:
        channels: C of the features.
        classes: names of the classes.
        grid: the voxels below the bird's-eye view.
        stride: voxels along an edge of a cell of the bird's-eye view.
        width: channels inside the head.
        proposals: peaks that are refined.
        heads: of the attention.
        hidden: width of the feed-forward layer.
        velocity: predict velocities.
        window: edge, in cells, of the square around a proposal that it looks at; odd.
        dropout: in the attention layer.
        small: classes whose peaks may stand side by side, being about a cell in size.
        min_overlap: from which the radius of the Gaussians follows.
        min_radius: least radius, in cells.
        box_weight: of the boxes' error in the loss.
        velocity_weight: of the velocities' error, beside the boxes' own.
        iou_weight: of the predicted overlap's error.
        min_score: least score of a box, before the overlap counts.
        iou_power: α of the score s^(1 − α)·IoU^α.
        nms: greatest overlap of two boxes: one number for whatever classes, or one for each class apart.

    Raises:
        ValueError: an even window, or ``small`` classes that are unknown.
    """

    def __init__(
        self,
        channels: int,
        classes: Sequence[str],
        grid: Grid,
        stride: int,
        *,
        width: int = 128,
        proposals: int = 200,
        heads: int = 8,
        hidden: int = 256,
        velocity: bool = True,
        window: int = 41,
        dropout: float = 0.1,
        small: Sequence[str] = (),
        min_overlap: float = 0.1,
        min_radius: int = 2,
        box_weight: float = 0.25,
        velocity_weight: float = 0.2,
        iou_weight: float = 0.5,
        min_score: float = 0.0,
        iou_power: float = 0.5,
        nms: float | Sequence[float] = 0.2,
    ) -> None:
        super().__init__(channels, classes, grid, stride)
        check_thresholds(nms, classes)
        unknown = [name for name in small if name not in classes]
        if unknown:
            raise ValueError(
                f"small={list(small)} names {', '.join(unknown)}: classes has {', '.join(classes)}"
            )
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window={window} must be an odd number of cells")
        self.proposals = min(proposals, len(classes) * self.height * self.width)
        self.reach = window // 2
        self.min_overlap, self.min_radius = min_overlap, min_radius
        self.weights = {
            "box": box_weight,
            "velocity": box_weight * velocity_weight,
            "iou": iou_weight,
        }
        self.min_score, self.iou_power, self.nms = min_score, iou_power, nms
        is_small = torch.tensor([name in small for name in classes])
        self.register_buffer("small", is_small[:, None, None], persistent=False)
        self.shared = nn.Conv2d(channels, width, 3, padding=1)
        self.heatmap = heatmap_tower(width, len(classes))
        self.kind = nn.Embedding(len(classes), width)
        self.query_place, self.key_place = PlaceEmbedding(width), PlaceEmbedding(width)
        self.decoder = Decoder(width, heads, hidden, dropout)
        sizes = {"offset": 2, "height": 1, "size": 3, "heading": 2, "iou": 1}
        sizes |= {"velocity": 2} if velocity else {}
        self.readers = nn.ModuleDict(
            {name: Reader(width, size) for name, size in {"class": len(classes), **sizes}.items()}
        )

    small: Tensor

    def forward(self, bev: Tensor) -> Outputs:
        """The heat map's logits ``(B, K, H, W)``, and what is said of P proposals ``(B, P, ·)`` by name.

        Beside the codes: ``class`` logits (B, P, K), ``places`` (B, P, 2) in cells, ``proposed`` int64 (B, P)
        the class of each peak and ``peak`` (B, P, K) the heat map there.

        Raises:
            ValueError: features of another shape than the grid's.
        """
        self.check(bev)
        shared = self.shared(bev)
        logits = self.heatmap(shared)
        heat = logits.detach().float().sigmoid()
        highest = F.max_pool2d(heat, 3, 1, 1)
        peaks = torch.where(self.small | (heat == highest), heat, 0)
        best = peaks.flatten(1).topk(self.proposals).indices
        proposed, cell = best // (self.height * self.width), best % (self.height * self.width)
        cells = torch.stack([cell % self.width, cell // self.width], 2)
        keys = shared.flatten(2).transpose(1, 2)
        rows = torch.arange(len(bev), device=bev.device)[:, None]
        queries = keys[rows, cell] + self.kind(proposed)
        x, y = (torch.arange(size, device=bev.device) for size in (self.width, self.height))
        key_places = torch.cartesian_prod(y, x).flip(1)[None] + 0.5
        near_x, near_y = ((cells[..., axis, None] - of).abs() <= self.reach for axis, of in enumerate((x, y)))
        near = (near_y[..., None] & near_x[..., None, :]).flatten(2)
        queries = self.decoder(queries, self.query_place(cells + 0.5), keys, self.key_place(key_places), near)
        outputs = {name: reader(queries) for name, reader in self.readers.items()}
        at_peak = heat.flatten(2).transpose(1, 2)[rows, cell]
        return outputs | {"heatmap": logits, "places": cells + 0.5, "proposed": proposed, "peak": at_peak}

    def loss(
        self,
        outputs: Outputs,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        velocities: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Focal losses of heat map and classes; errors of the codes of the proposals given to objects."""
        objects = self.objects(boxes, labels, velocities)
        sample, proposal, owner = self.match(outputs, objects)
        logits = outputs["class"].float()
        target = torch.zeros_like(logits)
        target[sample, proposal, objects.labels[owner]] = 1
        codes = {name: outputs[name][sample, proposal].float() for name in self.readers if name != "class"}
        errors = self.code_losses(
            codes, outputs["places"][sample, proposal], objects.boxes[owner], objects.velocities[owner]
        )
        parts = {name: self.weights[name] * error for name, error in errors.items()}
        return {
            "heatmap": self.heatmap_loss(outputs["heatmap"], objects),
            "class": sigmoid_focal(logits, target).sum() / max(len(owner), 1),
        } | parts

    @torch.no_grad()
    def match(self, outputs: Outputs, objects: Objects) -> tuple[Tensor, Tensor, Tensor]:
        """Give objects proposals of their frame, one to one, at the least total cost.

        Returns:
            int64 ``(P,)`` each: the frame, the proposal in it, and the object.
        """
        extent = objects.boxes.new_tensor([h - l for l, h in zip(self.grid.low[:2], self.grid.high[:2])])
        triples = []
        for frame, logits in enumerate(outputs["class"].float()):
            rows = (objects.sample == frame).nonzero()[:, 0]
            wanted, label = objects.boxes[rows], objects.labels[rows]
            found = self._boxes(outputs, frame)
            ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
            kind = (sigmoid_focal(logits, ones) - sigmoid_focal(logits, zeros))[:, label]
            place = torch.cdist(found[:, :2] / extent, wanted[:, :2] / extent, p=1)
            costs = torch.stack([kind, place, -iou_3d(found, wanted)], 2) @ kind.new_tensor(_COSTS)
            # What has diverged is given away last; the solver refuses what is not finite.
            costs = costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
            proposal, owner = linear_sum_assignment(costs.cpu().numpy())
            given = torch.as_tensor(proposal, device=rows.device)
            triples.append(
                (torch.full_like(given, frame), given, rows[torch.as_tensor(owner, device=rows.device)])
            )
        sample, proposals, owners = (torch.cat(part) for part in zip(*triples))
        return sample, proposals, owners

    @torch.no_grad()
    def detections(self, outputs: Outputs) -> list[Detections]:
        """The boxes of each frame, best first."""
        results = []
        for frame, label in enumerate(outputs["proposed"]):
            scores = outputs["class"][frame].float().sigmoid() * outputs["peak"][frame]
            scores = scores.gather(1, label[:, None])[:, 0]
            rectified = rectify(scores, outputs["iou"][frame, :, 0].float(), self.iou_power)
            velocities = outputs["velocity"][frame].float() if "velocity" in outputs else None
            found = Detections(self._boxes(outputs, frame), rectified, label, velocities)
            results.append(suppress(found[scores > self.min_score], self.nms, self.proposals))
        return results

    def _boxes(self, outputs: Outputs, frame: int) -> Tensor:
        codes = {name: outputs[name][frame].float() for name in self.readers if name != "class"}
        return self.decode(codes, outputs["places"][frame])
