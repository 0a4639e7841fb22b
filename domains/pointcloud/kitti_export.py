"""Frames of any source as a folder in KITTI's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from .kitti_labels import IMAGE_BOX, Array, Calibration, write_labels
from .scene import Scene


class Scenes(Protocol):
    """A data source, or a list of frames."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Scene: ...


def export_kitti(root: str | Path, splits: Mapping[str, Scenes]) -> dict[str, int]:
    """Write ``training/{velodyne,label_2,calib}`` and ``ImageSets``, as of KITTI's object benchmark.

    Frames are numbered across the splits, from 000000. The calibration is ``meta["calibration"]`` where a
    frame has one, else `Calibration.default`. A box outside the image is left out, as KITTI leaves it;
    intensity is 0 where a frame has none; occlusion and the image's box come from the attributes where they
    are.

    Args:
        root: folder, which must be empty or missing.
        splits: frames by the name of their split, such as ``{"train": Simulator(500)}``.

    Returns:
        The number of frames in each split.

    Raises:
        ValueError: the folder is not empty.
    """
    root = Path(root).expanduser()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"export to '{root}': it must be an empty or a missing folder")
    for folder in ("velodyne", "label_2", "calib"):
        (root / "training" / folder).mkdir(parents=True)
    (root / "ImageSets").mkdir()
    number, counts = 0, {}
    for split, scenes in splits.items():
        first = number
        for index in range(len(scenes)):
            _write(root / "training", f"{number:06d}", scenes[index])
            number += 1
        names = "".join(f"{frame:06d}\n" for frame in range(first, number))
        (root / "ImageSets" / f"{split}.txt").write_text(names, encoding="utf-8")
        counts[split] = number - first
    return counts


def _write(folder: Path, name: str, scene: Scene) -> None:
    calibration: Calibration = scene.meta.get("calibration") or Calibration.default()
    calibration.write(folder / "calib" / f"{name}.txt")
    points = np.zeros((len(scene.points), 4), "<f4")
    points[:, :3] = scene.points[:, :3]
    if "intensity" in scene.features:
        points[:, 3] = scene.points[:, 3 + scene.features.index("intensity")]
    points.tofile(folder / "velodyne" / f"{name}.bin")

    image, _ = calibration.image_boxes(scene.boxes)
    seen = (image[:, 2:] > image[:, :2]).all(1)
    # Truncation is the image's unless the frame came with an image; a simulated one is that of the sensor.
    kept = ("occlusion", "alpha", *IMAGE_BOX, *(("truncation",) if IMAGE_BOX[0] in scene.attributes else ()))
    attributes: dict[str, Array] = {
        key: value[seen] for key, value in scene.attributes.items() if key in kept
    }
    write_labels(
        folder / "label_2" / f"{name}.txt",
        scene.boxes[seen],
        scene.names[seen],
        calibration=calibration,
        attributes=attributes,
        ignored=scene.meta.get("ignore"),
    )
