"""nuScenes, Argoverse 2 and ONCE, in their layouts."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from mainstem.domains.pointcloud.clustering import SIZES, Clustering, cluster
from mainstem.domains.pointcloud.detections import Detections
from mainstem.domains.pointcloud.metrics import Argoverse2AP, BoxMetric, NuScenesAP
from mainstem.domains.pointcloud.readers import Argoverse2, NuScenes, Once
from mainstem.domains.pointcloud.readers.nuscenes_tables import split_of
from mainstem.domains.pointcloud.readers.source import count_points, moved
from mainstem.domains.pointcloud.scene import Array, Scene

REAL = Path(__file__).parents[4] / "shared" / "data" / "lidar"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real frames")
Rows = list[dict[str, Any]]


def placed(matrix: Array) -> dict[str, list[float]]:
    """A transform (4, 4) as nuScenes writes it."""
    quaternion = Rotation.from_matrix(matrix[:3, :3]).as_quat(scalar_first=True)
    return {"rotation": quaternion.tolist(), "translation": matrix[:3, 3].tolist()}


def transform(angle: float, place: tuple[float, float, float]) -> Array:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("z", angle).as_matrix()
    matrix[:3, 3] = place
    return matrix


def nuscenes(root: Path, scans: list[tuple[Array, Array]], mount: Array, marks: list[Rows]) -> Path:
    """Scans (points, pose of the car) half a second apart, each a key frame with its annotations."""
    tables: dict[str, Rows] = {"scene": [{"token": "s", "name": "scene-0103"}]}
    tables["sensor"] = [{"token": "l", "channel": "LIDAR_TOP"}, {"token": "c", "channel": "CAM_FRONT"}]
    tables["calibrated_sensor"] = [
        {"token": "ml", "sensor_token": "l", **placed(mount)},
        {"token": "mc", "sensor_token": "c", **placed(np.eye(4))},
    ]
    categories = sorted({mark["category"] for rows in marks for mark in rows})
    tables["category"] = [{"token": f"c-{name}", "name": name} for name in categories]
    tables["attribute"] = [{"token": "moving", "name": "vehicle.moving"}]
    tracks = {mark["track"]: mark["category"] for rows in marks for mark in rows}
    tables["instance"] = [{"token": name, "category_token": f"c-{what}"} for name, what in tracks.items()]
    for name in ("sample", "sample_data", "ego_pose", "sample_annotation"):
        tables[name] = []
    (root / "samples" / "LIDAR_TOP").mkdir(parents=True)
    for i, (points, car) in enumerate(scans):
        time = 10**15 + 500_000 * i
        tables["sample"].append({"token": f"k{i}", "scene_token": "s", "timestamp": time})
        tables["ego_pose"].append({"token": f"e{i}", **placed(car)})
        name = f"samples/LIDAR_TOP/{i}.pcd.bin"
        points.astype(np.float32).tofile(root / name)
        row = {"sample_token": f"k{i}", "ego_pose_token": f"e{i}", "timestamp": time, "is_key_frame": True}
        row |= {"calibrated_sensor_token": "ml", "filename": name, "prev": f"d{i - 1}" if i else ""}
        tables["sample_data"] += [{"token": f"d{i}", **row}]
        tables["sample_data"] += [{"token": f"x{i}", **row, "calibrated_sensor_token": "mc"}]
        for mark in marks[i]:
            there = [any(one["track"] == mark["track"] for one in rows) for rows in marks]
            rest = {"token": f"{mark['track']}{i}", "instance_token": mark["track"], "sample_token": f"k{i}"}
            rest["prev"] = f"{mark['track']}{i - 1}" if i and there[i - 1] else ""
            rest["next"] = f"{mark['track']}{i + 1}" if i + 1 < len(there) and there[i + 1] else ""
            tables["sample_annotation"].append(
                {"visibility_token": "4", "attribute_tokens": [], **mark, **rest}
            )
    (root / "v1.0-mini").mkdir()
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return root


def drive(root: Path) -> Path:
    """A car that drives along the world's y at 8 m/s, and its LiDAR, which looks that way too."""
    mount = transform(-np.pi / 2, (1, 0, 1.8))
    scans, marks = [], []
    for i in range(3):
        car = transform(np.pi / 2, (100, 200 + 4 * i, 0))
        world = np.array([[95, 230, 0.5], [100, 240, 0.2]])
        points = moved(np.linalg.inv(car @ mount), world)
        rows = np.column_stack([points, np.full(2, 51), np.zeros(2)])
        scans.append((np.concatenate([rows, [[0.5, 0.5, 0, 255, 1]]]), car))
        # 30 m north of the first place of the car, driving east at 6 m/s.
        mark: dict[str, Any] = {
            "track": "t",
            "category": "vehicle.car",
            "translation": [100 + 3 * i, 230, 1.0],
        }
        mark |= {"size": [1.9, 4.5, 1.6], "rotation": [1, 0, 0, 0], "num_lidar_pts": 7}
        animal = {**mark, "track": "a", "category": "animal", "attribute_tokens": ["moving"]}
        marks.append([mark, animal] if i == 1 else [mark])
    return nuscenes(root, scans, mount, marks)


