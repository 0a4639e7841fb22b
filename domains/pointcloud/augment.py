"""Random changes of a training frame; boxes, velocities and points go together."""

from dataclasses import dataclass, replace
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray

from .boxes import points_in_boxes
from .overlap import bev_intersection
from .scene import Array, Scene

Doubles = NDArray[np.float64]

# Places tried for an object until it meets no other.
_TRIES = 8


@dataclass(frozen=True)
class Augmentation:
    """Draws a changed frame; objects move first, then the whole frame.

    Names and attributes of boxes, and what belongs to the frame, stay: pixels and calibrations are those of
    the recording.

    Attributes:
        flip_x: mirror x, front to back, every other time.
        flip_y: mirror y, left to right, every other time.
        rotation: turn about the sensor by up to this angle either way, radians.
        scaling: smallest and largest factor.
        translation: standard deviation of a shift along each of x, y and z, metres.
        object_rotation: turn each object about its centre by up to this angle either way, radians.
        object_translation: standard deviation of the shift of each object along x and y, metres.

    Raises:
        ValueError: a setting that is negative, or factors that are not positive and ascending.
    """

    flip_x: bool = False
    flip_y: bool = True
    rotation: float = pi / 4
    scaling: tuple[float, float] = (0.95, 1.05)
    translation: float = 0.0
    object_rotation: float = 0.0
    object_translation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rotation", "translation", "object_rotation", "object_translation"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        low, high = self.scaling
        if not 0 < low <= high:
            raise ValueError(f"scaling must be two positive factors, the smaller first, got {self.scaling}")

    def __call__(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """A changed copy of ``scene``; the same state of ``generator`` gives the same."""
        if self.object_rotation or self.object_translation:
            scene = jitter_objects(scene, self.object_rotation, self.object_translation, generator)
        mirror = [
            -1.0 if wanted and generator.random() < 0.5 else 1.0 for wanted in (self.flip_x, self.flip_y)
        ]
        turn = _rotation(generator.uniform(-self.rotation, self.rotation))
        scale = generator.uniform(*self.scaling)
        shift = self.translation * generator.standard_normal(3)
        return transform(scene, turn @ np.diag(mirror), scale, shift)


def transform(scene: Scene, linear: Array, scale: float = 1.0, shift: Array | float = 0.0) -> Scene:
    """Mirror or turn a frame by ``linear``, then scale it, then shift it.

    Args:
        scene: the frame.
        linear: orthogonal ``(2, 2)``, for x and y.
        scale: factor of all lengths, and of velocities.
        shift: ``(3,)`` metres.
    """
    whole = np.eye(3)
    whole[:2, :2] = linear
    points, boxes = scene.points.copy(), scene.boxes.copy()
    points[:, :3] = scale * scene.points[:, :3].astype(np.float64) @ whole.T + shift
    boxes[:, :3] = scale * scene.boxes[:, :3].astype(np.float64) @ whole.T + shift
    boxes[:, 3:6] *= scale
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) @ np.asarray(linear).T
    boxes[:, 6] = np.arctan2(heading[:, 1], heading[:, 0])
    velocities = scene.velocities
    if velocities is not None:
        velocities = (scale * velocities @ np.asarray(linear).T).astype(velocities.dtype)
    return replace(scene, points=points, boxes=boxes, velocities=velocities)


def jitter_objects(
    scene: Scene, rotation: float, translation: float, generator: np.random.Generator
) -> Scene:
    """Turn and shift each object with the points in its box, where it then meets no other box.

    An object that overlaps another one seen from above, or finds no free place in a few tries, stays.

    Args:
        scene: the frame.
        rotation: largest angle either way, radians.
        translation: standard deviation along x and y, metres.
        generator: source of randomness.
    """
    points, boxes = scene.points.copy(), scene.boxes.copy()
    velocities = None if scene.velocities is None else scene.velocities.copy()
    inside = points_in_boxes(torch.from_numpy(points).double(), torch.from_numpy(boxes).double()).numpy()
    others = torch.from_numpy(boxes).double()
    for row in generator.permutation(len(boxes)):
        angles = generator.uniform(-rotation, rotation, _TRIES)
        shifts = translation * generator.standard_normal((_TRIES, 2))
        places = others[row].repeat(1 + _TRIES, 1)
        places[1:, :2] += torch.from_numpy(shifts)
        places[1:, 6] += torch.from_numpy(angles)
        overlap = bev_intersection(places, others)
        overlap[:, row] = 0
        free = (overlap == 0).all(1)
        if not free[0] or not free[1:].any():
            continue
        chosen = int(free[1:].int().argmax())
        turn, centre = _rotation(angles[chosen]), boxes[row, :2].astype(np.float64)
        others[row] = places[1 + chosen]
        boxes[row] = others[row].numpy()
        boxes[row, 6] = (boxes[row, 6] + pi) % (2 * pi) - pi
        own = inside[:, row]
        points[own, :2] = (points[own, :2] - centre) @ turn.T + centre + shifts[chosen]
        if velocities is not None:
            velocities[row] = turn @ velocities[row]
    return replace(scene, points=points, boxes=boxes, velocities=velocities)


def _rotation(angle: float) -> Doubles:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])
