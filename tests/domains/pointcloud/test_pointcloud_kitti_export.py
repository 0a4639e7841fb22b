"""Frames written in KITTI's layout and read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mainstem.domains.pointcloud.kitti_export import export_kitti
from mainstem.domains.pointcloud.kitti_labels import Calibration, read_labels
from mainstem.domains.pointcloud.readers.kitti import Kitti
from mainstem.domains.pointcloud.scene import Scene
from mainstem.domains.pointcloud.simulator import Simulator


def test_exported_frames_read_back(tmp_path: Path) -> None:
    train, val = Simulator(2, seed=1), Simulator(1, seed=2)
    assert export_kitti(tmp_path / "kitti", {"train": train, "val": val}) == {"train": 2, "val": 1}
    root = tmp_path / "kitti"
    assert (root / "ImageSets" / "train.txt").read_text().split() == ["000000", "000001"]
    assert (root / "ImageSets" / "val.txt").read_text().split() == ["000002"]
    for name, scene in zip(("000000", "000001", "000002"), [train[0], train[1], val[0]]):
        points = np.fromfile(root / "training" / "velodyne" / f"{name}.bin", "<f4").reshape(-1, 4)
        np.testing.assert_array_equal(points, scene.points)
        calibration = Calibration.read(root / "training" / "calib" / f"{name}.txt")
        boxes, names, attributes = read_labels(root / "training" / "label_2" / f"{name}.txt", calibration)
        assert len(boxes) >= 0.9 * len(scene.boxes)
        # Boxes outside the image are left out; the others are in the same order.
        rows = np.array([np.abs(scene.boxes[:, :3] - box[:3]).sum(1).argmin() for box in boxes])
        assert (np.diff(rows) > 0).all()
        np.testing.assert_allclose(boxes[:, :6], scene.boxes[rows, :6], atol=0.01)
        turned = boxes[:, 6] - scene.boxes[rows, 6]
        np.testing.assert_allclose(np.angle(np.exp(1j * turned)), 0, atol=0.01)
        np.testing.assert_array_equal(names, scene.names[rows])
        np.testing.assert_array_equal(attributes["occlusion"], scene.attributes["occlusion"][rows])
        assert (attributes["image_right"] > attributes["image_left"]).all()
        assert (attributes["image_right"] <= 1241).all()
        # A box that lies wholly in the image is not cut.
        whole = (attributes["image_left"] > 0) & (attributes["image_right"] < 1241)
        whole &= attributes["image_bottom"] < 374
        assert whole.sum() > 5
        assert (attributes["truncation"][whole] == 0).all()


def test_the_reader_of_the_benchmark_reads_exported_frames(tmp_path: Path) -> None:
    simulator = Simulator(2, seed=4)
    export_kitti(tmp_path, {"train": simulator, "val": Simulator(1, seed=5)})
    frames = Kitti(tmp_path, split="train", fov=False, classes=("Car", "Pedestrian", "Cyclist", "Truck"))
    assert len(frames) == 2
    for index in range(2):
        read, made = frames[index], simulator[index]
        np.testing.assert_array_equal(read.points, made.points)
        assert read.features == made.features
        rows = np.array([np.abs(made.boxes[:, :3] - box[:3]).sum(1).argmin() for box in read.boxes])
        np.testing.assert_allclose(read.boxes[:, :6], made.boxes[rows, :6], atol=0.01)
        np.testing.assert_array_equal(read.names, made.names[rows])


def test_boxes_behind_the_camera_are_left_out_and_missing_intensity_is_zero(tmp_path: Path) -> None:
    box = np.array([[20.0, 1, -1, 4, 1.6, 1.5, 0.3], [-20, 1, -1, 4, 1.6, 1.5, 0.3]], np.float32)
    points = np.array([[20.0, 1, -1]], np.float32)
    export_kitti(tmp_path, {"all": [Scene("one", points, (), box, np.array(["Car", "Car"]))]})
    lines = (tmp_path / "training" / "label_2" / "000000.txt").read_text().splitlines()
    assert len(lines) == 1
    stored = np.fromfile(tmp_path / "training" / "velodyne" / "000000.bin", "<f4")
    np.testing.assert_array_equal(stored, [20, 1, -1, 0])


def test_a_frame_keeps_its_own_calibration_image_boxes_and_ignored_regions(tmp_path: Path) -> None:
    default = Calibration.default()
    moved = replace(default, velodyne_to_camera=default.velodyne_to_camera + [[0, 0, 0, 0.1]] * 3)
    sides = ("image_left", "image_top", "image_right", "image_bottom")
    attributes = {side: np.array([10.0 * i]) for i, side in enumerate(sides, 1)}
    attributes |= {"truncation": np.array([0.25]), "occlusion": np.array([2]), "track": np.array([7])}
    box = np.array([[20.0, 1, -1, 4, 1.6, 1.5, 0.3]], np.float32)
    meta = {"calibration": moved, "ignore": np.array([[1.0, 2, 3, 4]])}
    points = np.zeros((1, 4), np.float32)
    scene = Scene("a", points, ("intensity",), box, np.array(["Van"]), attributes=attributes, meta=meta)
    export_kitti(tmp_path, {"val": [scene]})
    calibration = Calibration.read(tmp_path / "training" / "calib" / "000000.txt")
    np.testing.assert_allclose(calibration.velodyne_to_camera, moved.velodyne_to_camera)
    label = tmp_path / "training" / "label_2" / "000000.txt"
    boxes, _, found = read_labels(label, calibration)
    np.testing.assert_allclose(boxes, box, atol=1e-3)
    assert [found[side][0] for side in sides] == [10, 20, 30, 40]
    assert (found["truncation"][0], found["occlusion"][0]) == (0.25, 2)
    assert label.read_text().splitlines()[1].startswith("DontCare -1 -1 -10 1.00 2.00 3.00 4.00")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="must be an empty or a missing folder"):
        export_kitti(tmp_path, {"train": []})
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
