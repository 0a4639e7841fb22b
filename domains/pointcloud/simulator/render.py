"""What a sensor sees of a world: points, and how much of each object."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ground import Ground
from .sensor import Sensor
from .shapes import Doubles, Floats, Parts, Shape, extents, intersect, to_unit, unit_normals

Ints = NDArray[np.int64]

# How well an echo is heard: of a surface of reflectivity ρ met at an angle θ, r metres away, the share
# 1 − exp(−ρ cos θ / (_FAINT r²)) comes back.
_FAINT = 1.2e-5
_POROUS_COSINE = 0.6


@dataclass(frozen=True)
class Sweep:
    """One sweep of a sensor over M objects.

    Attributes:
        points: float32 ``(N, 4)``: x, y, z, intensity.
        owner: int64 ``(N,)``: object of each point, -1 for none.
        visible: int64 ``(M,)``: rays that end on each object.
        alone: int64 ``(M,)``: rays that would end on it if nothing stood in front.
    """

    points: Floats
    owner: Ints
    visible: Ints
    alone: Ints


@dataclass(frozen=True)
class _Hits:
    """Where H rays enter a part: ray, part, distance, and cosine of the angle to the surface."""

    ray: Ints
    part: Ints
    distance: Floats
    cosine: Floats


def sweep(
    parts: Parts, ground: Ground, objects: int, sensor: Sensor, generator: np.random.Generator
) -> Sweep:
    """Cast the rays of ``sensor`` into ``parts``, which belong to ``objects`` objects, on ``ground``."""
    rays = sensor.rays(generator)
    reach = ground.distances(rays, sensor.azimuths, sensor.max_range).ravel().astype(np.float32)
    rays_flat = rays.reshape(3, -1)
    cosine = np.abs(rays_flat[2])
    owner = np.full(len(reach), -1)
    place = rays_flat[:2] * np.where(np.isfinite(reach), reach, 0)
    reflectivity = ground.reflectivity(*place.astype(np.float64))

    hits = _cast(parts, rays, sensor, generator)
    above = hits.distance < reach[hits.ray]
    touched = np.zeros((objects + 1, len(reach)), np.bool_)  # the last row is of what has no owner
    touched[parts["owner"][hits.part[above]], hits.ray[above]] = True
    np.minimum.at(reach, hits.ray, hits.distance)
    first = np.flatnonzero(hits.distance == reach[hits.ray])
    ray, part = hits.ray[first], hits.part[first]
    owner[ray], cosine[ray] = parts["owner"][part], hits.cosine[first]
    reflectivity[ray] = parts["reflectivity"][part]

    visible = np.bincount(owner[owner >= 0], minlength=objects)
    heard = _heard(reach, reflectivity * cosine, sensor, generator)
    distance = reach[heard] + generator.normal(0, sensor.range_noise, len(heard))
    intensity = reflectivity[heard] * (0.4 + 0.6 * cosine[heard]) + generator.normal(0, 0.02, len(heard))
    points = np.concatenate([rays_flat[:, heard] * distance, np.clip(intensity, 0, 1)[None]]).T
    return Sweep(
        np.ascontiguousarray(points, np.float32),
        owner[heard],
        visible,
        touched[:objects].sum(1, dtype=np.int64),
    )


def _heard(reach: Floats, echo: Doubles, sensor: Sensor, generator: np.random.Generator) -> Ints:
    """Which rays come back."""
    near = reach < sensor.max_range
    share = (1 - sensor.drop) * -np.expm1(-echo / (_FAINT * np.where(near, reach, 1) ** 2))
    return np.flatnonzero(near & (generator.random(len(reach)) < share))


def _windows(parts: Parts, sensor: Sensor) -> Ints:
    """First and last-plus-one beam and firing that can meet each part: ``(P, 4)``."""
    half, (x, y, z) = extents(parts), parts["centre"].T
    cos, sin = np.cos(parts["yaw"]), np.sin(parts["yaw"])
    centre = np.stack([cos * x + sin * y, cos * y - sin * x])  # in the part's own frame
    nearest = np.hypot(*np.maximum(np.abs(centre) - half[:, :2].T, 0.01))
    farthest = np.hypot(*(np.abs(centre) + half[:, :2].T))
    top, bottom = z + half[:, 2], z - half[:, 2]
    high = np.arctan(top / np.where(top > 0, nearest, farthest))
    low = np.arctan(bottom / np.where(bottom < 0, nearest, farthest))

    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    corner = (centre + signs[:, :, None] * half[:, :2].T) * [
        [1],
        [-1],
    ]  # (4, 2, P), mirrored for the difference
    centre_angle = np.arctan2(centre[1], centre[0])
    spread = np.arctan2(corner[:, 1], corner[:, 0]) + centre_angle
    spread = -((spread + np.pi) % (2 * np.pi) - np.pi)
    azimuth = np.arctan2(y, x)

    margin = 5 * sensor.angle_noise
    beams, count = -sensor.beams, len(sensor.azimuths)
    step = np.radians(sensor.azimuth_step)
    right = np.ceil((azimuth + spread.min(0) - margin) / step + (count - 1) / 2).astype(np.int64)
    left = np.floor((azimuth + spread.max(0) + margin) / step + (count - 1) / 2).astype(np.int64) + 1
    if sensor.full_turn:
        left, right = left - right + right % count, right % count
    else:
        left, right = np.clip(left, 0, count), np.clip(right, 0, count)
    lowest, highest = np.searchsorted(beams, -low + margin), np.searchsorted(beams, -high - margin)
    return np.stack([highest, lowest, right, left], 1)


def _cast(parts: Parts, rays: Floats, sensor: Sensor, generator: np.random.Generator) -> _Hits:
    """All entries of rays into parts, those hidden by others too."""
    parts_of = np.argsort(parts["shape"], kind="stable")
    parts = parts[parts_of]
    windows = _windows(parts, sensor)
    sizes = (windows[:, 1] - windows[:, 0]) * (windows[:, 3] - windows[:, 2])
    numbers = np.arange(rays[0].size).reshape(rays[0].shape)
    if sensor.full_turn:  # a part behind the sensor lies across the seam
        rays, numbers = np.concatenate([rays, rays], 2), np.concatenate([numbers, numbers], 1)

    matrix = to_unit(parts)
    origins = -np.einsum("pij,pj->pi", matrix, parts["centre"]).astype(np.float32)
    matrix = matrix.astype(np.float32)
    ends = np.cumsum(sizes)
    pairs = int(sizes.sum())
    ray, direction = np.empty(pairs, np.int64), np.empty((3, pairs), np.float32)
    for row, (top, bottom, right, left) in enumerate(windows):
        here = slice(ends[row] - sizes[row], ends[row])
        ray[here] = numbers[top:bottom, right:left].ravel()
        direction[:, here] = matrix[row] @ rays[:, top:bottom, right:left].reshape(3, -1)
    part = np.repeat(np.arange(len(parts)), sizes)

    near, far = np.empty_like(direction[0]), np.empty_like(direction[0])
    for shape in Shape:
        rows = np.flatnonzero(parts["shape"] == shape)
        if len(rows):
            here = slice(ends[rows[0]] - sizes[rows[0]], ends[rows[-1]])
            near[here], far[here] = intersect(shape, origins[part[here]].T, direction[:, here])

    kept = np.flatnonzero((near < far) & (near > 0))
    of = part[kept]
    free_path = parts["free_path"][of]
    near[kept] += (free_path * generator.standard_exponential(len(kept))).astype(np.float32)
    inside = (near[kept] < far[kept]) & (generator.random(len(kept)) >= parts["transparency"][of])
    kept, of = kept[inside], of[inside]

    distance, direction = near[kept], direction[:, kept]
    normals = unit_normals(parts["shape"][of], origins[of].T + distance * direction)
    length = np.linalg.norm(np.einsum("in,nij->jn", normals, matrix[of]), axis=0)
    cosine = np.abs((normals * direction).sum(0)) / length
    cosine = np.where(parts["free_path"][of] > 0, np.float32(_POROUS_COSINE), cosine)
    return _Hits(ray[kept], parts_of[of], distance, cosine)
