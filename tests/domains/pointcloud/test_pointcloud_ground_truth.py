from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.boxes import points_in_boxes
from mainstem.domains.pointcloud.ground_truth import GroundTruthSampling, ObjectDatabase
from mainstem.domains.pointcloud.overlap import bev_intersection
from mainstem.domains.pointcloud.scene import Array, Scene

SIZES = {"Car": (4.0, 1.8, 1.5), "Pedestrian": (0.8, 0.6, 1.7)}
COUNTS = {"Car": 6, "Pedestrian": 8}


def inside(scene: Scene, boxes: Array | None = None, margin: float = 0.0) -> Array:
    boxes = (scene.boxes if boxes is None else boxes).copy()
    boxes[:, 3:6] += margin
    return points_in_boxes(torch.from_numpy(scene.points), torch.from_numpy(boxes)).numpy()


def street(seed: int, cars: int = 3, pedestrians: int = 3, slope: float = 0.0, **more: Any) -> Scene:
    """Ground with boxes full of points on it; every point has a number of its own as its intensity."""
    rng = np.random.default_rng(seed)
    names = ["Car"] * cars + ["Pedestrian"] * pedestrians
    boxes: list[Array] = []
    for name in names:
        size = np.array(SIZES[name])
        for _ in range(100):
            place = rng.uniform([3, -15], [30, 15])
            bottom = -1.7 + slope * place[0]
            box = np.array([*place, bottom + size[2] / 2, *size, rng.uniform(-np.pi, np.pi)], np.float32)
            placed = torch.from_numpy(np.array([*boxes, box]))
            if not (bev_intersection(placed[-1:], placed[:-1]) > 0).any():
                break
        boxes.append(box)
    parts = []
    for box in boxes:
        local = rng.uniform(-0.49, 0.49, (rng.integers(2, 40), 3)) * box[3:6]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        parts.append(local @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + box[:3])
    # Just below the boxes, so that the street belongs to none of them.
    ground = rng.uniform([0, -20, 0], [35, 20, 0], (3000, 3))
    ground[:, 2] = -1.7 - 0.03 + slope * ground[:, 0]
    xyz = np.concatenate([*parts, ground])
    numbers = 1e4 * seed + np.arange(len(xyz))
    found = np.array(boxes, np.float32).reshape(-1, 7)
    return Scene(
        f"street {seed}",
        np.column_stack([xyz, numbers]).astype(np.float32),
        ("intensity",),
        found,
        np.array(names, np.str_),
        attributes={"difficulty": rng.integers(0, 4, len(names)), "track": np.array(names, np.str_)},
        **more,
    )


@pytest.fixture(scope="module")
def database() -> ObjectDatabase:
    return ObjectDatabase.collect([street(seed) for seed in range(1, 12)], list(SIZES), min_points=5)


def test_objects_hold_the_points_that_were_in_their_boxes() -> None:
    scenes = [street(seed) for seed in (1, 2)]
    database = ObjectDatabase.collect(scenes, ["Pedestrian"], min_points=10)
    expected = [
        scene.points[mask]
        for scene in scenes
        for name, mask in zip(scene.names, inside(scene).T)
        if name == "Pedestrian" and mask.sum() >= 10
    ]
    assert len(database) == len(expected) > 2
    assert set(database.names) == {"Pedestrian"}
    for row, points in enumerate(expected):
        np.testing.assert_array_equal(database.crop(row), points)
    np.testing.assert_allclose(database.clearance, 0.03, atol=1e-3)
    assert np.isnan(database.velocities).all()


def test_hard_objects_are_left_out() -> None:
    scenes = [street(seed) for seed in range(1, 6)]
    easy = ObjectDatabase.collect(scenes, list(SIZES), hardest={"difficulty": 1})
    assert set(easy.attributes["difficulty"]) == {0, 1}
    with pytest.raises(ValueError, match="no attribute 'occlusion', only difficulty, track"):
        ObjectDatabase.collect(scenes, list(SIZES), hardest={"occlusion": 1})


