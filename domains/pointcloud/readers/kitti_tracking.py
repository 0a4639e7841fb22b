"""KITTI's tracking benchmark: the scans of whole sequences."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..kitti_labels import IMAGE_SIZE, Calibration, parse_ignored, parse_labels
from ..scene import Scene
from .kitti import NAMES
from .point_files import COLUMNS, read_points
from .source import Source, count_points, folder, known_classes

# The tracking benchmark calls seated persons otherwise.
_RENAMED = {"Person": "Person_sitting"}


class KittiTracking(Source):
    """Scans of ``root/training``: ``velodyne/<sequence>/*.bin``, ``calib`` and ``label_02/<sequence>.txt``.

    Frames are called ``<sequence>_<number>``. The attributes are those of `Kitti` and ``track``; truncation,
    there 0, 1 or 2, becomes 0, ½ or 1.

    Args:
        root: the folder.
        sequences: which, such as ``("0000", "0012")``; none given is all.
        fov: keep only the points the camera sees, as only there is labelled.
        classes: what is to be found.
        image_size: width and height in pixels of the images, which are not read.

    Raises:
        FileNotFoundError: a folder or, when it is read, a file is missing.
        ValueError: an unknown class, or, when it is read, a broken file.
    """

    def __init__(
        self,
        root: str | Path,
        sequences: Sequence[str] = (),
        fov: bool = True,
        classes: Sequence[str] = NAMES,
        image_size: tuple[int, int] = IMAGE_SIZE,
    ) -> None:
        self.classes = known_classes(classes, NAMES, "KITTI")
        self.fov, self.image_size = fov, image_size
        for name in ("calib", "label_02"):
            folder(root, "training", name, what="KITTI tracking")
        velodyne = folder(root, "training", "velodyne", what="KITTI tracking")
        self.root = velodyne.parent
        chosen = sequences or sorted(path.name for path in velodyne.iterdir() if path.is_dir())
        self.keys = [
            (sequence, path.stem)
            for sequence in chosen
            for path in sorted(folder(velodyne, sequence, what="KITTI tracking").glob("*.bin"))
        ]

    def read(self, key: tuple[str, str]) -> Scene:
        """Read the frame ``(sequence, number)``."""
        sequence, frame = key
        calibration = Calibration.read(self.root / "calib" / f"{sequence}.txt", self.image_size)
        source = self.root / "velodyne" / sequence / f"{frame}.bin"
        points, features = read_points(source, COLUMNS)
        points = points[calibration.in_view(points)] if self.fov else points
        path = self.root / "label_02" / f"{sequence}.txt"
        rows = _labels(path).get(int(frame), ())
        lines = [" ".join(row[2:]) for row in rows]
        boxes, names, attributes = parse_labels(lines, calibration, f"labels '{path}', frame {int(frame)}")
        attributes["truncation"] = attributes["truncation"] / 2
        attributes["track"] = np.array([int(row[1]) for row in rows if row[2] != "DontCare"], np.int64)
        attributes["points"] = count_points(points, boxes)
        names = np.array([_RENAMED.get(name, name) for name in names.tolist()], np.str_)
        meta = {"calibration": calibration, "source": str(source)}
        meta["ignore"] = parse_ignored(lines, f"labels '{path}', frame {int(frame)}")
        return Scene(f"{sequence}_{frame}", points, features, boxes, names, None, attributes, meta)


@lru_cache(maxsize=32)
def _labels(path: Path) -> dict[int, list[list[str]]]:
    """Words of the lines of each frame."""
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist")
    frames: dict[int, list[list[str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            frame, _ = int(words[0]), int(words[1])
        except (ValueError, IndexError):
            raise ValueError(
                f"labels '{path}', line {number}: must start with frame and track, got '{line}'"
            ) from None
        frames.setdefault(frame, []).append(words)
    return frames
