"""Simulated frames: repeatable, labelled right, and as hard as they are meant to be."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mainstem.domains.pointcloud.boxes import points_in_boxes
from mainstem.domains.pointcloud.overlap import bev_intersection
from mainstem.domains.pointcloud.scene import Scene
from mainstem.domains.pointcloud.simulator import CLASSES, SENSORS, Sensor, Simulator
from mainstem.domains.pointcloud.simulator.layout import GROUND
from mainstem.domains.pointcloud.simulator.render import sweep

FRAMES = 40


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(FRAMES, seed=5)


@pytest.fixture(scope="module")
def scenes(simulator: Simulator) -> list[Scene]:
    return [simulator[index] for index in range(FRAMES)]


def assert_same(one: Scene, other: Scene) -> None:
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.names, other.names)
    assert one.id == other.id
    assert one.attributes.keys() == other.attributes.keys()
    for name, values in one.attributes.items():
        np.testing.assert_array_equal(values, other.attributes[name])


@pytest.mark.parametrize("layout", ["train", "shifted"])
def test_a_frame_depends_on_seed_and_number_alone(layout: str) -> None:
    backwards = Simulator(4, seed=2, layout=layout)  # type: ignore[arg-type]
    last = backwards[3]
    assert_same(backwards[0], Simulator(9, seed=2, layout=layout)[0])  # type: ignore[arg-type]
    assert_same(last, Simulator(9, seed=2, layout=layout)[3])  # type: ignore[arg-type]


def test_other_seeds_numbers_and_layouts_give_other_worlds() -> None:
    worlds = [
        Simulator(2, seed=0).world(0),
        Simulator(2, seed=0).world(1),
        Simulator(2, seed=1).world(0),
        Simulator(2, seed=0, layout="shifted").world(0),
    ]
    headings = {world.ground.heading for world in worlds}
    assert len(headings) == 4


def test_all_sensors_see_the_same_world() -> None:
    fine, coarse = Simulator(1, sensor="beams64"), Simulator(1, sensor="beams32")
    np.testing.assert_array_equal(fine.world(0).boxes, coarse.world(0).boxes)
    seen = {tuple(box) for box in coarse[0].boxes.tolist()} & {tuple(box) for box in fine[0].boxes.tolist()}
    assert len(seen) >= 0.8 * len(coarse[0].boxes)
    assert len(fine[0].points) > 3 * len(coarse[0].points)


def test_a_cached_frame_is_the_same(tmp_path: Path) -> None:
    fresh = Simulator(2, seed=3)
    assert_same(fresh[1], Simulator(2, seed=3, cache=tmp_path)[1])
    (file,) = tmp_path.rglob("*.npz")
    before = file.stat().st_mtime_ns
    assert_same(fresh[1], Simulator(2, seed=3, cache=tmp_path)[1])
    assert file.stat().st_mtime_ns == before
    other = Simulator(2, seed=3, cache=tmp_path, sensor="beams16")[1]
    assert len(other.points) < len(fresh[1].points)


def test_points_of_an_object_lie_in_its_box(simulator: Simulator) -> None:
    quiet = Sensor(SENSORS["beams32"].elevations, 0.35, range_noise=0.0, angle_noise=0.0)
    for index in range(8):
        world = simulator.world(index)
        seen = sweep(world.parts, world.ground, len(world.boxes), quiet, np.random.default_rng(index))
        owned = seen.owner >= 0
        grown = world.boxes + np.array([0, 0, 0, 2e-3, 2e-3, 2e-3, 0])
        inside = points_in_boxes(
            torch.from_numpy(seen.points[owned]).double(), torch.from_numpy(grown)
        ).numpy()
        assert inside[np.arange(owned.sum()), seen.owner[owned]].all()


def test_points_attribute_counts_the_points_of_the_object(scenes: list[Scene]) -> None:
    for scene in scenes[:8]:
        grown = scene.boxes + np.array([0, 0, 0.15, 0.3, 0.3, 0, 0], np.float32)  # the noise, not the ground
        inside = points_in_boxes(torch.from_numpy(scene.points), torch.from_numpy(grown)).sum(0).numpy()
        points = scene.attributes["points"]
        assert (points >= 1).all()
        # A wheel's foot falls out of the raised box, and a hedge beside it may reach in.
        assert (np.abs(inside - points) <= 0.2 * points + 6).mean() > 0.9


def test_boxes_do_not_overlap_and_stand_on_the_ground(simulator: Simulator) -> None:
    for index in range(8):
        world = simulator.world(index)
        boxes = torch.from_numpy(world.boxes)
        assert (bev_intersection(boxes, boxes) - torch.diag(boxes[:, 3] * boxes[:, 4])).abs().max() < 1e-6
        ground = world.ground.at(world.boxes[:, 0], world.boxes[:, 1])
        bottom = world.boxes[:, 2] - world.boxes[:, 5] / 2
        # Where the box's middle is not its object's origin a kerb may run between them.
        assert (np.abs(bottom - ground) < 0.25).all()
        assert np.median(np.abs(bottom - ground)) < 0.05
        assert world.ground.at(np.zeros(1), np.zeros(1)) == pytest.approx(GROUND)


def test_sizes_are_those_of_the_classes(simulator: Simulator) -> None:
    worlds = [simulator.world(index) for index in range(FRAMES)]
    boxes = np.concatenate([world.boxes for world in worlds])
    names = np.array([name for world in worlds for name in world.names])
    # Mean length, width and height of KITTI's labels; a lorry's by this simulator's own rule.
    expected = {
        "Car": (4.0, 1.65, 1.52),
        "Pedestrian": (0.8, 0.6, 1.74),
        "Cyclist": (1.76, 0.6, 1.74),
        "Truck": (11, 2.5, 3.3),
    }
    for name, size in expected.items():
        np.testing.assert_allclose(boxes[names == name, 3:6].mean(0), size, rtol=0.2)
    lengths = boxes[names == "Truck", 3]
    assert lengths.min() >= 8
    assert lengths.max() <= 14


def test_content_is_as_hard_as_it_should_be(scenes: list[Scene]) -> None:
    boxes = np.concatenate([scene.boxes for scene in scenes])
    points = np.concatenate([scene.attributes["points"] for scene in scenes])
    hidden = np.concatenate([scene.attributes["hidden"] for scene in scenes])
    names = Counter(name for scene in scenes for name in scene.names)
    away = np.hypot(boxes[:, 0], boxes[:, 1])
    near = away < 51.2
    assert set(names) == set(CLASSES)
    assert min(names[name] for name in ("Car", "Pedestrian", "Cyclist")) > 1.5 * FRAMES
    assert 0.15 < (points[near] < 10).mean() < 0.5
    assert 0.3 < (hidden[near] > 0.3).mean() < 0.5
    assert (away > 50).mean() > 0.08
    cars = np.concatenate([scene.names for scene in scenes]) == "Car"
    medians = [np.median(points[cars & (away >= low) & (away < low + 20)]) for low in (0, 20, 40)]
    assert medians[0] > 100 > medians[1] > 10 > medians[2] > 2
    assert 5000 < np.mean([len(scene.points) for scene in scenes]) < 8000


def test_attributes_agree_with_each_other(scenes: list[Scene]) -> None:
    for scene in scenes:
        hidden, occlusion = scene.attributes["hidden"], scene.attributes["occlusion"]
        assert ((hidden >= 0) & (hidden < 1)).all()
        np.testing.assert_array_equal(
            occlusion, (hidden[:, None] >= np.array([0.1, 0.5, 0.85], np.float32)).sum(1)
        )
        easy = scene.attributes["difficulty"] == 0
        assert (occlusion[easy] == 0).all()
        assert (scene.attributes["truncation"][easy] <= 0.15).all()
        assert (np.hypot(*scene.boxes[easy, :2].T) < 721.5 * 3.8 / 40).all()


def test_intensity_and_sector(scenes: list[Scene]) -> None:
    for scene in scenes:
        x, y, _, intensity = scene.points.T
        assert ((intensity >= 0) & (intensity <= 1)).all()
        assert (np.abs(np.degrees(np.arctan2(y, x))) < 40.8).all()
        assert (np.linalg.norm(scene.points[:, :3], axis=1) < 80.2).all()


def test_a_full_turn_sees_behind() -> None:
    scene = Simulator(1, seed=1, sensor="ring32")[0]
    quarters = np.histogram(np.arctan2(scene.points[:, 1], scene.points[:, 0]), 4, (-np.pi, np.pi))[0]
    assert (quarters > 0.1 * len(scene.points)).all()
    assert (scene.boxes[:, 0] < -5).any()
    assert (scene.attributes["truncation"] == 0).all()


def test_shifted_layouts_have_another_beam_pattern() -> None:
    train, shifted = Simulator(1), Simulator(1, layout="shifted")
    assert len(train.sensor.elevations) == len(shifted.sensor.elevations)
    assert not np.isin(np.round(shifted.sensor.elevations, 2), np.round(train.sensor.elevations, 2)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensor": "beams99"}, "sensor 'beams99' is unknown: give one of beams16, beams32"),
        ({"layout": "moon"}, "layout 'moon' is unknown: give one of train, shifted"),
        ({"frames": -1}, "frames -1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Simulator(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"elevations": ()}, {"azimuth_step": 0.0}, {"sector": 200.0}])
def test_bad_sensors_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sensor(**settings)  # type: ignore[arg-type]


def test_frames_end(simulator: Simulator) -> None:
    assert len(simulator) == FRAMES
    with pytest.raises(IndexError, match="frame 40 of 40"):
        simulator[FRAMES]