def test_a_database_survives_its_file(tmp_path: Path, database: ObjectDatabase) -> None:
    path = tmp_path / "objects.db"
    database.save(path)
    loaded = ObjectDatabase.load(path)
    assert loaded.features == database.features
    for name in ("points", "starts", "boxes", "names", "velocities", "clearance"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(database, name))
    assert loaded.attributes.keys() == database.attributes.keys()
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match=r"other.npz' holds weights, not a database"):
        ObjectDatabase.load(tmp_path / "other.npz")
    (tmp_path / "text").write_text("no objects")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in ("text", "cut", "array.npy"):
        with pytest.raises(ValueError, match=f"{name}' is not a database of objects, or is cut off"):
            ObjectDatabase.load(tmp_path / name)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(20, 900),
    cars=st.integers(0, 7),
    pedestrians=st.integers(0, 3),
    slope=st.sampled_from([0.0, 0.05, -0.05]),
)
def test_sampling_keeps_frame_and_objects_whole(
    database: ObjectDatabase, seed: int, cars: int, pedestrians: int, slope: float
) -> None:
    scene = street(seed, cars, pedestrians, slope)
    before = scene.points.copy()
    after = GroundTruthSampling(database, COUNTS)(scene, np.random.default_rng(seed))
    count = len(scene.boxes)
    pasted = after.boxes[count:]
    np.testing.assert_array_equal(scene.points, before)

    # The frame's own boxes stay, first and with their points.
    np.testing.assert_array_equal(after.boxes[:count], scene.boxes)
    np.testing.assert_array_equal(after.names[:count], scene.names)
    own = np.isin(scene.points[:, 3], after.points[:, 3])
    assert own[inside(scene).any(1)].all()
    # No point of the frame vanishes but those inside the new boxes, and none stays there.
    np.testing.assert_array_equal(own, ~inside(scene, pasted).any(1))

    # No box touches a new one.
    boxes = torch.from_numpy(after.boxes).double()
    shared = bev_intersection(boxes[count:], boxes)
    shared[torch.arange(len(pasted)), count + torch.arange(len(pasted))] = 0
    assert not len(pasted) or float(shared.max()) < 1e-6

    # As many as wanted at most, or as were there.
    for name, wanted in COUNTS.items():
        assert (after.names == name).sum() <= max(wanted, (scene.names == name).sum())

    # Every new box holds the points of one object of the database, at its place and on the ground.
    masks = inside(after, pasted, margin=2e-3).T
    for box, name, mask in zip(pasted, after.names[count:], masks):
        row = int(np.argmin(np.abs(database.boxes[:, [0, 1, 6]] - box[[0, 1, 6]]).sum(1)))
        crop = database.crop(row)
        assert name == database.names[row]
        new = after.points[mask & (after.points[:, 3] < 2e5)]
        np.testing.assert_array_equal(new[:, [0, 1, 3]], crop[:, [0, 1, 3]])
        np.testing.assert_allclose(new[:, 2] - box[2], crop[:, 2] - database.boxes[row, 2], atol=1e-5)
        assert box[2] - box[5] / 2 == pytest.approx(-1.7 + slope * box[0], abs=0.15)


def test_the_same_generator_draws_the_same_and_another_does_not(database: ObjectDatabase) -> None:
    sampling, scene = GroundTruthSampling(database, COUNTS), street(50)
    one, same, other = (sampling(scene, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.points, same.points)
    assert not np.array_equal(one.boxes, other.boxes)
    assert len(one.boxes) > len(scene.boxes)


def test_attributes_and_velocities_come_along(database: ObjectDatabase) -> None:
    scene = street(50, velocities=np.ones((6, 2), np.float32))
    scene = replace(
        scene,
        attributes={**scene.attributes, "truncation": np.zeros(6, np.float32), "level": np.zeros(6, int)},
    )
    after = GroundTruthSampling(database, COUNTS)(scene, np.random.default_rng(0))
    assert after.velocities is not None
    np.testing.assert_array_equal(after.velocities[:6], 1)
    assert np.isnan(after.velocities[6:]).all()
    np.testing.assert_array_equal(after.attributes["track"], after.names)
    assert np.isnan(after.attributes["truncation"][6:]).all()
    assert (after.attributes["level"][6:] == -1).all()


def test_a_frame_that_has_enough_stays_itself(database: ObjectDatabase) -> None:
    scene = street(50)
    assert GroundTruthSampling(database, {"Car": 3})(scene, np.random.default_rng(0)) is scene


def test_an_empty_frame_gets_objects_where_they_were(database: ObjectDatabase) -> None:
    empty = Scene("empty", np.zeros((0, 4), np.float32), ("intensity",))
    after = GroundTruthSampling(database, COUNTS)(empty, np.random.default_rng(0))
    assert len(after.boxes) > 3
    for box in after.boxes:
        assert np.abs(database.boxes - box).sum(1).min() == 0


def test_nothing_comes_to_where_the_ground_is_much_higher(database: ObjectDatabase) -> None:
    hill = street(50, slope=0.1)
    after = GroundTruthSampling(database, COUNTS)(hill, np.random.default_rng(0))
    pasted = after.boxes[len(hill.boxes) :]
    assert len(pasted) > 0
    # Uphill by 1 m at 10 m, but for the uncertainty of the ground.
    assert (pasted[:, 0] < 12).all()
    assert (database.boxes[:, 0] > 12).sum() > 20


def test_wrong_settings_are_refused(database: ObjectDatabase) -> None:
    with pytest.raises(ValueError, match="no object of class 'Truck', only Car, Pedestrian"):
        GroundTruthSampling(database, {"Truck": 2})
    bare = Scene("bare", np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match=r"bare has the features \(\), the database \('intensity',\)"):
        GroundTruthSampling(database, COUNTS)(bare, np.random.default_rng(0))
    with pytest.raises(ValueError, match="street 2 has the features"):
        ObjectDatabase.collect([bare, street(2)], list(SIZES))
    with pytest.raises(ValueError, match="1 frames hold no object of the classes Truck"):
        ObjectDatabase.collect([street(1)], ["Truck"])
