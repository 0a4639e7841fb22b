"""What is written beside a simulated box."""

import numpy as np

from ..scene import Array
from .layout import World
from .render import Sweep
from .sensor import Sensor
from .shapes import Doubles

# A KITTI image's focal length in pixels: how tall an object would look to a camera beside the sensor.
_FOCAL = 721.5
# KITTI's bounds: least height in pixels, greatest occlusion, greatest truncation.
_DIFFICULTIES = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))
_OCCLUSION = (0.1, 0.5, 0.85)


def label(world: World, seen: Sweep, sensor: Sensor) -> tuple[Array, Array, dict[str, Array]]:
    """Boxes, names and attributes of the objects that have a point.

    Returns:
        float32 ``(M, 7)``, ``(M,)`` strings, and by name, each ``(M,)``: ``points``; ``hidden``, the share
        of the rays that would meet the object and end before it; ``occlusion``, the same as KITTI's 0 (seen),
        1 (partly hidden), 2 (largely), 3 (nearly all); ``truncation``, the share of its width outside the
        sensor's sector; ``difficulty``, 0 easy, 1 moderate, 2 hard, 3 none of these, by KITTI's bounds.
    """
    count = len(world.boxes)
    points = np.bincount(seen.owner[seen.owner >= 0], minlength=count)
    kept = points > 0
    hidden = (1 - seen.visible / np.maximum(seen.alone, 1)).astype(np.float32)
    occlusion = np.digitize(hidden, np.array(_OCCLUSION, np.float32))
    truncation = _truncation(world.boxes, np.radians(sensor.sector))
    pixels = _FOCAL * world.boxes[:, 5] / np.maximum(np.linalg.norm(world.boxes[:, :2], axis=1), 1)
    difficulty = np.full(count, 3)
    for level, (height, most_occluded, most_truncated) in reversed(list(enumerate(_DIFFICULTIES))):
        fits = (pixels >= height) & (occlusion <= most_occluded) & (truncation <= most_truncated)
        difficulty[fits] = level
    attributes: dict[str, Array] = {
        "points": points[kept],
        "hidden": hidden[kept],
        "occlusion": occlusion[kept],
        "truncation": truncation[kept].astype(np.float32),
        "difficulty": difficulty[kept],
    }
    return world.boxes[kept].astype(np.float32), np.array(world.names, np.str_)[kept], attributes


def _truncation(boxes: Doubles, sector: float) -> Doubles:
    """Share of each box's angle, seen from the sensor, that lies outside ±``sector``."""
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
    along, across = signs[:, 0] * boxes[:, 3:4], signs[:, 1] * boxes[:, 4:5]
    cos, sin = np.cos(boxes[:, 6:]), np.sin(boxes[:, 6:])
    x, y = boxes[:, :1] + cos * along - sin * across, boxes[:, 1:2] + sin * along + cos * across
    middle = np.arctan2(boxes[:, 1], boxes[:, 0])
    spread = (np.arctan2(y, x) - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    low, high = middle + spread.min(1), middle + spread.max(1)
    inside = np.minimum(high, sector) - np.maximum(low, -sector)
    return np.asarray(1 - np.clip(inside / np.maximum(high - low, 1e-9), 0, 1)) * (sector < np.pi)
