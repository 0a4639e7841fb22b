"""ONCE: One Million Scenes for autonomous driving."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..scene import Scene
from .point_files import COLUMNS, read_points
from .source import Source, count_points, folder, known_classes, listed, moved, one_of, pose

CLASSES = ("Car", "Bus", "Truck", "Pedestrian", "Cyclist")
SPLITS = ("train", "val", "test", "raw_small", "raw_medium", "raw_large")
# The files' x is to the left and y to the back; a Scene's x is forward.
_TURN = pose((np.sqrt(0.5), 0, 0, np.sqrt(0.5)), (0, 0, 0))


class Once(Source):
    """Frames of ``root/data/<sequence>``: ``<sequence>.json`` and ``lidar_roof/*.bin``.

    The sequences of a split are listed in ``root/ImageSets/<split>.txt``. A split with labels has only its
    labelled frames, the others all. Frames are called ``<sequence>_<frame>``; everything is turned so that x
    is forward; ``meta["pose"]`` turns the frame's coordinates into the world's.

    Args:
        root: the folder.
        split: ``train``, ``val``, ``test``, or ``raw_small``, ``raw_medium``, ``raw_large`` without boxes.
        classes: what is to be found.

    Raises:
        FileNotFoundError: a folder, a list, a sequence's JSON or, when it is read, a scan is missing.
        ValueError: an unknown split or class, or a broken file.
    """

    def __init__(self, root: str | Path, split: str = "train", classes: Sequence[str] = CLASSES) -> None:
        self.split = one_of(split, SPLITS, "split")
        self.classes = known_classes(classes, CLASSES, "ONCE")
        self.root = folder(root, "data", what="ONCE")
        sequences = listed(Path(root).expanduser() / "ImageSets" / f"{split}.txt", f"ONCE's split {split}")
        self.keys = [
            (sequence, frame)
            for sequence in sequences
            for frame, entry in _frames(self.root / sequence / f"{sequence}.json").items()
            if "annos" in entry or split.startswith("raw") or split == "test"
        ]

    def read(self, key: tuple[str, str]) -> Scene:
        """Read the frame ``(sequence, frame)``."""
        sequence, frame = key
        path = self.root / sequence / f"{sequence}.json"
        entry = _frames(path)[frame]
        source = self.root / sequence / "lidar_roof" / f"{frame}.bin"
        points, features = read_points(source, COLUMNS)
        points[:, :3] = moved(_TURN, points[:, :3])
        meta: dict[str, Any] = {"source": str(source), "timestamp": int(frame) / 1000}
        x, y, z, w, *place = entry["pose"]
        if any((x, y, z, w)):  # the pose of some frames is unknown, and given as zeros
            meta["pose"] = pose((w, x, y, z), place) @ _TURN.T
        labels = entry.get("annos", {})
        names = np.array(labels.get("names", []), np.str_)
        boxes = np.array(labels.get("boxes_3d", []), np.float64).reshape(-1, 7)
        if len(boxes) != len(names):
            raise ValueError(f"ONCE: '{path}', frame {frame}: {len(names)} names for {len(boxes)} boxes")
        boxes[:, :3] = moved(_TURN, boxes[:, :3])
        boxes[:, 6] = (boxes[:, 6] + np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
        boxes = boxes.astype(np.float32)
        attributes = {"points": count_points(points, boxes)}
        return Scene(f"{sequence}_{frame}", points, features, boxes, names, None, attributes, meta)


@lru_cache(maxsize=64)
def _frames(path: Path) -> dict[str, dict[str, Any]]:
    """What the JSON of a sequence says of each frame."""
    if not path.is_file():
        raise FileNotFoundError(f"ONCE: '{path}' does not exist")
    try:
        frames = json.loads(path.read_text(encoding="utf-8"))["frames"]
        return {str(frame["frame_id"]): frame for frame in frames}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"ONCE: '{path}' is not the description of a sequence ({error!r})") from error