def test_nuscenes(tmp_path: Path) -> None:
    source = NuScenes(drive(tmp_path), "v1.0-mini", "mini_val", sweeps=2)
    first, scene = source[0], source[1]
    assert (len(source), scene.id, scene.features) == (3, "k1", ("intensity", "time"))
    # The car is at (100, 204) and faces north; its LiDAR is 1 m before that and 1.8 m up.
    expected = np.array([[25, 5, -1.3, 0.2], [35, 0, -1.6, 0.2]])
    np.testing.assert_allclose(scene.points[:, :4], np.tile(expected, (2, 1)), atol=1e-4)
    np.testing.assert_allclose(scene.points[:, 4], [0, 0, 0.5, 0.5], atol=1e-5)
    assert len(first.points) == 2
    np.testing.assert_allclose(scene.boxes[0], [25, -3, -0.8, 4.5, 1.9, 1.6, -np.pi / 2], atol=1e-4)
    assert scene.names.tolist() == ["car", "animal"]
    assert scene.velocities is not None
    assert first.velocities is not None
    np.testing.assert_allclose(scene.velocities, np.array([[0, -6], [np.nan, np.nan]]), atol=1e-4)
    np.testing.assert_allclose(first.velocities, [[0, -6]], atol=1e-4)
    assert scene.attributes["points"].tolist() == [7, 7]
    assert scene.attributes["attribute"].tolist() == ["", "vehicle.moving"]
    assert scene.attributes["track"].tolist() == ["t", "a"]
    back = moved(scene.meta["pose"], scene.boxes[:1, :3])
    np.testing.assert_allclose(back, [[103, 230, 1]], atol=1e-3)


def test_nuscenes_that_is_refused(tmp_path: Path) -> None:
    drive(tmp_path)
    with pytest.raises(ValueError, match=r"version='v1\.0-mini' has no frame of split='train'"):
        NuScenes(tmp_path, "v1.0-mini")
    with pytest.raises(ValueError, match="no class 'Car': its classes are car, truck"):
        NuScenes(tmp_path, "v1.0-mini", "mini_val", classes=("Car",))
    with pytest.raises(ValueError, match="sweeps=0"):
        NuScenes(tmp_path, "v1.0-mini", "mini_val", sweeps=0)
    with pytest.raises(FileNotFoundError, match=r"v1\.0-trainval' does not exist"):
        NuScenes(tmp_path)
    (tmp_path / "v1.0-mini" / "ego_pose.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ego_pose\.json' does not exist"):
        NuScenes(tmp_path, "v1.0-mini", "mini_val")


