import json
from dataclasses import replace
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mainstem.domains.pointcloud.boxes import wrap_angle
from mainstem.domains.pointcloud.detections import Detections
from mainstem.domains.pointcloud.kitti_labels import Calibration, read_labels
from mainstem.domains.pointcloud.predictions import write_pictures, write_predictions
from mainstem.domains.pointcloud.readers.folder import Folder
from mainstem.domains.pointcloud.scene import Scene

CLASSES = ("car", "pedestrian")
FOUND = Detections(
    torch.tensor([[10.0, 2, -1, 4, 1.8, 1.5, 0.3], [20, -3, -0.8, 0.8, 0.6, 1.7, -2.0]]),
    torch.tensor([0.9, 0.2]),
    torch.tensor([0, 1]),
    torch.tensor([[3.0, 1.0], [0.05, float("nan")]]),
)


def frame(name: str = "000007", **meta: Any) -> Scene:
    return Scene(name, np.zeros((4, 4), np.float32), ("intensity",), meta=meta)


def test_json_has_every_box_in_the_sensors_coordinates(tmp_path: Path) -> None:
    (path,) = write_predictions([FOUND], [frame()], tmp_path / "out", classes=CLASSES)
    content = json.loads(path.read_text())
    assert path == tmp_path / "out" / "000007.json"
    assert content["frame"] == "000007"
    car, pedestrian = content["boxes"]
    assert car == {
        "name": "car",
        "score": 0.9,
        "box": [10.0, 2.0, -1.0, 4.0, 1.8, 1.5, 0.3],
        "velocity": [3.0, 1.0],
    }
    assert pedestrian["name"] == "pedestrian"
    assert "velocity" not in pedestrian


def test_json_is_read_back_as_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "000007.npy", frame().points)
    write_predictions([FOUND], [frame()], tmp_path / "out", classes=CLASSES)
    scene = Folder(tmp_path / "000007.npy", labels=tmp_path / "out", classes=CLASSES)[0]
    np.testing.assert_allclose(scene.boxes, FOUND.boxes.numpy(), atol=1e-4)
    assert scene.names.tolist() == list(CLASSES)
    assert scene.velocities is not None
    np.testing.assert_allclose(scene.velocities, np.array([[3, 1], [np.nan, np.nan]]))


@pytest.mark.parametrize("format", ["json", "kitti"])
def test_boxes_below_the_threshold_are_left_out(tmp_path: Path, format: Any) -> None:
    (path,) = write_predictions(
        [FOUND], [frame(calibration=Calibration.default())], tmp_path, classes=CLASSES, format=format,
        threshold=0.5,
    )  # fmt: skip
    assert "car" in path.read_text()
    assert "pedestrian" not in path.read_text()


def test_no_box_is_a_file_too(tmp_path: Path) -> None:
    scene = frame(calibration=Calibration.default(), pose=np.eye(4))
    as_json, as_kitti, as_nuscenes = (
        write_predictions([Detections.none()], [scene], tmp_path, classes=CLASSES, format=format)[0]
        for format in ("json", "kitti", "nuscenes")
    )
    assert json.loads(as_json.read_text())["boxes"] == []
    assert as_kitti.read_text() == ""
    assert json.loads(as_nuscenes.read_text())["results"] == {"000007": []}


def test_kitti_files_read_back_to_the_same_boxes(tmp_path: Path) -> None:
    calibration = Calibration.default()
    scenes = [frame("a/000001", calibration=calibration), frame("000002")]
    paths = write_predictions(
        [FOUND, FOUND], scenes, tmp_path, classes=CLASSES, format="kitti", calibration=calibration
    )
    assert paths == [tmp_path / "a" / "000001.txt", tmp_path / "000002.txt"]
    for path in paths:
        boxes, names, attributes = read_labels(path, calibration)
        np.testing.assert_allclose(boxes, FOUND.boxes.numpy(), atol=1e-3)
        np.testing.assert_allclose(attributes["score"], FOUND.scores.numpy(), atol=1e-5)
        assert names.tolist() == list(CLASSES)


def test_nuscenes_boxes_are_in_the_world(tmp_path: Path) -> None:
    turn = pi / 2
    pose = np.eye(4)
    pose[:2, :2] = [[0, -1], [1, 0]]
    pose[:3, 3] = [100, 200, 5]
    (path,) = write_predictions(
        [FOUND], [frame("token", pose=pose)], tmp_path, classes=CLASSES, format="nuscenes"
    )
    content = json.loads(path.read_text())
    assert content["meta"] == {
        "use_camera": False,
        "use_lidar": True,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    car, pedestrian = content["results"]["token"]
    assert car["sample_token"] == "token"
    np.testing.assert_allclose(car["translation"], [98, 210, 4], atol=1e-6)
    np.testing.assert_allclose(car["size"], [1.8, 4, 1.5], atol=1e-6)
    np.testing.assert_allclose(car["velocity"], [-1, 3], atol=1e-6)
    assert (car["attribute_name"], pedestrian["attribute_name"]) == ("vehicle.moving", "pedestrian.standing")
    for written, yaw in ((car, 0.3), (pedestrian, -2.0)):
        w, x, y, z = written["rotation"]
        assert abs(x) + abs(y) < 1e-6
        difference = wrap_angle(torch.tensor(2 * np.arctan2(z, w) - yaw - turn))
        assert abs(float(difference)) < 1e-6


def test_nuscenes_gets_the_best_500_boxes(tmp_path: Path) -> None:
    many = Detections(torch.ones(600, 7), torch.linspace(0, 1, 600), torch.zeros(600, dtype=torch.int64))
    (path,) = write_predictions([many], [frame(pose=np.eye(4))], tmp_path, classes=CLASSES, format="nuscenes")
    scores = [box["detection_score"] for box in json.loads(path.read_text())["results"]["000007"]]
    assert len(scores) == 500
    assert min(scores) == pytest.approx(100 / 599)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("scenes", "settings", "message"),
    [
        ([frame(), frame()], {}, "'000007' occurs twice"),
        ([frame("../../x"), frame()], {}, "leads out of"),
        ([frame(), frame("b")], {"format": "kitti"}, "000007 has no calibration"),
        ([frame(), frame("b")], {"format": "nuscenes"}, "000007 has no pose"),
        ([frame(), frame("b")], {"format": "nuscenes", "classes": ("Car", "car")}, "no class 'Car'"),
        ([frame(), frame("b")], {"format": "csv"}, "kitti, nuscenes, json, got 'csv'"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_no_file(
    tmp_path: Path, scenes: list[Scene], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_predictions([FOUND, FOUND], scenes, tmp_path, **{"classes": CLASSES, **settings})
    assert not list(tmp_path.rglob("*.*"))


def test_pictures_bear_the_names_of_the_frames(tmp_path: Path) -> None:
    scenes = [frame("drive/1"), replace(frame("2"), points=np.zeros((0, 4), np.float32))]
    paths = write_pictures([FOUND, Detections.none()], scenes, tmp_path, classes=CLASSES)
    assert paths == [tmp_path / "drive" / "1.png", tmp_path / "2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
