"""nuScenes: key frames with the sweeps before them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ..scene import Array, Scene
from .nuscenes_tables import Tables, split_of
from .point_files import read_points
from .source import Source, folder, known_classes, moved, one_of, pose

# Categories of the annotations, and the ten classes of the detection task (Caesar et al., CVPR 2020).
CLASS_OF = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
CLASSES = tuple(dict.fromkeys(CLASS_OF.values()))
SPLITS = ("train", "val", "test", "mini_train", "mini_val")
COLUMNS = ("x", "y", "z", "intensity", "ring")
# The sensor's x is to the right and y forward; a Scene's x is forward.
_TURN = pose((np.sqrt(0.5), 0, 0, -np.sqrt(0.5)), (0, 0, 0))
_NEAR = 1.0  # m; points of the car itself
_LONGEST = 1.5  # s between two boxes that a velocity may be taken from


class NuScenes(Source):
    """Key frames of ``root/<version>/*.json`` and ``root/{samples,sweeps}/LIDAR_TOP/*.pcd.bin``.

    A frame's name is the token of its sample. Coordinates are the LiDAR's, turned so that x is forward;
    ``meta["pose"]`` turns them into the world's. Features are the intensity, divided by 255, and the age of a
    point in seconds. Points within 1 m in both x and y of the sensor that took them, the car itself, are left
    out.
    Boxes that belong to none of the ten classes keep the name of their category. Attributes are ``points``,
    ``track``, ``attribute`` and ``visibility``, all as annotated.

    Args:
        root: the folder.
        version: of the data: ``v1.0-trainval``, ``v1.0-test`` or ``v1.0-mini``.
        split: ``train``, ``val``, ``test`` (without boxes), ``mini_train`` or ``mini_val``, by scenes.
        sweeps: how many scans a frame is made of, itself and those before it.
        classes: what is to be found.

    Raises:
        FileNotFoundError: a folder, a table or, when it is read, a scan is missing.
        ValueError: an unknown split or class, a version without such a split, or a broken file.
    """

    features: tuple[str, ...] = ("intensity", "time")

    def __init__(
        self,
        root: str | Path,
        version: str = "v1.0-trainval",
        split: str = "train",
        sweeps: int = 10,
        classes: Sequence[str] = CLASSES,
    ) -> None:
        self.split = one_of(split, SPLITS, "split")
        self.classes = known_classes(classes, CLASSES, "nuScenes")
        if sweeps < 1:
            raise ValueError(f"sweeps={sweeps}: a frame is made of at least 1")
        self.sweeps, self.root = sweeps, folder(root, what="nuScenes")
        self.tables = Tables(folder(root, version, what="nuScenes"))
        self.keys = [
            sample for sample, scene in self.tables.samples.items() if split_of(scene, version) == split
        ]
        if not self.keys:
            raise ValueError(f"nuScenes: version='{version}' has no frame of split='{split}'")

    def read(self, key: str) -> Scene:
        """Read the frame of sample ``key``."""
        scan = self.tables.scan_of(key)
        world = scan.pose @ _TURN.T
        points = self._points(scan.token, np.linalg.inv(world), scan.timestamp)
        meta: dict[str, Any] = {"pose": world, "timestamp": scan.timestamp, "sweeps": self.sweeps}
        meta["source"] = str(self.root / scan.filename)
        if self.split == "test":
            return Scene(key, points, self.features, meta=meta)
        boxes, names, velocities, attributes = self._labels(key, np.linalg.inv(world))
        return Scene(key, points, self.features, boxes, names, velocities, attributes, meta)

    def _points(self, token: str, scene_from_world: Array, now: float) -> Array:
        clouds = []
        for _ in range(self.sweeps):
            scan = self.tables.scan(token)
            cloud, _ = read_points(self.root / scan.filename, COLUMNS)
            cloud = cloud[(np.abs(cloud[:, :2]) >= _NEAR).any(1)]
            place = moved(scene_from_world @ scan.pose, cloud[:, :3])
            age = np.full(len(cloud), now - scan.timestamp)
            clouds.append(np.column_stack([place, cloud[:, 3] / 255, age]).astype(np.float32))
            if not scan.previous:
                break
            token = scan.previous
        return np.concatenate(clouds)

    def _labels(self, key: str, scene_from_world: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        tables = self.tables
        marks = [tables.annotations[token] for token in tables.annotated.get(key, ())]
        turn = Rotation.from_matrix(scene_from_world[:3, :3])
        boxes, velocities = np.zeros((len(marks), 7)), np.zeros((len(marks), 2))
        for row, mark in enumerate(marks):
            width, length, height = mark["size"]
            yaw = (turn * Rotation.from_quat(mark["rotation"], scalar_first=True)).as_euler("zyx")[0]
            boxes[row] = 0, 0, 0, length, width, height, yaw
            boxes[row, :3] = moved(scene_from_world, np.array([mark["translation"]]))[0]
            velocities[row] = turn.apply(self._velocity(mark))[:2]
        attributes: dict[str, Array] = {
            "points": np.array([mark["num_lidar_pts"] for mark in marks], np.int64),
            "track": np.array([mark["instance_token"] for mark in marks], np.str_),
            "attribute": np.array([tables.attribute(mark) for mark in marks], np.str_),
            "visibility": np.array([int(mark["visibility_token"] or 0) for mark in marks], np.int64),
        }
        categories = [tables.category(mark) for mark in marks]
        names = np.array([CLASS_OF.get(category, category) for category in categories], np.str_)
        return boxes.astype(np.float32), names, velocities.astype(np.float32), attributes

    def _velocity(self, mark: dict[str, Any]) -> Array:
        """In the world, m/s: from the boxes before and after, as far apart as 1.5 s each; else NaN."""
        first, last = (self.tables.annotations.get(mark[side], mark) for side in ("prev", "next"))
        times = [self.tables.times[one["sample_token"]] for one in (first, last)]
        passed = times[1] - times[0]
        steps = (first is not mark) + (last is not mark)
        if steps == 0 or not 0 < passed <= steps * _LONGEST:
            return np.full(3, np.nan)
        return np.asarray(np.subtract(last["translation"], first["translation"]) / passed)
