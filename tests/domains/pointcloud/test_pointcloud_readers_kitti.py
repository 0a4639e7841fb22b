"""KITTI's object and tracking benchmarks, in their layouts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from real_kitti import OBJECT, TRACKING, real, scans, write_layout

from mainstem.domains.pointcloud.kitti_labels import Calibration, write_labels
from mainstem.domains.pointcloud.readers import Kitti, KittiTracking, SemanticKitti
from mainstem.domains.pointcloud.readers.source import count_points
from mainstem.domains.pointcloud.scene import Array

BOX = np.array([[12, 1, -0.9, 4, 1.8, 1.6, 0.2]])


def cloud() -> Array:
    """50 points in the box, 50 behind the sensor."""
    draws = np.random.default_rng(0).uniform(-0.5, 0.5, (100, 4))
    points = np.abs(draws)
    points[:, :3] = BOX[0, :3] + draws[:, :3]
    points[50:, 0] *= -1
    return points.astype(np.float32)


def made(root: Path) -> Path:
    """Two frames, the second without a box."""
    for part in ("training", "testing"):
        for name in ("velodyne", "calib", "label_2"):
            (root / part / name).mkdir(parents=True)
        for frame in ("000000", "000001"):
            cloud().tofile(root / part / "velodyne" / f"{frame}.bin")
            Calibration.default().write(root / part / "calib" / f"{frame}.txt")
    labels = root / "training" / "label_2"
    write_labels(labels / "000000.txt", BOX, ["Van"], ignored=np.array([[0, 0, 9, 9]]))
    (labels / "000001.txt").touch()
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("000001\n000000")
    (root / "ImageSets" / "test.txt").write_text("000000\n")
    return root


def test_kitti(tmp_path: Path) -> None:
    source = Kitti(made(tmp_path))
    empty, scene = source[0], source[1]
    assert (len(source), empty.id, scene.id) == (2, "000001", "000000")
    assert empty.boxes.shape == (0, 7)
    assert len(scene.points) == 50
    np.testing.assert_allclose(scene.boxes, BOX, atol=1e-4)
    assert scene.names.tolist() == ["Van"]
    assert scene.attributes["points"].tolist() == [50]
    np.testing.assert_array_equal(scene.meta["ignore"], [[0, 0, 9, 9]])
    assert isinstance(scene.meta["calibration"], Calibration)
    assert len(Kitti(tmp_path, fov=False)[1].points) == 100
    assert [Kitti(tmp_path, "all")[i].id for i in range(2)] == ["000000", "000001"]
    shutil.rmtree(tmp_path / "testing" / "label_2")
    assert Kitti(tmp_path, "test")[0].boxes.shape == (0, 7)


def test_kitti_that_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(ValueError, match="KITTI has no class 'car': its classes are Car, Van"):
        Kitti(tmp_path, classes=("car",))
    with pytest.raises(
        FileNotFoundError,
        match=r"split val: the list of its frames, '.*val\.txt', does not exist; lists there: test, train",
    ):
        Kitti(tmp_path, "val")
    calibration = tmp_path / "training" / "calib" / "000000.txt"
    calibration.write_text(calibration.read_text().replace("Tr_velo_to_cam", "Tr_velo"))
    with pytest.raises(ValueError, match=r"000000\.txt' has no Tr_velo_to_cam"):
        Kitti(tmp_path)[1]
    scan = tmp_path / "training" / "velodyne" / "000001.bin"
    scan.write_bytes(scan.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"000001\.bin': 1595 bytes are not a whole number of points"):
        Kitti(tmp_path)[0]
    shutil.rmtree(tmp_path / "training" / "label_2")
    with pytest.raises(FileNotFoundError, match=r"label_2' does not exist"):
        Kitti(tmp_path)


def test_kitti_tracking(tmp_path: Path) -> None:
    for part in ("velodyne/0003", "calib", "label_02"):
        (tmp_path / "training" / part).mkdir(parents=True)
    for frame in (0, 2):
        cloud().tofile(tmp_path / "training" / "velodyne" / "0003" / f"{frame:06d}.bin")
    Calibration.default().write(tmp_path / "training" / "calib" / "0003.txt")
    write_labels(tmp_path / "one.txt", BOX, ["Person"], attributes={"truncation": np.array([1])})
    line = (tmp_path / "one.txt").read_text()
    ignored = "2 -1 DontCare -1 -1 -10 0 0 9 9 -1000 -1000 -1000 -10 -1 -1 -1\n"
    (tmp_path / "training" / "label_02" / "0003.txt").write_text(f"1 4 {line}2 7 {line}{ignored}")
    source = KittiTracking(tmp_path)
    first, last = source[0], source[1]
    assert (len(source), first.id, last.id) == (2, "0003_000000", "0003_000002")
    assert len(first.boxes) == 0
    np.testing.assert_allclose(last.boxes, BOX, atol=1e-4)
    assert last.names.tolist() == ["Person_sitting"]
    assert {name: last.attributes[name].tolist() for name in ("track", "truncation", "points")} == {
        "track": [7],
        "truncation": [0.5],
        "points": [50],
    }
    np.testing.assert_array_equal(last.meta["ignore"], [[0, 0, 9, 9]])
    with pytest.raises(FileNotFoundError, match=r"0009' does not exist"):
        KittiTracking(tmp_path, ("0009",))


def test_semantic_kitti(tmp_path: Path) -> None:
    for sequence in ("00", "08"):
        (tmp_path / "sequences" / sequence / "velodyne").mkdir(parents=True)
        cloud().tofile(tmp_path / "sequences" / sequence / "velodyne" / "000005.bin")
    assert [scene.id for scene in (SemanticKitti(tmp_path)[0], SemanticKitti(tmp_path, "val")[0])] == [
        "00_000005",
        "08_000005",
    ]
    np.testing.assert_array_equal(SemanticKitti(tmp_path)[0].points, cloud())
    with pytest.raises(FileNotFoundError, match="no scan of the split test: 11/velodyne"):
        SemanticKitti(tmp_path, "test")


@real
def test_real_boxes_hold_the_points_that_were_counted_in_them(tmp_path: Path) -> None:
    told = json.loads((OBJECT / "frames.json").read_text())[:20]
    write_layout(tmp_path, {"trainval": [frame["id"] for frame in told]})
    source = Kitti(tmp_path, "trainval")
    found = []
    for frame, scene in zip(told, (source[i] for i in range(len(source)))):
        assert scene.id == frame["id"]
        assert len(scene.points) >= 0.99 * frame["points_fov"]
        found.append(scene.attributes["points"])
    # They were counted in boxes that stand upright in the tilted camera: points near a face differ.
    expected = np.concatenate([frame["points_in_boxes"] for frame in told])
    many = expected >= 50
    assert abs(np.concatenate(found).sum() / expected.sum() - 1) < 0.02
    assert (np.concatenate(found)[many] > 0.8 * expected[many]).all()


@real
def test_a_real_drive(tmp_path: Path) -> None:
    for part in ("velodyne/0000", "calib", "label_02"):
        (tmp_path / "training" / part).mkdir(parents=True)
    shutil.copy(TRACKING / "calib.txt", tmp_path / "training" / "calib" / "0000.txt")
    shutil.copy(TRACKING / "label_02.txt", tmp_path / "training" / "label_02" / "0000.txt")
    drive = scans(TRACKING)
    for number in range(0, len(drive), 10):
        drive[number].tofile(tmp_path / "training" / "velodyne" / "0000" / f"{number:06d}.bin")
    source = KittiTracking(tmp_path)
    scenes = [source[i] for i in range(len(source))]
    assert len(scenes) == 16
    points = np.concatenate([scene.attributes["points"] for scene in scenes])
    late = np.concatenate([count_points(drive[10 * i + 2], scene.boxes) for i, scene in enumerate(scenes)])
    assert points.mean() > 400
    assert late.mean() < 0.6 * points.mean()
    assert {"Car", "Van", "Cyclist"} <= set(np.concatenate([scene.names for scene in scenes]).tolist())
    assert all(len(set(scene.attributes["track"].tolist())) == len(scene.boxes) for scene in scenes)
