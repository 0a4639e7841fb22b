"""Boxes in space: ``(x, y, z, dx, dy, dz, yaw)``, metres and radians; see `scene.Scene`."""

from math import pi

import torch
from torch import Tensor

# Corners of a rectangle in half edges, counter-clockwise seen from above, front left first.
_CORNERS = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
# Comparisons of points with boxes at a time, which bounds the memory.
_CHUNK = 1 << 22


def wrap_angle(angle: Tensor) -> Tensor:
    """The same angle in [−π, π), radians."""
    wrapped = torch.remainder(angle + pi, 2 * pi) - pi
    # The remainder of a small negative number rounds up to 2π.
    return torch.where(wrapped >= pi, wrapped - 2 * pi, wrapped)


def rotate(vectors: Tensor, angle: Tensor) -> Tensor:
    """Turn ``vectors`` (…, 2) counter-clockwise by ``angle`` (…), radians; the shapes broadcast."""
    cos, sin = angle.cos(), angle.sin()
    x, y = vectors.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def corners_bev(boxes: Tensor) -> Tensor:
    """Corners of ``boxes`` (N, 7) seen from above, counter-clockwise, front left first: ``(N, 4, 2)``."""
    offsets = boxes[:, None, 3:5] / 2 * boxes.new_tensor(_CORNERS)
    return boxes[:, None, :2] + rotate(offsets, boxes[:, 6:7])


def corners(boxes: Tensor) -> Tensor:
    """Corners of ``boxes`` (N, 7): those of `corners_bev` at the bottom, then at the top: ``(N, 8, 3)``."""
    flat = corners_bev(boxes).repeat(1, 2, 1)
    half = boxes[:, 5:6] / 2 * boxes.new_tensor([-1.0] * 4 + [1.0] * 4)
    return torch.cat([flat, (boxes[:, 2:3] + half)[..., None]], 2)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points lie in which boxes, borders included; NaN lies in none.

    Args:
        points: ``(N, 3 + F)``: x, y, z first.
        boxes: ``(M, 7)``.

    Returns:
        Booleans ``(N, M)``.
    """
    at_once = max(1, _CHUNK // max(1, len(points)))
    starts = range(0, max(1, len(boxes)), at_once)
    return torch.cat([_points_in_boxes(points, boxes[start : start + at_once]) for start in starts], 1)


def _points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    x, y, z = (points[:, axis, None] - boxes[:, axis] for axis in range(3))
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    half = boxes[:, 3:6] / 2
    inside = (x * cos + y * sin).abs() <= half[:, 0]
    inside &= (y * cos - x * sin).abs() <= half[:, 1]
    inside &= z.abs() <= half[:, 2]
    return inside
