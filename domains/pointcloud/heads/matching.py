"""Which anchors belong to which objects."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorTargets:
    """What the anchors of one frame should say.

    Attributes:
        anchor: int64 ``(P,)``: those that belong to an object.
        label: int64 ``(P,)``: its class.
        boxes: ``(P, 7)``: the object's box.
        asked: booleans for every anchor: whether it is clear if it belongs to an object.
    """

    anchor: Tensor
    label: Tensor
    boxes: Tensor
    asked: Tensor


@dataclass(frozen=True)
class Match:
    """Anchors and objects of one class.

    Attributes:
        anchor: int64 ``(P,)``: anchors that belong to an object, numbered in the order of ``asked``.
        object: int64 ``(P,)``: that object.
        asked: booleans ``(H, W, R)``: whether it is clear if an anchor belongs to an object.
    """

    anchor: Tensor
    object: Tensor
    asked: Tensor


def nearest_iou(centres: tuple[Tensor, Tensor], shapes: Tensor, boxes: Tensor) -> Tensor:
    """Overlap of anchors and boxes seen from above, each as the upright rectangle nearest to it.

    A box turned by more than π/4 from the x axis counts as one with length and width exchanged.

    Args:
        centres: x of each column ``(W,)`` and y of each row ``(H,)``.
        shapes: ``(R, 5)``: z, dx, dy, dz, yaw of the anchors of a cell.
        boxes: ``(M, 7)``.

    Returns:
        Intersection over union ``(H, W, R, M)``.
    """
    anchor, box = _upright(shapes[:, 1:3], shapes[:, 4]), _upright(boxes[:, 3:5], boxes[:, 6])
    # Rectangles meet where their intervals do, along x (W, R, M) and along y (H, R, M).
    along = []
    for axis, centre in enumerate(centres):
        ends = anchor[:, None, axis] / 2
        low = torch.maximum(centre[:, None, None] - ends, boxes[:, axis] - box[:, axis] / 2)
        high = torch.minimum(centre[:, None, None] + ends, boxes[:, axis] + box[:, axis] / 2)
        along.append((high - low).clamp_min(0))
    shared = along[0][None] * along[1][:, None]
    return shared / (anchor.prod(1)[:, None] + box.prod(1) - shared)


def match_anchors(overlap: Tensor, positive: float, negative: float) -> Match:
    """Give anchors to the object they overlap most: from ``positive`` on, and each object its best ones.

    Args:
        overlap: ``(H, W, R, M)`` of the anchors and objects of a class.
        positive: least overlap of an anchor that belongs to an object.
        negative: an anchor of less overlap that is no object's best belongs to none.
    """
    asked = torch.ones(overlap.shape[:3], dtype=torch.bool, device=overlap.device)
    if not overlap.shape[3]:
        none = torch.zeros(0, dtype=torch.int64, device=overlap.device)
        return Match(none, none, asked)
    flat = overlap.flatten(0, 2)
    most, owner = flat.max(1)
    best = flat.amax(0)
    leading = ((flat == best) & (best > 0)).any(1)
    belongs = (most >= positive) | leading
    asked = (belongs | (most < negative)).view_as(asked)
    anchor = belongs.nonzero()[:, 0]
    return Match(anchor, owner[anchor], asked)


def _upright(size: Tensor, yaw: Tensor) -> Tensor:
    """Extents along x and y of rectangles (N, 2) turned by the nearest multiple of π/2: ``(N, 2)``."""
    return torch.where((yaw.cos().abs() >= yaw.sin().abs())[:, None], size, size.flip(1))
