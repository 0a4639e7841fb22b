"""Look at a cloud before predicting: does it look like what a detector was trained on?

The usual reasons why a detector finds nothing in a foreign cloud are another height of the sensor, another
scale of the intensity, other axes or units, and points that lie outside the range that it looks at.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .clustering import ground
from .grid import Grid
from .scene import Array, Scene

# Fewer points than this in the range are too few to find anything in.
_FEW_POINTS = 200
# A smaller share of the points in the range is suspicious: a camera's field of view holds about a seventh.
_SMALL_SHARE = 0.1
# Detectors bear the ground's usual unevenness, not a sensor on another vehicle.
_GROUND_TOLERANCE = 0.5
_NEAR = 20.0
# What to multiply (x, y) with from the right, so that what lies in that direction lies ahead.
_QUARTER_TURNS = {
    "to the left": ((0, -1), (1, 0)),
    "to the back": ((-1, 0), (0, -1)),
    "to the right": ((0, 1), (-1, 0)),
}


@dataclass(frozen=True)
class CloudStatistics:
    """What the clouds of a dataset look like, the median over frames; plain numbers for a checkpoint.

    Attributes:
        points: number of points in the range.
        ground: height of the ground around the sensor, in metres; NaN where none was seen.
        intensity: 99th percentile of the intensity; NaN where there is none.
    """

    points: float
    ground: float
    intensity: float

    @classmethod
    def of(cls, scenes: Iterable[Scene], grid: Grid) -> "CloudStatistics":
        """Of some frames, which a few dozen represent well.

        Raises:
            ValueError: there is no frame.
        """
        rows = [
            (_inside(scene.points, grid).sum(), ground_height(scene.points), _intensity(scene))
            for scene in scenes
        ]
        if not rows:
            raise ValueError("scenes must hold at least one frame to take statistics of")
        table = np.array(rows, dtype=np.float64)
        known = [column[~np.isnan(column)] for column in table.T]
        points, ground, intensity = (float(np.median(c)) if len(c) else float("nan") for c in known)
        return cls(points, ground, intensity)


def check_cloud(scene: Scene, grid: Grid, training: CloudStatistics | None = None) -> dict[str, str]:
    """What looks wrong with a frame: a sentence by kind, empty for a good one.

    The kinds are ``points``, ``units``, ``axes``, ``ground``, ``range`` and ``intensity``.

    Args:
        scene: the frame.
        grid: range that the detector looks at.
        training: what the frames it was trained on look like; without it only the grid is known.
    """
    # In double precision, as squares of misread numbers may overflow.
    points = scene.points[np.isfinite(scene.points[:, :3]).all(1)].astype(np.float64)
    dropped = len(scene.points) - len(points)
    if len(points) == 0:
        return {"points": "the cloud holds no point" + (" that is not NaN" if dropped else "")}
    found = {}
    inside = _inside(points, grid)
    expected = np.nan if training is None else training.points
    if inside.sum() < max(_FEW_POINTS, 0 if np.isnan(expected) else 0.1 * expected):
        usual = "" if np.isnan(expected) else f", training frames hold about {expected:.0f}"
        found["points"] = f"only {inside.sum()} of {len(points)} points lie in the range{usual}"
    elif dropped:
        found["points"] = f"{dropped} of {len(scene.points)} points are NaN or infinite and not used"
    if units := _units(points):
        found["units"] = units
    elif axes := _axes(points):
        found["axes"] = axes
    else:
        if height := _height(points, grid, training):
            found["ground"] = height
        if place := _range(points, grid):
            found["range"] = place
    if intensity := _check_intensity(scene, training):
        found["intensity"] = intensity
    return found


def summarize(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One sentence for each kind of finding, not one for each frame.

    Args:
        found: what `check_cloud` found, by name of the frame; frames without findings count too.
    """
    kinds: dict[str, list[str]] = {}
    for frame, findings in found.items():
        for kind in findings:
            kinds.setdefault(kind, []).append(frame)
    if len(found) == 1:
        return [f"frame {frames[0]}: {found[frames[0]][kind]}" for kind, frames in kinds.items()]
    return [
        f"{len(frames)} of {len(found)} frames, such as {frames[0]}: {found[frames[0]][kind]}"
        for kind, frames in kinds.items()
    ]


def ground_height(points: Array) -> float:
    """Height of the ground within 20 m of the sensor, NaN where no point is.

    Args:
        points: ``(N, 3+)`` in metres, z up.
    """
    seen = points[np.isfinite(points[:, :3]).all(1)]
    near = seen[np.hypot(seen[:, 0], seen[:, 1]) < _NEAR]
    # All points shape the surface: those that are near may show nothing but a wall.
    return float(np.median(ground(seen).height(near[:, :2]))) if len(near) else float("nan")


