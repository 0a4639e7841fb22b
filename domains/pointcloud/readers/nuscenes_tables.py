"""nuScenes' relational tables, as far as LiDAR detection needs them."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..scene import Array
from .source import pose

Row = dict[str, Any]

# Numbers of the scenes, from first to last, that the benchmark validates with; the others train.
_VALIDATION = (
    (3, 3), (12, 18), (35, 36), (38, 39), (92, 110), (221, 221), (268, 278), (329, 332), (344, 346),
    (519, 524), (552, 565), (625, 627), (629, 630), (632, 638), (770, 771), (775, 775), (777, 778),
    (780, 784), (794, 800), (802, 802), (904, 917), (919, 931), (962, 963), (966, 969), (971, 972),
    (1059, 1073),
)  # fmt: skip
_MINI_VALIDATION = (103, 916)


def split_of(scene: str, version: str) -> str:
    """Name of the official split that ``scene``, such as ``"scene-0061"``, is in."""
    number = int(scene.rpartition("-")[2])
    if version.endswith("mini"):
        return "mini_val" if number in _MINI_VALIDATION else "mini_train"
    if version.endswith("test"):
        return "test"
    return "val" if any(first <= number <= last for first, last in _VALIDATION) else "train"


@dataclass(frozen=True)
class Scan:
    """One turn of the LiDAR: its pose (4, 4) in the world, seconds, file, and the token of the one before."""

    token: str
    pose: Array
    timestamp: float
    filename: str
    previous: str


class Tables:
    """The tables of one version.

    Attributes:
        samples: name of the scene of each sample, in the order of the table.
        times: of each sample, in seconds.
        annotations: rows by token.
        annotated: tokens of the annotations of each sample.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        scenes = {row["token"]: row["name"] for row in self._rows("scene")}
        samples = self._rows("sample")
        self.samples = {row["token"]: scenes[row["scene_token"]] for row in samples}
        self.times = {row["token"]: row["timestamp"] * 1e-6 for row in samples}
        lidar = {row["token"] for row in self._rows("sensor") if row["channel"] == "LIDAR_TOP"}
        sensors = self._rows("calibrated_sensor")
        self._mounts = {row["token"]: row for row in sensors if row["sensor_token"] in lidar}
        scans = [row for row in self._rows("sample_data") if row["calibrated_sensor_token"] in self._mounts]
        self._scans = {row["token"]: row for row in scans}
        self._keys = {row["sample_token"]: row["token"] for row in scans if row["is_key_frame"]}
        wanted = {row["ego_pose_token"] for row in scans}
        self._poses = {row["token"]: row for row in self._rows("ego_pose") if row["token"] in wanted}
        self.annotations = {row["token"]: row for row in self._rows("sample_annotation")}
        self.annotated: dict[str, list[str]] = defaultdict(list)
        for row in self.annotations.values():
            self.annotated[row["sample_token"]].append(row["token"])
        categories = {row["token"]: row["name"] for row in self._rows("category")}
        self._categories = {row["token"]: categories[row["category_token"]] for row in self._rows("instance")}
        self._attributes = {row["token"]: row["name"] for row in self._rows("attribute")}

    def scan(self, token: str) -> Scan:
        """The scan with this token."""
        row = self._scans[token]
        mount, car = self._mounts[row["calibrated_sensor_token"]], self._poses[row["ego_pose_token"]]
        world = pose(car["rotation"], car["translation"]) @ pose(mount["rotation"], mount["translation"])
        return Scan(token, np.asarray(world), row["timestamp"] * 1e-6, row["filename"], row["prev"])

    def scan_of(self, sample: str) -> Scan:
        """The scan at a sample's own time."""
        if sample not in self._keys:
            raise ValueError(
                f"nuScenes: sample_data of '{self.root}' has no LIDAR_TOP scan of sample {sample}"
            )
        return self.scan(self._keys[sample])

    def category(self, annotation: Row) -> str:
        """Name of the category of an annotation."""
        return str(self._categories[annotation["instance_token"]])

    def attribute(self, annotation: Row) -> str:
        """Name of the attribute of an annotation, empty where it has none."""
        tokens = annotation["attribute_tokens"]
        return str(self._attributes[tokens[0]]) if tokens else ""

    def _rows(self, table: str) -> list[Row]:
        path = self.root / f"{table}.json"
        if not path.is_file():
            raise FileNotFoundError(f"nuScenes: table '{path}' does not exist")
        try:
            rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"nuScenes: table '{path}' is not JSON ({error})") from error
        return rows