def test_official_splits_of_nuscenes() -> None:
    names = [f"scene-{number:04d}" for number in range(1, 1111)]
    assert sum(split_of(name, "v1.0-trainval") == "val" for name in names) == 150
    assert [split_of(name, "v1.0-trainval") for name in ("scene-0003", "scene-0061")] == ["val", "train"]
    assert [split_of(name, "v1.0-mini") for name in ("scene-0916", "scene-0061")] == [
        "mini_val",
        "mini_train",
    ]
    assert split_of("scene-0077", "v1.0-test") == "test"


def scored(metric: BoxMetric, scenes: list[Scene]) -> list[dict[str, float]]:
    """Scores of the labels themselves, of the labels 20 m higher and aside, and of geometry alone."""
    found = []
    for scene in scenes:
        # Boxes without a point are not asked for: to find one is wrong.
        seen = (scene.names == metric.classes[0]) & (scene.attributes["points"] > 0)
        boxes = torch.from_numpy(scene.boxes[seen])
        found.append(Detections(boxes, torch.ones(len(boxes)), torch.zeros(len(boxes), dtype=torch.int64)))
    aside = [replace(one, boxes=one.boxes + torch.tensor([0, 20.0, 20, 0, 0, 0, 0])) for one in found]
    settings = Clustering(sizes={metric.classes[0]: SIZES["Car"]})
    guessed = [cluster(scene, metric.classes, settings) for scene in scenes]
    results = []
    for detections in (found, aside, guessed):
        metric.update(detections, scenes)
        results.append({name: float(value) for name, value in metric.compute().items()})
        metric.reset()
    return results


@real
def test_a_real_frame_of_nuscenes(tmp_path: Path) -> None:
    folder = REAL / "nuscenes_demo"
    info = pickle.loads(next(folder.glob("*.pkl")).read_bytes())["data_list"][0]
    points = np.fromfile(next(folder.glob("*.bin")), np.float32).reshape(-1, 5)
    car, mount = np.array(info["ego2global"]), np.array(info["lidar_points"]["lidar2ego"])
    sensor = car @ mount
    turn = Rotation.from_matrix(sensor[:3, :3])
    marks = []
    for i, instance in enumerate(info["instances"]):
        x, y, z, length, width, height, yaw = instance["bbox_3d"]
        quaternion = (turn * Rotation.from_euler("z", yaw)).as_quat(scalar_first=True).tolist()
        mark = {"track": f"t{i}-", "category": "vehicle.car", "size": [width, length, height]}
        mark |= {"translation": moved(sensor, np.array([[x, y, z]]))[0].tolist(), "rotation": quaternion}
        marks.append({**mark, "num_lidar_pts": int(instance["num_lidar_pts"])})
    [scene] = [NuScenes(nuscenes(tmp_path, [(points, car)], mount, [marks]), "v1.0-mini", "mini_val")[0]]
    told = scene.attributes["points"]
    found = count_points(scene.points, scene.boxes)
    assert len(scene.boxes) == 69
    assert abs(found.sum() / told.sum() - 1) < 0.03
    assert np.median(np.abs(found - told)) <= 1
    assert 0 <= scene.points[:, 3].min() < scene.points[:, 3].max() <= 1
    # Turned: what lay along the sensor's y lies along x.
    np.testing.assert_allclose(scene.boxes[0, :2], [59.516, -18.414], atol=1e-2)
    told_of, missed, guessed = scored(NuScenesAP(("car",)), [scene])
    assert told_of["car/ap"] == pytest.approx(100, abs=1e-3)
    assert missed["car/ap"] < 1
    assert guessed["car/ap"] < 100


