import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.cloud_checks import (
    CloudStatistics,
    check_cloud,
    ground_height,
    summarize,
)
from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.scene import Array, Scene
from mainstem.domains.pointcloud.simulator import Simulator

GRID = Grid((0, -40, -3), (70.4, 40, 1), (0.2, 0.2, 0.125))


def street(seed: int = 0, sector: float = np.pi / 4) -> Scene:
    """A street seen from 1.7 m above it: ground that thins out with distance, fronts, and things on it."""
    rng = np.random.default_rng(seed)
    angle, distance = rng.uniform(-sector, sector, 6000), 4 + 40 * rng.random(6000) ** 2
    ground = np.stack([distance * np.cos(angle), distance * np.sin(angle), rng.normal(-1.7, 0.03, 6000)], 1)
    front = rng.uniform([10, 11.9, -1.7], [40, 12.1, 0.9], (1000, 3))
    things = rng.uniform([12, -6, -1.7], [16, -4, 0], (1500, 3))
    xyz = np.concatenate([ground, front, front * [1, -1, 1], things])
    points = np.column_stack([xyz, rng.uniform(0, 0.9, len(xyz))])
    return Scene(f"{seed}.bin", points.astype(np.float32), ("intensity",))


def moved(points: Array) -> Scene:
    return replace(street(), points=points.astype(np.float32))


TRAINING = CloudStatistics.of([street(seed) for seed in range(5)], GRID)
POINTS = street().points


def test_statistics_are_the_medians_of_the_frames() -> None:
    assert TRAINING.ground == pytest.approx(-1.7, abs=0.1)
    assert TRAINING.intensity == pytest.approx(0.89, abs=0.01)
    assert TRAINING.points == pytest.approx(9500, rel=0.01)
    with pytest.raises(ValueError, match="at least one frame"):
        CloudStatistics.of([], GRID)


@pytest.mark.parametrize("training", [None, TRAINING])
@pytest.mark.parametrize("seed", range(5))
def test_a_good_frame_is_silent(seed: int, training: CloudStatistics | None) -> None:
    assert check_cloud(street(seed), GRID, training) == {}
    around = street(seed, sector=np.pi)
    assert check_cloud(around, GRID, training) == {}


@pytest.mark.parametrize("training", [None, TRAINING])
@pytest.mark.parametrize(
    ("scene", "kind", "message"),
    [
        (moved(POINTS[:0]), "points", "the cloud holds no point$"),
        (moved(POINTS * np.nan), "points", "no point that is not NaN"),
        (moved(POINTS[:50]), "points", "only 50 of 50 points"),
        (
            moved(np.where(np.arange(len(POINTS))[:, None] == 3, np.nan, POINTS)),
            "points",
            "1 of 9500 points are",
        ),
        (moved(POINTS * [1e3, 1e3, 1e3, 1]), "units", "millimetres"),
        (moved(POINTS * [1e-2, 1e-2, 1e-2, 1]), "units", "in other units"),
        (moved(POINTS + np.array([4e5, 5e6, 100, 0])), "units", "not on a map"),
        (moved(POINTS[:, [1, 2, 0, 3]] * [-1, -1, 1, 1]), "axes", "flat along y"),
        (moved(POINTS[:, [2, 1, 0, 3]]), "axes", "flat along x"),
        (moved(POINTS * [1, -1, -1, 1]), "axes", "does z point down"),
        (moved(POINTS + np.array([0, 0, 1.7, 0])), "ground", "the ground lies at z = "),
        (moved(POINTS + np.array([0, 0, -2, 0])), "ground", "the ground lies at z = -3.7"),
        (moved(POINTS * [-1, -1, 1, 1]), "range", "looking to the back it would be 100.0%"),
        (moved(POINTS[:, [1, 0, 2, 3]] * [-1, 1, 1, 1]), "range", "looking to the left it would be 100.0%"),
        (moved(POINTS[:, [1, 0, 2, 3]] * [1, -1, 1, 1]), "range", "looking to the right it would be 100.0%"),
        (moved(POINTS * [1, 1, 1, 255]), "intensity", "reaches 227, expected 0 to 1: divide it by 255"),
        (moved(POINTS * [1, 1, 1, 65535]), "intensity", "divide it by 65535"),
    ],
)
def test_what_is_wrong_is_named(
    scene: Scene, kind: str, message: str, training: CloudStatistics | None
) -> None:
    found = check_cloud(scene, GRID, training)
    assert kind in found
    assert re.search(message, found[kind])
    # Few points in the range may follow from the rest; nothing else may be accused.
    assert set(found) <= {kind, "points"}


