"""Argoverse 2's Sensor data set."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from ..scene import Array, Scene
from .source import Source, folder, known_classes, one_of, pose

# The 26 classes of the 3D detection benchmark (Wilson et al., NeurIPS Datasets 2021).
CLASSES = (
    "REGULAR_VEHICLE", "PEDESTRIAN", "BICYCLIST", "MOTORCYCLIST", "WHEELED_RIDER", "BOLLARD",
    "CONSTRUCTION_CONE", "SIGN", "CONSTRUCTION_BARREL", "STOP_SIGN", "MOBILE_PEDESTRIAN_CROSSING_SIGN",
    "LARGE_VEHICLE", "BUS", "BOX_TRUCK", "TRUCK", "VEHICULAR_TRAILER", "TRUCK_CAB", "SCHOOL_BUS",
    "ARTICULATED_BUS", "MESSAGE_BOARD_TRAILER", "BICYCLE", "MOTORCYCLE", "WHEELED_DEVICE", "WHEELCHAIR",
    "STROLLER", "DOG",
)  # fmt: skip
SPLITS = ("train", "val", "test")
_POINTS = ("x", "y", "z", "intensity")


class Argoverse2(Source):
    """Sweeps of ``root/<split>/<log>/sensors/lidar/*.feather``, called ``<log>_<timestamp>``.

    Coordinates are the vehicle's: the origin lies on the ground below the rear axle. Intensity is divided by
    255. Boxes of every category are in the scenes, with the attributes ``points`` and ``track``;
    ``meta["pose"]`` turns the frame's coordinates into the city's, where the log has poses.

    Args:
        root: the folder that holds the splits.
        split: ``train``, ``val`` or ``test`` (without boxes).
        classes: what is to be found.

    Raises:
        FileNotFoundError: a folder or, when it is read, a file is missing, or there is no sweep at all.
        ValueError: an unknown split or class, or, when it is read, a file without the columns it must have.
    """

    def __init__(self, root: str | Path, split: str = "train", classes: Sequence[str] = CLASSES) -> None:
        self.split = one_of(split, SPLITS, "split")
        self.classes = known_classes(classes, CLASSES, "Argoverse 2")
        self.root = folder(root, split, what="Argoverse 2")
        self.keys = sorted(self.root.glob("*/sensors/lidar/*.feather"))
        if not self.keys:
            raise FileNotFoundError(f"Argoverse 2: '{self.root}' has no <log>/sensors/lidar/*.feather")

    def read(self, key: Path) -> Scene:
        """Read the sweep in file ``key``."""
        log, time = key.parents[2], int(key.stem)
        points = _table(key, _POINTS).loc[:, list(_POINTS)].to_numpy(np.float32)
        points[:, 3] /= 255
        meta: dict[str, Any] = {"source": str(key), "timestamp": time * 1e-9}
        if (log / "city_SE3_egovehicle.feather").is_file():
            poses = _table(log / "city_SE3_egovehicle.feather", ("timestamp_ns", "qw", "tx_m"))
            now = poses[poses.timestamp_ns == time]
            if len(now):
                meta["pose"] = pose(
                    _columns(now, "qw", "qx", "qy", "qz")[0], _columns(now, "tx_m", "ty_m", "tz_m")[0]
                )
        name = f"{log.name}_{key.stem}"
        if self.split == "test":
            return Scene(name, points, self.features, meta=meta)
        labels = _annotations(log / "annotations.feather")
        rows = labels[labels.timestamp_ns == time]
        turns = Rotation.from_quat(_columns(rows, "qx", "qy", "qz", "qw").reshape(-1, 4))
        yaw = turns.as_euler("zyx")[:, 0] if len(rows) else np.zeros(0)
        sizes = _columns(rows, "tx_m", "ty_m", "tz_m", "length_m", "width_m", "height_m")
        boxes = np.column_stack([sizes, yaw]).astype(np.float32)
        attributes = {"points": rows.num_interior_pts.to_numpy(np.int64)}
        attributes["track"] = rows.track_uuid.to_numpy(np.str_)
        names = rows.category.to_numpy(np.str_)
        return Scene(name, points, self.features, boxes, names, None, attributes, meta)


@lru_cache(maxsize=8)
def _annotations(path: Path) -> pd.DataFrame:
    return _table(
        path, ("timestamp_ns", "category", "track_uuid", "tx_m", "length_m", "qw", "num_interior_pts")
    )


def _table(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"Argoverse 2: '{path}' does not exist")
    try:
        table = pd.read_feather(path)
    except Exception as error:
        raise ValueError(f"Argoverse 2: '{path}' cannot be read: {' '.join(str(error).split())}") from error
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(
            f"Argoverse 2: '{path}' has no column '{missing[0]}'; it has {', '.join(map(str, table.columns))}"
        )
    return table


def _columns(table: pd.DataFrame, *names: str) -> Array:
    return table.loc[:, list(names)].to_numpy(np.float64)
