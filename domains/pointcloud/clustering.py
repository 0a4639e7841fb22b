"""Detection by geometry alone, the baseline beside every result: ground, clusters, boxes, sizes.

What stands on the ground is cut into clusters seen from above; each gets the rectangle whose edges its points
follow, which is grown to the size of the class that it fits best. Nothing is learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from .detections import Detections
from .overlap import nms
from .scene import Array, Scene

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

# Directions tried for a rectangle: a quarter turn.
_ANGLES = np.deg2rad(np.arange(0, 90, 3.0))


@dataclass(frozen=True)
class Size:
    """Usual edges of the boxes of a class, metres.

    Attributes:
        length: mean length.
        width: mean width.
        height: mean height.
        spread: standard deviation of each edge as a share of its mean.
    """

    length: float
    width: float
    height: float
    spread: float = 0.12


# Means of the labels of KITTI's training split, rounded; bus and truck: of nuScenes.
SIZES: Mapping[str, Size] = {
    "Car": Size(3.9, 1.63, 1.53),
    "Van": Size(5.1, 1.9, 2.2),
    "Truck": Size(10.0, 2.6, 3.3, 0.2),
    "Bus": Size(11.0, 2.9, 3.5, 0.15),
    "Pedestrian": Size(0.85, 0.66, 1.76),
    "Cyclist": Size(1.76, 0.6, 1.74),
}


@dataclass(frozen=True)
class Clustering:
    """Settings of `cluster`; lengths in metres.

    Attributes:
        sizes: edges of the classes that can be found, by name.
        clearance: points lower than this above the ground belong to it.
        ceiling: points higher than this above the ground are left out: crowns of trees, bridges.
        reach: points nearer than this, seen from above, belong together ...
        reach_per_metre: ... plus this much for each metre of distance from the sensor, as beams spread.
        min_points: smaller clusters are left out.
        min_score: worse boxes are left out.
        overlap: of two boxes whose intersection over union seen from above is larger, the better stays.
    """

    sizes: Mapping[str, Size] = field(default_factory=lambda: dict(SIZES))
    clearance: float = 0.15
    ceiling: float = 4.0
    reach: float = 0.35
    reach_per_metre: float = 0.015
    min_points: int = 5
    min_score: float = 0.01
    overlap: float = 0.1


@dataclass(frozen=True)
class Ground:
    """Height of the ground: a quadratic surface, and how far the ground departs from it in each cell.

    Attributes:
        low: the grid's corner with the smallest x and y.
        cell: edge of a cell.
        surface: the six coefficients of 1, x, y, x², xy, y².
        departure: ``(nx, ny)``, at the centres of the cells.
    """

    low: Doubles
    cell: float
    surface: Doubles
    departure: Doubles

    def height(self, xy: Array) -> Doubles:
        """Height of the ground at ``xy`` (N, 2): ``(N,)``."""
        places = (xy - self.low) / self.cell - 0.5
        departure = map_coordinates(self.departure, places.T, order=1, mode="nearest")
        return np.asarray(_quadratic(xy) @ self.surface + departure)


def ground(points: Array, cell: float = 2.0, tolerance: float = 0.4) -> Ground:
    """Find the ground below ``points`` (N, 3 + F).

    A quadratic surface is fitted to the lowest points of the cells by regression to a low quantile, because
    many cells show no ground, only what stands on it. Lowest points near that surface are ground, and say,
    smoothed, how it departs from the surface.

    Args:
        points: x, y, z first, z up.
        cell: edge of the cells, metres.
        tolerance: how far ground may depart from the surface, metres.
    """
    xy = points[:, :2].astype(np.float64)
    if not len(points):
        return Ground(np.zeros(2), cell, np.zeros(6), np.zeros((1, 1)))
    low = xy.min(0)
    index = ((xy - low) / cell).astype(np.int64)
    shape = tuple((index.max(0) + 1).tolist())
    lowest = np.full(shape, np.inf)
    np.minimum.at(lowest, (index[:, 0], index[:, 1]), points[:, 2])
    seen = np.argwhere(np.isfinite(lowest))
    heights = lowest[seen[:, 0], seen[:, 1]]
    terms = _quadratic(low + (seen + 0.5) * cell)
    surface = _quantile_regression(terms, heights)
    residual = heights - terms @ surface
    level = np.abs(residual) <= tolerance
    amount, total = np.zeros(shape), np.zeros(shape)
    amount[tuple(seen[level].T)] = 1
    total[tuple(seen[level].T)] = residual[level]
    # Far from any ground the surface itself is the best guess: a little weight on departure 0.
    departure = gaussian_filter(total, 1.5) / (gaussian_filter(amount, 1.5) + 1e-3)
    return Ground(low, cell, surface, departure)


def _quadratic(xy: Array) -> Doubles:
    # In hundreds of metres, which keeps the terms of one order of magnitude.
    x, y = np.asarray(xy, np.float64).T / 100
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)


def _quantile_regression(terms: Doubles, values: Doubles, quantile: float = 0.3, rounds: int = 15) -> Doubles:
    """Coefficients of ``terms`` (N, K) below whose sum the share ``quantile`` of ``values`` lies: ``(K,)``.

    By reweighted least squares; a slight ridge decides where there are fewer values than coefficients.
    """
    weight = np.ones(len(values))
    ridge = 1e-3 * np.diag(np.arange(terms.shape[1]) > 0)
    for _ in range(rounds):
        weighted = terms * weight[:, None]
        coefficients = np.linalg.solve(terms.T @ weighted + ridge, weighted.T @ values)
        residual = values - terms @ coefficients
        weight = np.where(residual > 0, quantile, 1 - quantile) / np.maximum(np.abs(residual), 0.02)
    return np.asarray(coefficients)


def components(xy: Array, reach: Array | float, cell: float = 0.15) -> Ints:
    """Number of the cluster of each of ``xy`` (N, 2): points within ``reach`` (N,) of each other are joined.

    Points of one cell of edge ``cell``, metres, count as one.
    """
    reach = np.broadcast_to(np.asarray(reach, np.float64), len(xy))
    cells = np.floor(np.asarray(xy) / cell).astype(np.int64)
    _, first, place = np.unique(
        cells[:, 0] << 32 ^ (cells[:, 1] & 0xFFFFFFFF), return_index=True, return_inverse=True
    )
    places, reaches = np.asarray(xy)[first], reach[first]
    pairs = cKDTree(places).query_pairs(reaches.max(initial=0), output_type="ndarray")
    a, b = pairs.T
    near = np.linalg.norm(places[a] - places[b], axis=1) <= np.minimum(reaches[a], reaches[b])
    joined = coo_array((np.ones(near.sum(), bool), (a[near], b[near])), shape=(len(first), len(first)))
    _, labels = connected_components(joined, directed=False)
    return np.asarray(labels, np.int64)[place]


def fit_rectangles(xy: Array, starts: Ints) -> Doubles:
    """Rectangles round clusters, each in the direction, to 3°, in which its points lie nearest to the edges.

    Of an L, which is what a sensor sees of a box, this is the rectangle with its two sides; by least area it
    would be unsure, for another one, along the line between the ends of the L, has the same area. Zhang, Xu,
    Dong & Dolan 2017, "Efficient L-shape fitting for vehicle detection using laser scanners", from whose
    closeness it differs in that a distance counts as it is and not by its inverse.

    Args:
        xy: ``(N, 2)``, cluster by cluster.
        starts: ``(K,)`` where each cluster starts.

    Returns:
        ``(K, 5)``: centre x, y, length ≥ width, yaw in [0, π).
    """
    forward = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])
    left = np.stack([-forward[1], forward[0]])
    counts = np.diff(starts, append=len(xy))
    distance = np.full((len(xy), len(_ANGLES)), np.inf)
    middles, extents = [], []
    for axis in (forward, left):
        places = xy @ axis
        low, high = np.minimum.reduceat(places, starts), np.maximum.reduceat(places, starts)
        middle, extent = (low + high) / 2, high - low
        from_edge = np.repeat(extent / 2, counts, 0) - np.abs(places - np.repeat(middle, counts, 0))
        distance = np.minimum(distance, from_edge)
        middles.append(middle)
        extents.append(extent)
    best = np.add.reduceat(distance, starts).argmin(1)
    rows = np.arange(len(starts))
    middle, edges = (np.stack(pair, 2)[rows, best] for pair in (middles, extents))
    centre = middle[:, :1] * forward.T[best] + middle[:, 1:] * left.T[best]
    turned = edges[:, 0] < edges[:, 1]
    edges[turned] = edges[turned, ::-1]
    return np.concatenate([centre, edges, (_ANGLES[best] + turned * np.pi / 2)[:, None]], 1)


def cluster(scene: Scene, classes: Sequence[str], settings: Clustering | None = None) -> Detections:
    """Boxes in ``scene`` by geometry alone, best first; front and back of a box are not told apart.

    Args:
        scene: its points only are looked at.
        classes: names that give the labels; each needs a size in the settings.
        settings: `Clustering()` if not given.

    Raises:
        ValueError: a class has no size.
    """
    settings = settings or Clustering()
    if unknown := [name for name in classes if name not in settings.sizes]:
        raise ValueError(f"sizes: none for {', '.join(unknown)}; there are {', '.join(settings.sizes)}")
    points = scene.points[np.isfinite(scene.points[:, :3]).all(1), :3].astype(np.float64)
    base = ground(points)
    above = points[:, 2] - base.height(points[:, :2])
    standing = (above > settings.clearance) & (above < settings.ceiling)
    points, above = points[standing], above[standing]
    distance = np.linalg.norm(points[:, :2], axis=1)
    label = components(points[:, :2], settings.reach + settings.reach_per_metre * distance)
    large = np.bincount(label)[label] >= settings.min_points
    order = np.flatnonzero(large)[np.argsort(label[large], kind="stable")]
    if not len(order):
        return Detections.none()
    starts = np.flatnonzero(np.diff(label[order], prepend=-1))
    counts = np.diff(starts, append=len(order))
    rectangles = fit_rectangles(points[order, :2], starts)
    height = np.maximum.reduceat(above[order], starts)
    boxes, misfit = _grown(rectangles, height, [settings.sizes[name] for name in classes])
    best = misfit.argmin(1)
    rows = np.arange(len(best))
    score = np.exp(-misfit[rows, best] / 2) * counts / (counts + 10)
    chosen = boxes[rows, best]
    chosen[:, 2] += base.height(chosen[:, :2])
    keep = score >= settings.min_score
    found = Detections(
        torch.from_numpy(chosen[keep].astype(np.float32)),
        torch.from_numpy(score[keep].astype(np.float32)),
        torch.from_numpy(best[keep]),
    )
    return found[nms(found.boxes, found.scores, settings.overlap)]


def _grown(rectangles: Doubles, height: Doubles, sizes: Sequence[Size]) -> tuple[Doubles, Doubles]:
    """Box of each class round each cluster, standing on height 0, and how badly it fits.

    The sensor sees the near sides only: a box larger than its cluster grows away from it, and an edge that is
    too short tells less against a class than one too long. The longer edge of a cluster may be the width of a
    box, as of a car seen from behind.

    Args:
        rectangles: ``(K, 5)`` from `fit_rectangles`.
        height: ``(K,)`` of the clusters above the ground.
        sizes: of the C classes.

    Returns:
        boxes ``(K, C, 7)`` and misfits ``(K, C)``, squared deviations.
    """
    mean = np.array([[size.length, size.width, size.height] for size in sizes])
    spread = mean * np.array([[size.spread] for size in sizes])
    turned = rectangles[:, [0, 1, 3, 2, 4]] + [0, 0, 0, 0, np.pi / 2]
    both = np.stack([rectangles, turned], 1)[:, :, None]  # (K, 2, 1, 5)
    seen = np.concatenate(
        [both[..., 2:4], np.broadcast_to(height[:, None, None, None], (*both.shape[:3], 1))], 3
    )
    longer = np.maximum(seen - mean, 0) / spread
    # As a share of the whole edge: a missing half is as bad as one standard deviation too much.
    missing = 2 * np.maximum(mean - seen, 0) / mean
    # What stands on the ground is seldom hidden from above: too low tells as much as too high.
    missing[..., 2] = np.maximum(mean - seen, 0)[..., 2] / spread[:, 2]
    misfit = (longer**2 + missing**2).sum(3)  # (K, 2, C)
    way = misfit.argmin(1)  # (K, C)
    row, column = np.indices(way.shape)
    chosen = both[row, way, 0]
    edges = np.maximum(seen[row, way, 0], mean)
    growth = edges[..., :2] - chosen[..., 2:4]
    cos, sin = np.cos(chosen[..., 4]), np.sin(chosen[..., 4])
    forward, left = np.stack([cos, sin], 2), np.stack([-sin, cos], 2)
    offset = np.stack([(chosen[..., :2] * axis).sum(2) for axis in (forward, left)], 2)  # of box from sensor
    beside = np.abs(offset) > chosen[..., 2:4] / 2
    moved = np.where(beside, np.sign(offset) * growth / 2, 0)
    centre = chosen[..., :2] + moved[..., :1] * forward + moved[..., 1:] * left
    yaw = (chosen[..., 4:] + np.pi / 2) % np.pi - np.pi / 2
    return np.concatenate([centre, edges[..., 2:] / 2, edges, yaw], 2), misfit[row, way, column]
