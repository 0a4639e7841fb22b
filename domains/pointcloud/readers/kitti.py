"""KITTI's 3D object benchmark."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..kitti_labels import IMAGE_SIZE, Calibration, read_ignored, read_labels
from ..scene import Scene
from .point_files import COLUMNS, read_points
from .source import Source, count_points, folder, known_classes, listed

NAMES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")


class Kitti(Source):
    """Frames of ``root/training`` or ``root/testing``: ``velodyne``, ``calib`` and ``label_2``; no images.

    The frames of a split are listed in ``root/ImageSets/<split>.txt``: ``train`` and ``val`` as Chen et al.
    split them (3DOP, NIPS 2015: 3712 to train, 3769 to validate), or any list of your own. Boxes of every
    name are in the scenes, with the attributes that `read_labels` gives and ``points``; regions that are not
    labelled (``DontCare``) are ``meta["ignore"]``.

    Args:
        root: the folder.
        split: name of a list; ``test`` has no boxes; ``all`` needs no list: every labelled scan.
        fov: keep only the points the camera sees, as only there is labelled.
        classes: what is to be found.
        image_size: width and height in pixels of the images, which are not read.

    Raises:
        FileNotFoundError: a folder, a list or, when it is read, a file is missing.
        ValueError: an unknown class, or, when it is read, a broken file.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        fov: bool = True,
        classes: Sequence[str] = NAMES,
        image_size: tuple[int, int] = IMAGE_SIZE,
    ) -> None:
        self.classes = known_classes(classes, NAMES, "KITTI")
        self.split, self.fov, self.image_size = split, fov, image_size
        part = "testing" if split == "test" else "training"
        needed = ("velodyne", "calib") if split == "test" else ("velodyne", "calib", "label_2")
        for name in needed:
            folder(root, part, name, what="KITTI")
        self.root = folder(root, part, what="KITTI")
        if split == "all":
            self.keys = sorted(path.stem for path in (self.root / "velodyne").glob("*.bin"))
        else:
            self.keys = listed(
                Path(root).expanduser() / "ImageSets" / f"{split}.txt", f"KITTI's split {split}"
            )

    def read(self, key: str) -> Scene:
        """Read frame ``key``, such as ``"000123"``."""
        calibration = Calibration.read(self.root / "calib" / f"{key}.txt", self.image_size)
        source = self.root / "velodyne" / f"{key}.bin"
        points, features = read_points(source, COLUMNS)
        points = points[calibration.in_view(points)] if self.fov else points
        meta = {"calibration": calibration, "source": str(source)}
        if self.split == "test":
            return Scene(key, points, features, meta=meta)
        labels = self.root / "label_2" / f"{key}.txt"
        boxes, names, attributes = read_labels(labels, calibration)
        attributes["points"] = count_points(points, boxes)
        meta["ignore"] = read_ignored(labels)
        return Scene(key, points, features, boxes, np.asarray(names), None, attributes, meta)