def test_simulated_frames_are_silent_and_shifted_ones_are_not() -> None:
    frames = Simulator(12, seed=7)
    training = CloudStatistics.of([frames[index] for index in range(6)], GRID)
    assert training.ground == pytest.approx(-1.73, abs=0.15)
    for index in range(6, 12):
        scene = frames[index]
        assert check_cloud(scene, GRID, training) == {}
        raised = replace(scene, points=scene.points + np.array([0, 0, 1, 0], np.float32))
        assert check_cloud(raised, GRID, training).keys() == {"ground"}


def test_the_shift_that_mends_the_ground_is_told() -> None:
    found = check_cloud(moved(POINTS + np.array([0, 0, 0.7, 0])), GRID, TRAINING)
    assert found.keys() == {"ground"}
    assert "add -0.7" in found["ground"]
    assert check_cloud(moved(POINTS + np.array([0, 0, 0.3, 0])), GRID, TRAINING) == {}


def test_intensity_is_compared_with_that_of_training() -> None:
    wide = replace(TRAINING, intensity=240.0)
    assert "multiply it by 255" in check_cloud(street(), GRID, wide)["intensity"]
    assert check_cloud(moved(POINTS * [1, 1, 1, 255]), GRID, wide) == {}
    assert "0 everywhere" in check_cloud(moved(POINTS * [1, 1, 1, 0]), GRID, TRAINING)["intensity"]
    bare = Scene("bare", POINTS[:, :3])
    assert check_cloud(bare, GRID, TRAINING) == {}


def test_misread_columns_are_asked_for() -> None:
    flat = np.column_stack([POINTS, np.zeros(len(POINTS))]).astype(np.float32)
    five = moved(flat.reshape(-1, 4))
    found = check_cloud(five, GRID, TRAINING)["intensity"]
    assert re.match(r"intensity goes from -\d+ to \d+, expected 0 to 1: are .* x, y, z, intensity\?", found)


@pytest.mark.filterwarnings("error")
def test_doubles_read_as_floats_are_told_without_an_overflow() -> None:
    doubles = moved(POINTS.astype(np.float64).ravel().view(np.float32).reshape(-1, 4))
    found = check_cloud(doubles, GRID, TRAINING)
    assert "is the file's data of another type than it is read as?" in found["units"]


def test_a_narrow_range_says_what_it_is() -> None:
    grid = Grid((36, -40, -3), (70, 40, 1), (1, 1, 1))
    found = check_cloud(street(), grid)
    assert found.keys() == {"range"}
    assert "of the points lie in the range x 36…70, y -40…40, z -3…1 m" in found["range"]


@settings(max_examples=20, deadline=None)
@given(height=st.floats(-5, 5), turn=st.floats(0, 6.3))
def test_ground_follows_the_cloud_and_nothing_else(height: float, turn: float) -> None:
    cos, sin = np.cos(turn), np.sin(turn)
    xyz = POINTS[:, :3] @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + [0, 0, height]
    assert ground_height(xyz) == pytest.approx(-1.72 + height, abs=0.1)


def test_ground_without_near_points_is_unknown() -> None:
    assert np.isnan(ground_height(POINTS[:0]))
    assert np.isnan(ground_height(POINTS[:100, :3] + [100, 0, 0]))


def test_a_kind_is_said_once_for_all_frames() -> None:
    found = {"a": {"axes": "z?"}, "b": {}, "c": {"axes": "z!", "points": "few"}}
    assert summarize(found) == ["2 of 3 frames, such as a: z?", "1 of 3 frames, such as c: few"]
    assert summarize({"a": {"axes": "z?"}}) == ["frame a: z?"]
    assert summarize({"a": {}, "b": {}}) == []