@real
def test_real_sweeps_of_argoverse(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for log in (REAL / "argoverse2").iterdir():
        if log.is_dir():
            (tmp_path / "val" / log.name).symlink_to(log)
    source = Argoverse2(tmp_path, "val")
    scenes = [source[i] for i in range(len(source))]
    assert [len(scene.boxes) for scene in scenes] == [81, 81, 47]
    assert [len(scene.points) for scene in scenes] == [99229, 99466, 100660]
    for scene in scenes:
        told = scene.attributes["points"]
        near = np.abs(scene.boxes[:, :2]).max(1) < 60  # coordinates are float16: coarse far away
        assert abs(count_points(scene.points, scene.boxes)[near].sum() / told[near].sum() - 1) < 0.05
        assert scene.points[:, 3].max() <= 1
    # A track that stands still in the city moves back in the frame as the car drives on.
    assert scenes[0].meta["pose"][:3, 3] == pytest.approx(scenes[1].meta["pose"][:3, 3], abs=2)
    assert len({*scenes[0].attributes["track"]} & {*scenes[1].attributes["track"]}) > 70
    told_of, missed, guessed = scored(Argoverse2AP(("REGULAR_VEHICLE",)), scenes)
    assert told_of["regular_vehicle/ap"] == pytest.approx(100, abs=1e-3)
    assert missed["regular_vehicle/ap"] < 1
    assert guessed["regular_vehicle/ap"] < 100


def test_argoverse_that_is_refused(tmp_path: Path) -> None:
    lidar = tmp_path / "val" / "log" / "sensors" / "lidar"
    lidar.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"has no <log>/sensors/lidar/\*\.feather"):
        Argoverse2(tmp_path, "val")
    pd.DataFrame({"x": [1.0], "y": [2.0]}).to_feather(lidar / "5.feather")
    with pytest.raises(ValueError, match=r"5\.feather' has no column 'z'; it has x, y"):
        Argoverse2(tmp_path, "val")[0]
    (lidar / "5.feather").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"5\.feather' cannot be read"):
        Argoverse2(tmp_path, "val")[0]
    with pytest.raises(ValueError, match="Argoverse 2 has no class 'CAR'"):
        Argoverse2(tmp_path, "val", classes=("CAR",))


def once(root: Path) -> Path:
    folder = root / "data" / "000027"
    (folder / "lidar_roof").mkdir(parents=True)
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("000027\n")
    # The files' x is to the left, y to the back: 20 m ahead and 3 m to the left.
    box = [3, -20, 0, 4, 2, 1.5, -np.pi / 2]
    labels = {"names": ["Car"], "boxes_3d": [box]}
    frames: Rows = [{"frame_id": "1616", "pose": [0, 0, 0, 1, 5, 6, 7], "annos": labels}]
    frames += [{"frame_id": "1617", "pose": [0, 0, 0, 0, 0, 0, 0]}]
    frames += [{"frame_id": "1618", "pose": [0] * 7, "annos": {"names": [], "boxes_3d": []}}]
    (folder / "000027.json").write_text(json.dumps({"frames": frames}))
    for frame in frames:
        np.array([[3, -19, 0.5, 0.4]], np.float32).tofile(folder / "lidar_roof" / f"{frame['frame_id']}.bin")
    return root


def test_once(tmp_path: Path) -> None:
    source = Once(once(tmp_path))
    scene, empty = source[0], source[1]
    assert (len(source), scene.id, empty.id) == (2, "000027_1616", "000027_1618")
    np.testing.assert_allclose(scene.boxes, [[20, 3, 0, 4, 2, 1.5, 0]], atol=1e-5)
    np.testing.assert_allclose(scene.points, [[19, 3, 0.5, 0.4]], atol=1e-5)
    assert scene.attributes["points"].tolist() == [1]
    np.testing.assert_allclose(moved(scene.meta["pose"], scene.boxes[:, :3]), [[8, -14, 7]], atol=1e-5)
    assert empty.boxes.shape == (0, 7)
    assert "pose" not in empty.meta
    with pytest.raises(FileNotFoundError, match=r"ImageSets/val\.txt', does not exist"):
        Once(tmp_path, "val")
    shutil.rmtree(tmp_path / "data" / "000027")
    with pytest.raises(FileNotFoundError, match=r"lidar_roof/1616\.bin' does not exist"):
        source[0]