def _inside(points: Array, grid: Grid) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(((points[:, :3] >= grid.low) & (points[:, :3] < grid.high)).all(1))


def _units(points: Array) -> str:
    centre = np.median(points[:, :3], 0)
    reach = float(np.quantile(np.linalg.norm(points[:, :3] - centre, axis=1), 0.95))
    if reach > 1e6:
        return (
            f"the cloud spans {2 * reach:.0e} units: is the file's data of another type than it is read as?"
        )
    if reach > 1000:
        return f"the cloud spans {2 * reach:.0f} units: are they millimetres? Give metres"
    if reach < 2:
        return f"the cloud spans only {2 * reach:.2f} m: is it in other units, or scaled?"
    if np.linalg.norm(centre) > 300:
        place = ", ".join(f"{number:.0f}" for number in centre)
        return (
            f"the middle of the cloud lies at ({place}) m, far from the origin: give coordinates in the"
            " sensor's frame, not on a map"
        )
    return ""


def _axes(points: Array) -> str:
    spread = np.diff(np.quantile(points[:, :3], (0.05, 0.95), axis=0), axis=0)[0]
    flat = int(np.argmin(spread))
    # Half as long again: between house fronts a cloud is narrow too.
    if flat != 2 and spread[2] > 1.5 * spread[flat]:
        return (
            f"the cloud is flat along {'xyz'[flat]} ({spread[flat]:.1f} m) and not along z"
            f" ({spread[2]:.1f} m): give x forward, y to the left, z up"
        )
    near = points[np.hypot(points[:, 0], points[:, 1]) < _NEAR]
    if len(near) and _floor_share(near[:, 2]) < 0.5 * _floor_share(-near[:, 2]):
        return "the ground seems to lie above everything else: does z point down? Give z up"
    return ""


def _floor_share(height: Array) -> float:
    """Share of the points in the lowest metre, above the lowest hundredth."""
    return float((height < np.quantile(height, 0.01) + 1.0).mean())


def _height(points: Array, grid: Grid, training: CloudStatistics | None) -> str:
    height = ground_height(points)
    if np.isnan(height):
        return ""
    if training is not None and not np.isnan(training.ground):
        if abs(height - training.ground) > _GROUND_TOLERANCE:
            return (
                f"the ground lies at z = {height:.2f} m, in training at {training.ground:.2f} m:"
                f" add {training.ground - height:+.2f} m to z"
            )
        return ""
    low, high = grid.low[2], grid.high[2]
    # The origin of some datasets lies on the ground, in the middle of their range.
    if not low <= height < low + 2 / 3 * (high - low):
        return (
            f"the ground lies at z = {height:.2f} m, not in the lower part of the range {low:g}…{high:g} m:"
            " shift z or change the range"
        )
    return ""


def _range(points: Array, grid: Grid) -> str:
    share = float(_inside(points, grid).mean())
    best, direction = share, ""
    for name, turn in _QUARTER_TURNS.items():
        ahead = np.concatenate([points[:, :2] @ np.array(turn), points[:, 2:3]], 1)
        if (other := float(_inside(ahead, grid).mean())) > best:
            best, direction = other, name
    # Nearly all lies in one direction: a cloud cut to a field of view, which the range should meet.
    if (best > 0.9 and share < 0.7) or share < _SMALL_SHARE < best:
        return (
            f"{share:.1%} of the points lie in the range, looking {direction} it would be {best:.1%}:"
            " does x point forward?"
        )
    if share < _SMALL_SHARE:
        limits = ", ".join(f"{axis} {l:g}…{h:g}" for axis, l, h in zip("xyz", grid.low, grid.high))
        return f"only {share:.1%} of the points lie in the range {limits} m"
    return ""


def _intensity(scene: Scene) -> float:
    if "intensity" not in scene.features or len(scene.points) == 0:
        return float("nan")
    return float(np.nanquantile(scene.points[:, 3 + scene.features.index("intensity")], 0.99))


def _check_intensity(scene: Scene, training: CloudStatistics | None) -> str:
    top = _intensity(scene)
    if np.isnan(top):
        return ""
    expected = np.nan if training is None else training.intensity
    if top > 1.5 and not expected > 1.5:
        bottom = float(np.nanmin(scene.points[:, 3 + scene.features.index("intensity")]))
        if bottom < 0:
            return (
                f"intensity goes from {bottom:.0f} to {top:.0f}, expected 0 to 1:"
                f" are the file's columns x, y, z, {', '.join(scene.features)}?"
            )
        scale = 65535 if top > 255 else 255
        return f"intensity reaches {top:.0f}, expected 0 to 1: divide it by {scale}"
    if top <= 1 and expected > 1.5:
        return f"intensity reaches only {top:.2f}, in training {expected:.0f}: multiply it by 255"
    if top <= 0 and expected > 0:
        return "intensity is 0 everywhere, in training it was not"
    return ""
