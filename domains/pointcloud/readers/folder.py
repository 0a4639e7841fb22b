"""A folder of one's own: files of points, and files of boxes beside them."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..scene import Array, Scene
from .point_files import ENDINGS, read_points
from .source import Source, count_points, folder

_FIELDS = 8  # x y z dx dy dz yaw name; a score may follow


class Folder(Source):
    """All files of points below a folder, or one file; a frame is called by its path without ending.

    A frame's boxes are in ``labels/<frame>.txt`` or ``labels/<frame>.json``, in the points' coordinates:

    * text: a line ``x y z dx dy dz yaw name`` a box, in metres and radians; more fields are not read;
    * JSON: ``{"boxes": [{"name": "Car", "box": [x, y, z, dx, dy, dz, yaw], "velocity": [vx, vy]}]}``, the
      velocity optional: the format in which predictions are written.

    An empty file, or an empty list, is a frame without boxes; a frame without a file is an error.

    Args:
        path: folder, or one file of points.
        labels: folder of the boxes, or ``None``: there are none.
        features: of each point, which the files must have.
        columns: all columns of .bin and .npy files in their order; the default is x, y, z and the features.
        classes: what is to be found; given, a box of another name is an error.
        intensity: the intensity in the files that becomes 1, such as 255.

    Raises:
        FileNotFoundError: the folder, or the boxes of a frame, are missing.
        ValueError: there is no file of points, two of the same name, or, when it is read, a broken one.
    """

    def __init__(
        self,
        path: str | Path,
        labels: str | Path | None = None,
        features: Sequence[str] = ("intensity",),
        columns: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        intensity: float = 1.0,
    ) -> None:
        self.root = Path(path).expanduser()
        if not self.root.exists():
            raise FileNotFoundError(f"path='{self.root}' does not exist")
        if not intensity > 0:
            raise ValueError(f"intensity={intensity} must be above 0")
        self.features, self.classes = tuple(features), tuple(classes)
        self.columns = ("x", "y", "z", *features) if columns is None else tuple(columns)
        missing = [name for name in ("x", "y", "z", *features) if name not in self.columns]
        if missing:
            raise ValueError(f"columns={', '.join(self.columns)}: {missing[0]} is not among them")
        self.intensity = intensity
        self.labels = None if labels is None else folder(labels, what="labels")
        self.keys = [self.root] if self.root.is_file() else sorted(_files(self.root))
        if not self.keys:
            raise ValueError(f"path='{self.root}' has no file of points: {', '.join(ENDINGS)}")
        names = [self.name(key) for key in self.keys]
        for one, two in pairwise(names):
            if one == two:
                raise ValueError(f"path='{self.root}' has two files of points called '{one}'")

    def name(self, key: Path) -> str:
        """Name of the frame in file ``key``."""
        inside = Path(key.name) if key == self.root else key.relative_to(self.root)
        name = inside.as_posix().removesuffix(inside.suffix)
        return name.removesuffix(".pcd")  # nuScenes' .pcd.bin

    def read(self, key: Path) -> Scene:
        """Read the frame in file ``key``."""
        named = key.suffix.lower() not in (".bin", ".npy")
        points, features = read_points(key, ("x", "y", "z", *self.features) if named else self.columns)
        places = [features.index(name) for name in self.features]
        points = points[:, [0, 1, 2, *(3 + place for place in places)]]
        if "intensity" in self.features:
            points[:, 3 + self.features.index("intensity")] /= self.intensity
        name, meta = self.name(key), {"source": str(key)}
        if self.labels is None:
            return Scene(name, points, self.features, meta=meta)
        path = self._labels_of(name)
        boxes, names, velocities = _read_json(path) if path.suffix == ".json" else _read_text(path)
        if not (boxes[:, 3:6] > 0).all():
            raise ValueError(f"labels '{path}': a box has an edge that is not above 0")
        for unknown in sorted(set(names.tolist()) - set(self.classes)) if self.classes else ():
            raise ValueError(f"labels '{path}': class '{unknown}' is not one of {', '.join(self.classes)}")
        attributes = {"points": count_points(points, boxes)}
        return Scene(name, points, self.features, boxes, names, velocities, attributes, meta)

    def _labels_of(self, name: str) -> Path:
        assert self.labels is not None
        for ending in (".txt", ".json"):
            path = self.labels / f"{name}{ending}"
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"frame {name} has no labels: neither '{self.labels / name}.txt' nor .json exists"
        )


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file()]


def _read_text(path: Path) -> tuple[Array, Array, None]:
    boxes, names = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            box = [float(word) for word in words[: _FIELDS - 1]]
        except ValueError:
            box = []
        if len(words) < _FIELDS or not np.isfinite(box).all() or len(box) != _FIELDS - 1:
            raise ValueError(
                f"labels '{path}', line {number}: must be x y z dx dy dz yaw name, got '{line.strip()}'"
            )
        boxes.append(box)
        names.append(words[_FIELDS - 1])
    return np.array(boxes, np.float32).reshape(-1, 7), np.array(names, np.str_), None


def _read_json(path: Path) -> tuple[Array, Array, Array | None]:
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["boxes"]
        boxes = np.array([entry["box"] for entry in entries], np.float32).reshape(len(entries), 7)
        names = np.array([entry["name"] for entry in entries], np.str_)
        unknown = [np.nan, np.nan]
        velocities = np.array([entry.get("velocity", unknown) for entry in entries], np.float32)
        velocities = velocities.reshape(len(entries), 2)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'labels \'{path}\': must be {{"boxes": [{{"name": …, "box": [7 numbers]}}, …]}} ({error!r})'
        ) from error
    if not np.isfinite(boxes).all():
        raise ValueError(f"labels '{path}': a box is not finite")
    return boxes, names, None if np.isnan(velocities).all() else velocities
