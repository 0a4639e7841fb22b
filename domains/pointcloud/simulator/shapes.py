"""The solids that everything is built of, and where rays meet them.

A part is a box, an ellipsoid or an elliptic cylinder, turned by its pitch about y, then by its yaw about z.
Scaled to half edges of one it becomes the unit cube, sphere or cylinder, which is where rays are tested: a
linear map keeps the distance along a ray.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Parts = NDArray[np.void]


class Shape(IntEnum):
    """What a part is."""

    BOX = 0
    ELLIPSOID = 1
    CYLINDER = 2


#: A part: ``transparency`` is the share of rays it lets through; where ``free_path`` (metres) is not 0 it is
#: porous, as foliage is, and a ray goes that far into it on average; ``owner`` is its object, -1 for none.
PART = np.dtype(
    [
        ("shape", np.int32),
        ("centre", np.float64, 3),
        ("half", np.float64, 3),
        ("yaw", np.float64),
        ("pitch", np.float64),
        ("reflectivity", np.float64),
        ("transparency", np.float64),
        ("free_path", np.float64),
        ("owner", np.int32),
    ]
)

Row = tuple[
    Shape, tuple[float, float, float], tuple[float, float, float], float, float, float, float, float, int
]


def part(
    shape: Shape,
    centre: tuple[float, float, float],
    half: tuple[float, float, float],
    *,
    reflectivity: float,
    yaw: float = 0.0,
    pitch: float = 0.0,
    transparency: float = 0.0,
    free_path: float = 0.0,
) -> Row:
    """One part in its object's frame (x forward, the ground at z = 0); `assemble` joins several."""
    return (shape, centre, half, yaw, pitch, reflectivity, transparency, free_path, -1)


def assemble(rows: list[Row]) -> Parts:
    """Parts as one structured array (`PART`)."""
    return np.array(rows, PART)


def place(parts: Parts, x: float, y: float, z: float, yaw: float, owner: int = -1) -> Parts:
    """Copy of ``parts`` turned by ``yaw`` about the origin, then moved to ``(x, y, z)``."""
    placed = parts.copy()
    cos, sin = np.cos(yaw), np.sin(yaw)
    px, py, pz = parts["centre"].T
    placed["centre"] = np.stack([cos * px - sin * py + x, sin * px + cos * py + y, pz + z], 1)
    placed["yaw"] += yaw
    placed["owner"] = owner
    return placed


def extents(parts: Parts) -> Doubles:
    """Half edges of the box around each part that shares its yaw: ``(P, 3)``."""
    hx, hy, hz = parts["half"].T
    cos, sin = np.abs(np.cos(parts["pitch"])), np.abs(np.sin(parts["pitch"]))
    round_ = parts["shape"] == Shape.ELLIPSOID
    ex = np.where(round_, np.hypot(cos * hx, sin * hz), cos * hx + sin * hz)
    ez = np.where(round_, np.hypot(sin * hx, cos * hz), sin * hx + cos * hz)
    return np.stack([ex, hy, ez], 1)


def bounds(parts: Parts) -> tuple[Doubles, Doubles]:
    """Lowest and highest corner ``(3,)`` of the parts' box along the axes; exact where no part has a yaw."""
    half = extents(parts)
    cos, sin = np.abs(np.cos(parts["yaw"])), np.abs(np.sin(parts["yaw"]))
    reach = np.stack(
        [cos * half[:, 0] + sin * half[:, 1], sin * half[:, 0] + cos * half[:, 1], half[:, 2]], 1
    )
    return (parts["centre"] - reach).min(0), (parts["centre"] + reach).max(0)


def to_unit(parts: Parts) -> Doubles:
    """The matrix of each part that turns and scales it to the unit solid: ``(P, 3, 3)``."""
    cy, sy = np.cos(parts["yaw"]), np.sin(parts["yaw"])
    cp, sp = np.cos(parts["pitch"]), np.sin(parts["pitch"])
    zero = np.zeros_like(cy)
    rows = [[cy * cp, sy * cp, -sp], [-sy, cy, zero], [cy * sp, sy * sp, cp]]
    turn = np.stack([np.stack(row, 1) for row in rows], 1)
    return np.asarray(turn / parts["half"][:, :, None])


def _interval(a: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats]:
    """Roots of ``a t² + 2 b t + c``, in order; NaN where there is none."""
    root: Floats = np.sqrt(b * b - a * c)
    return np.asarray((-b - root) / a, a.dtype), np.asarray((root - b) / a, a.dtype)


def _slab(origin: Floats, direction: Floats) -> tuple[Floats, Floats]:
    """Where a ray is between −1 and 1 along an axis."""
    # A ray along the slab itself must not give 0 · ∞.
    inverse: Floats = np.reciprocal(direction + np.float32(1e-20))
    middle, reach = -origin * inverse, np.abs(inverse)
    return middle - reach, middle + reach


def intersect(shape: Shape, origin: Floats, direction: Floats) -> tuple[Floats, Floats]:
    """Distances at which rays enter and leave a unit solid.

    Args:
        shape: which solid.
        origin: ``(3, N)``.
        direction: ``(3, N)``.

    Returns:
        Two ``(N,)`` arrays; the ray misses where not ``entry < exit`` (NaN included).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if shape == Shape.BOX:
            low, high = _slab(origin, direction)
            return low.max(0), high.min(0)
        axes = slice(None) if shape == Shape.ELLIPSOID else slice(2)
        o, d = origin[axes], direction[axes]
        near, far = _interval((d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1)
        if shape == Shape.CYLINDER:
            low, high = _slab(origin[2], direction[2])
            return np.maximum(near, low), np.minimum(far, high)
        return near, far


def unit_normals(shapes: NDArray[np.int32], places: Floats) -> Floats:
    """Outward normals ``(3, N)`` of any length, of unit solids at ``places`` (3, N) on their surface."""
    normals = places.copy()
    size = np.abs(places)
    flat = (shapes == Shape.CYLINDER) & (size[2] > 0.999)
    normals[2, (shapes == Shape.CYLINDER) & ~flat] = 0
    normals[:2, flat] = 0
    box = shapes == Shape.BOX
    normals[:, box] *= size[:, box] >= size[:, box].max(0) - 1e-6
    return normals
