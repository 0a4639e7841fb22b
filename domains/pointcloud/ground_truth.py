"""Ground-truth sampling: labelled objects of other frames are put into a frame, with their points.

Source: Yan et al., "SECOND: Sparsely Embedded Convolutional Detection", Sensors 2018, section 3.4.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from .boxes import points_in_boxes
from .clustering import ground
from .overlap import bev_intersection
from .scene import Array, Scene

# A box stays no further above or below the ground than this (m), whatever it did in its own frame.
_CLEARANCE = 0.3
# Where the ground lies further from that of the object's frame (m), there is a house, or nothing was seen.
_STEP = 1.0


@dataclass(frozen=True)
class ObjectDatabase:
    """K labelled objects with their points, cut out of many frames.

    Attributes:
        points: ``(P, 3 + F)`` float32, the points of all objects end to end.
        starts: ``(K + 1,)``: those of object k are ``points[starts[k] : starts[k + 1]]``.
        boxes: ``(K, 7)`` float32.
        names: ``(K,)`` classes.
        velocities: ``(K, 2)`` float32 m/s, NaN where unknown.
        clearance: ``(K,)``: height of the box's bottom above the ground, in metres; NaN where unknown.
        features: names of the F features of the points.
        attributes: further ``(K,)`` arrays by name, those that all the frames have.
    """

    points: Array
    starts: Array
    boxes: Array
    names: Array
    velocities: Array
    clearance: Array
    features: tuple[str, ...]
    attributes: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def collect(
        cls,
        scenes: Iterable[Scene],
        classes: Sequence[str],
        *,
        min_points: int = 5,
        hardest: Mapping[str, float] | None = None,
    ) -> "ObjectDatabase":
        """Cut the objects out of labelled frames.

        Args:
            scenes: the frames, such as a data source of training frames.
            classes: objects of other classes are left out.
            min_points: objects with fewer points are left out.
            hardest: the highest value that an attribute may have, such as ``{"difficulty": 2}``.

        Raises:
            ValueError: frames with different features, or without an attribute of ``hardest``; no frame at
                all, or none with such an object.
        """
        parts: list[_Cut] = []
        features: tuple[str, ...] | None = None
        for scene in scenes:
            if features is not None and scene.features != features:
                raise ValueError(f"frame {scene.id} has the features {scene.features}, others {features}")
            features = scene.features
            parts.append(_cut(scene, classes, min_points, hardest or {}))
        if features is None or not any(len(part.boxes) for part in parts):
            raise ValueError(
                f"{len(parts)} frames hold no object of the classes {', '.join(classes)} with at least"
                f" {min_points} points: there is nothing to sample from"
            )
        common = set.intersection(*(set(part.attributes) for part in parts))
        counts = np.concatenate([part.counts for part in parts])
        return cls(
            np.concatenate([part.points for part in parts]),
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.velocities for part in parts]),
            np.concatenate([part.clearance for part in parts]),
            features,
            {name: np.concatenate([part.attributes[name] for part in parts]) for name in sorted(common)},
        )

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` file."""
        arrays: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("points", "starts", "boxes", "names", "velocities", "clearance")
        }
        arrays["features"] = np.array(self.features, np.str_)
        arrays |= {f"attribute/{name}": values for name, values in self.attributes.items()}
        # By a handle, or numpy appends a suffix to other names.
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "ObjectDatabase":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, TypeError, EOFError, BadZipFile):
            raise ValueError(f"'{path}' is not a database of objects, or is cut off") from None
        attributes = {
            name.removeprefix("attribute/"): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("attribute/")
        }
        try:
            features = tuple(str(name) for name in arrays.pop("features"))
            return cls(**arrays, features=features, attributes=attributes)
        except (KeyError, TypeError):
            raise ValueError(f"'{path}' holds {', '.join(arrays)}, not a database of objects") from None

    def __len__(self) -> int:
        return len(self.boxes)

    def crop(self, row: int) -> Array:
        """The points of an object, ``(n, 3 + F)``, where it was found."""
        return self.points[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class GroundTruthSampling:
    """Put objects of a database into a frame until it has enough of each class.

    An object comes to where it was in its own frame, seen from the sensor, so that its points suit their
    distance; only its height follows the ground. It is left out where it would touch another box, or would
    have to be moved up or down by more than 1 m. The frame's points inside of it give way to its own.

    Attributes:
        database: where the objects come from.
        counts: how many of each class a frame shall have, such as ``{"Car": 15}``.

    Raises:
        ValueError: the database has no object of a class.
    """

    database: ObjectDatabase
    counts: Mapping[str, int]

    def __post_init__(self) -> None:
        known = sorted(set(self.database.names.tolist()))
        for name in self.counts:
            if name not in known:
                raise ValueError(
                    f"counts: the database has no object of class '{name}', only {', '.join(known)}"
                )

    def __call__(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """The frame with sampled objects, which come after its own; the frame itself stays as it is.

        Raises:
            ValueError: the frame's points have other features than the database's.
        """
        database = self.database
        if scene.features != database.features:
            raise ValueError(
                f"frame {scene.id} has the features {scene.features}, the database {database.features}"
            )
        rows = self._draw(scene, generator)
        lift = _lift(database.boxes[rows], database.clearance[rows], scene.points)
        level = np.abs(lift) <= _STEP
        rows, lift = rows[level], lift[level]
        free = self._free(rows, scene)
        rows, lift = rows[free], lift[free]
        if len(rows) == 0:
            return scene
        boxes = database.boxes[rows].copy()
        boxes[:, 2] += lift
        crops = [database.crop(row).copy() for row in rows]
        for crop, height in zip(crops, lift):
            crop[:, 2] += height
        hidden = _inside(scene.points, boxes).any(1)
        velocities = scene.velocities
        if velocities is not None:
            velocities = np.concatenate([velocities, database.velocities[rows]])
        return replace(
            scene,
            points=np.concatenate([scene.points[~hidden], *crops]),
            boxes=np.concatenate([scene.boxes, boxes]),
            names=np.concatenate([scene.names, database.names[rows]]),
            velocities=velocities,
            attributes={
                name: _joined(values, database.attributes.get(name), rows)
                for name, values in scene.attributes.items()
            },
        )

    def _draw(self, scene: Scene, generator: np.random.Generator) -> Array:
        """Rows of the database to try, in random order."""
        drawn = [np.zeros(0, np.int64)]
        for name, count in self.counts.items():
            missing = count - int((scene.names == name).sum())
            pool = np.flatnonzero(self.database.names == name)
            if missing > 0:
                drawn.append(generator.choice(pool, min(missing, len(pool)), replace=False))
        return generator.permutation(np.concatenate(drawn))

    def _free(self, rows: Array, scene: Scene) -> Array:
        """Places in ``rows`` of boxes that touch neither the frame's nor each other's, earlier ones first."""
        tried = torch.from_numpy(self.database.boxes[rows])
        there = torch.from_numpy(scene.boxes.astype(np.float32))
        blocked = (bev_intersection(tried, there) > 0).any(1).numpy()
        touching = (bev_intersection(tried, tried) > 0).numpy()
        kept: list[int] = []
        for place in np.flatnonzero(~blocked):
            if not touching[place, kept].any():
                kept.append(int(place))
        return np.array(kept, np.int64)


@dataclass(frozen=True)
class _Cut:
    """The objects of one frame, as in `ObjectDatabase`, but for the number of points of each."""

    points: Array
    counts: Array
    boxes: Array
    names: Array
    velocities: Array
    clearance: Array
    attributes: dict[str, Array]


def _cut(scene: Scene, classes: Sequence[str], min_points: int, hardest: Mapping[str, float]) -> _Cut:
    wanted = np.isin(scene.names, list(classes))
    for name, limit in hardest.items():
        if name not in scene.attributes:
            raise ValueError(
                f"hardest: frame {scene.id} has no attribute '{name}', only {', '.join(scene.attributes)}"
            )
        wanted &= np.asarray(scene.attributes[name]) <= limit
    rows = np.flatnonzero(wanted)
    inside = _inside(scene.points, scene.boxes[rows])
    enough = inside.sum(0) >= min_points
    rows, inside = rows[enough], inside[:, enough]
    boxes = scene.boxes[rows].astype(np.float32)
    places = np.nonzero(inside.T)[1]
    velocities = np.full((len(rows), 2), np.nan) if scene.velocities is None else scene.velocities[rows]
    return _Cut(
        scene.points[places].astype(np.float32),
        inside.sum(0),
        boxes,
        np.asarray(scene.names[rows], np.str_),
        velocities.astype(np.float32),
        boxes[:, 2] - boxes[:, 5] / 2 - _ground_height(scene.points, boxes[:, :2]),
        {name: np.asarray(values)[rows] for name, values in scene.attributes.items()},
    )


def _ground_height(points: Array, places: Array) -> Array:
    """Height of the ground at ``places`` (M, 2): ``(M,)`` metres, NaN where the frame has no points."""
    seen = points[np.isfinite(points[:, :3]).all(1)]
    if len(seen) == 0:
        return np.full(len(places), np.nan)
    return ground(seen).height(places)


def _lift(boxes: Array, clearance: Array, points: Array) -> Array:
    """How much higher each box must come to lie as far above the ground as in its own frame: ``(n,)``."""
    level = _ground_height(points, boxes[:, :2])
    above = np.where(np.isfinite(clearance), clearance, 0).clip(-_CLEARANCE, _CLEARANCE)
    lift = level + above - (boxes[:, 2] - boxes[:, 5] / 2)
    return np.where(np.isfinite(lift), lift, 0).astype(np.float32)


def _joined(values: Array, more: Array | None, rows: Array) -> Array:
    """An attribute of the frame's boxes, then of the sampled ones: NaN, −1 or "" where it is unknown."""
    if more is not None:
        return np.concatenate([values, more[rows]])
    kind = np.asarray(values).dtype.kind
    missing: Any = {"f": np.nan, "i": -1, "U": ""}.get(kind, values.dtype.type())
    return np.concatenate([values, np.full(len(rows), missing, values.dtype)])


def _inside(points: Array, boxes: Array) -> Array:
    """Which points lie in which boxes, ``(N, M)``."""
    xyz = torch.from_numpy(np.ascontiguousarray(points[:, :3], np.float32))
    return points_in_boxes(xyz, torch.from_numpy(np.asarray(boxes, np.float32))).numpy()
