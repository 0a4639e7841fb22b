"""The real KITTI frames beside the repository, written in the benchmark's layout."""

import importlib.util
import json
import lzma
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mainstem.domains.pointcloud.scene import Array

REAL = Path(__file__).parents[4] / "shared" / "data" / "lidar"
OBJECT, TRACKING = REAL / "kitti_object", REAL / "kitti_tracking_0000"
DRIVE = "2011_09_26_drive_0005_sync"  # of the tracking frames
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real frames")


def scans(folder: Path) -> list[Array]:
    """The packed scans, (N, 4) each, by the loader that lies beside them."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unpacked: list[Array] = module.load_frames(folder / "velodyne_fov.npz")
    return unpacked


def object_frames() -> list[str]:
    """The object benchmark's frames, in the scans' order."""
    return [frame["id"] for frame in json.loads((OBJECT / "frames.json").read_text())]


def drives() -> dict[str, str]:
    """The drive that each of the object benchmark's frames is of, by the development kit's tables."""
    with lzma.open(OBJECT / "train_mapping.txt.xz", "rt") as file:
        recordings = [line.split()[1] for line in file]
    places = [int(place) for place in (OBJECT / "train_rand.txt").read_text().split(",")]
    return {frame: recordings[places[int(frame)] - 1] for frame in object_frames()}


def split_by_drive() -> dict[str, list[str]]:
    """``mini_val``: the frames of the official validation part; ``mini_train``: those of all other drives."""
    official = set((OBJECT / "ImageSets_val.txt").read_text().split())
    drive = drives()
    val = [frame for frame in drive if frame in official]
    seen = {drive[frame] for frame in val}
    return {"mini_train": [frame for frame in drive if drive[frame] not in seen], "mini_val": val}


def write_layout(root: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """Write the frames of ``lists`` and the lists, named as the keys."""
    folders = {name: root / "training" / name for name in ("velodyne", "calib", "label_2")}
    for folder in (*folders.values(), root / "ImageSets"):
        folder.mkdir(parents=True)
    unpacked = dict(zip(object_frames(), scans(OBJECT)))
    for name, frames in lists.items():
        for frame in frames:
            unpacked[frame].tofile(folders["velodyne"] / f"{frame}.bin")
            for part in ("calib", "label_2"):
                shutil.copy(OBJECT / part / f"{frame}.txt", folders[part])
        (root / "ImageSets" / f"{name}.txt").write_text("".join(f"{frame}\n" for frame in frames))


def add_drive(root: Path, name: str, every: int) -> list[str]:
    """Write every so many-th tracking frame as one of the object benchmark, and add it to the list ``name``.

    Raises:
        ValueError: another list has frames of the same drive.
    """
    of = drives()
    lists = {path.stem: path.read_text().split() for path in (root / "ImageSets").glob("*.txt")}
    others = [other for other, frames in lists.items() if other != name and DRIVE in map(of.get, frames)]
    if others:
        raise ValueError(f"the list {others[0]} has frames of the drive {DRIVE} too")
    rows = [line.split() for line in (TRACKING / "label_02.txt").read_text().splitlines()]
    added = []
    for number, scan in list(enumerate(scans(TRACKING)))[::every]:
        frame = f"0005_{number:06d}"
        scan.tofile(root / "training" / "velodyne" / f"{frame}.bin")
        shutil.copy(TRACKING / "calib.txt", root / "training" / "calib" / f"{frame}.txt")
        # The words of the object benchmark come after frame and track; truncation is 0, 1 or 2 there.
        lines = [
            " ".join([row[2], f"{min(float(row[3]), float(row[3]) / 2)}", *row[4:]])
            for row in rows
            if int(row[0]) == number
        ]
        (root / "training" / "label_2" / f"{frame}.txt").write_text("".join(f"{line}\n" for line in lines))
        added.append(frame)
    with (root / "ImageSets" / f"{name}.txt").open("a") as file:
        file.writelines(f"{frame}\n" for frame in added)
    return added
