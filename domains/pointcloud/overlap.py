"""Overlap of rotated boxes, and non-maximum suppression, in plain PyTorch on any device.

The area that two rectangles share is written as an integral along the border of the first, in the frame of
the second, whose half edges are h and k. At a height y in [−k, k] the shared width is clamp(right) −
clamp(left), where clamp limits x to [−h, h]; so, by Green's theorem, the area is ∮ clamp(x) dy over the
part of the border with |y| ≤ k. Each straight edge gives a closed form. No vertex has to be found or sorted,
and the result is continuous in the boxes: equal, touching, contained and flat ones are no special cases.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .boxes import corners_bev, rotate

# Pairs of boxes at a time, which bounds the memory.
_CHUNK = 1 << 20


def bev_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area that boxes share seen from above: ``a`` (N, 7), ``b`` (M, 7) -> (N, M), m²."""
    area = a.new_zeros(len(a), len(b))
    for row, column in _near(a, b):
        area[row, column] = paired_bev_intersection(a[row], b[column])
    return area


def bev_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union seen from above: ``a`` (N, 7), ``b`` (M, 7) -> (N, M); 0 for two flat boxes."""
    return _over_union(bev_intersection(a, b), _area(a)[:, None], _area(b))


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of volumes: ``a`` (N, 7), ``b`` (M, 7) -> (N, M); 0 for two flat boxes."""
    shared = bev_intersection(a, b) * _shared_height(a[:, None], b)
    return _over_union(shared, _volume(a)[:, None], _volume(b))


def paired_iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the volumes of each pair: ``a`` (N, 7), ``b`` (N, 7) -> (N,)."""
    shared = paired_bev_intersection(a, b) * _shared_height(a, b)
    return _over_union(shared, _volume(a), _volume(b))


def paired_bev_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area that each pair shares seen from above: ``a`` (P, 7), ``b`` (P, 7) -> (P,), m²."""
    # Relative to b, corners of a far from the origin lose no digits.
    relative = torch.cat([a[:, :2] - b[:, :2], a[:, 2:]], 1)
    x, y = rotate(corners_bev(relative), -b[:, 6:7]).unbind(-1)
    h, k = (b[:, 3:5, None] / 2).unbind(1)
    x_step, y_step = x.roll(-1, 1) - x, y.roll(-1, 1) - y
    # The part of each edge with |y| ≤ k runs from `start` to `end`.
    level = y.clamp(-k, k)
    next_level = level.roll(-1, 1)
    rise = torch.where(y_step == 0, 1, y_step)
    start, end = x + (level - y) / rise * x_step, x + (next_level - y) / rise * x_step
    area = (_mean_clamped(start, end, h) * (next_level - level)).sum(1)
    # What rounding leaves of the area of two boxes apart is 0, so that "no overlap" can be tested as such.
    rounding = 2 * torch.finfo(area.dtype).eps * (_radius(a) + _radius(b)).square()
    area = torch.where(area > rounding, area, 0)
    return torch.minimum(area, torch.minimum(_area(a), _area(b)))


def _mean_clamped(start: Tensor, end: Tensor, limit: Tensor) -> Tensor:
    """Mean of clamp(x, −limit, limit) as x goes from ``start`` to ``end`` at constant speed."""
    low, high = start.clamp(-limit, limit), end.clamp(-limit, limit)
    within = (high - low) * (high + low) / 2
    above = torch.maximum(end, limit) - torch.maximum(start, limit)
    below = torch.minimum(end, -limit) - torch.minimum(start, -limit)
    length = end - start
    mean = (within + limit * (above - below)) / torch.where(length == 0, 1, length)
    return torch.where(length == 0, low, mean)


def _radius(boxes: Tensor) -> Tensor:
    """Of the circle round each box, seen from above."""
    return torch.hypot(boxes[:, 3], boxes[:, 4]) / 2


def _area(boxes: Tensor) -> Tensor:
    return boxes[:, 3] * boxes[:, 4]


def _volume(boxes: Tensor) -> Tensor:
    return _area(boxes) * boxes[:, 5]


def _shared_height(a: Tensor, b: Tensor) -> Tensor:
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    return torch.minimum((top - bottom).clamp(min=0), torch.minimum(a[..., 5], b[..., 5]))


def _over_union(shared: Tensor, a: Tensor, b: Tensor) -> Tensor:
    union = a + b - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1), 0)


def _near(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``a`` and ``b`` whose circumscribed circles, seen from above, touch; some pairs at a time."""
    at_once = max(1, _CHUNK // max(1, len(b)))
    for first in range(0, len(a), at_once):
        rows = slice(first, first + at_once)
        offset = a[rows, None, :2] - b[:, :2]
        reach = _radius(a[rows])[:, None] + _radius(b)
        row, column = (offset.square().sum(2) <= reach.square()).nonzero(as_tuple=True)
        yield row + first, column


def nms(
    boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None = None, limit: int | None = None
) -> Tensor:
    """Greedy non-maximum suppression: a box falls to a better one that overlaps it by more than a threshold.

    Args:
        boxes: ``(N, 7)``.
        scores: ``(N,)``; of equal ones the first counts as better.
        threshold: intersection over union seen from above.
        labels: ``(N,)``; given, boxes fall to those of their own label only.
        limit: keep this many at most.

    Returns:
        int64 indices of the kept boxes, best first.
    """
    order = scores.sort(descending=True, stable=True).indices
    ranked = boxes[order]
    ranked_labels = None if labels is None else labels[order]
    better, worse = [], []
    for row, column in _near(ranked, ranked):
        later = row < column
        if ranked_labels is not None:
            later &= ranked_labels[row] == ranked_labels[column]
        row, column = row[later], column[later]
        a, b = ranked[row], ranked[column]
        overlapping = _over_union(paired_bev_intersection(a, b), _area(a), _area(b)) > threshold
        better.append(row[overlapping])
        worse.append(column[overlapping])
    kept = _greedy(len(boxes), torch.cat(better or [order]), torch.cat(worse or [order]), limit)
    return order[kept.to(order.device)]


def _greedy(count: int, better: Tensor, worse: Tensor, limit: int | None) -> Tensor:
    """Places that stay when, in turn, each one still there removes the worse ones that overlap it.

    ``better`` ascends, and ``worse`` are the partners.
    """
    ends = torch.bincount(better, minlength=count).cumsum(0).tolist()
    partners = worse.cpu().numpy()
    alive = torch.ones(count, dtype=torch.bool).numpy()
    kept: list[int] = []
    start = 0
    for place, end in enumerate(ends):
        if alive[place]:
            if limit is not None and len(kept) >= limit:
                break
            kept.append(place)
            alive[partners[start:end]] = False
        start = end
    return torch.tensor(kept, dtype=torch.int64)
