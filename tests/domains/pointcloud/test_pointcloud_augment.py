from dataclasses import replace
from math import pi
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.augment import Augmentation, jitter_objects, transform
from mainstem.domains.pointcloud.boxes import corners_bev, points_in_boxes
from mainstem.domains.pointcloud.overlap import bev_intersection, paired_iou_3d
from mainstem.domains.pointcloud.scene import Array, Scene


def scene_of(seed: int, count: int = 12, crowded: bool = False) -> Scene:
    """Boxes with points well inside them or well outside all, so that rounding cannot carry one across."""
    rng = np.random.default_rng(seed)
    extent = 8 if crowded else 40
    boxes = rng.uniform([-extent, -extent, -2, 1, 1, 1, -pi], [extent, extent, 0, 5, 2.5, 2, pi], (count, 7))
    local = rng.uniform(-0.49, 0.49, (count, 20, 3)) * boxes[:, None, 3:6]
    cos, sin = np.cos(boxes[:, None, 6]), np.sin(boxes[:, None, 6])
    x, y, z = np.moveaxis(local, 2, 0)
    own = np.stack([x * cos - y * sin, x * sin + y * cos, z], 2) + boxes[:, None, :3]
    free = rng.uniform([-45, -45, -3], [45, 45, 3], (400, 3))
    points = np.concatenate([own.reshape(-1, 3), free])
    larger = boxes + np.array([0, 0, 0, 0.02, 0.02, 0.02, 0])
    clear = ~(found(points, larger) & ~found(points, boxes)).any(1)
    points = np.concatenate([points, rng.random((len(points), 1))], 1)[clear]
    velocities = np.where(rng.random((count, 1)) < 0.3, np.nan, rng.normal(0, 5, (count, 2)))
    return Scene(
        f"{seed}",
        points.astype(np.float32),
        ("intensity",),
        boxes.astype(np.float32),
        np.array(["Car", "Pedestrian"])[rng.integers(0, 2, count)],
        velocities.astype(np.float32),
        {"track": np.arange(count)},
        {"source": "nowhere"},
    )


def found(points: Array, boxes: Array) -> Array:
    inside: Array = points_in_boxes(
        torch.from_numpy(points).double(), torch.from_numpy(boxes).double()
    ).numpy()
    return inside


def heading(boxes: Array) -> Array:
    return np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)


factors = st.floats(0.8, 1.25)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.floats(0, pi), factors, st.floats(0, 2))
def test_points_stay_in_their_boxes(
    seed: int, flip_x: bool, flip_y: bool, rotation: float, factor: float, translation: float
) -> None:
    scene = scene_of(seed)
    scaling = (min(1, factor), max(1, factor))
    augmentation = Augmentation(flip_x, flip_y, rotation, scaling, translation)
    changed = augmentation(scene, np.random.default_rng(seed))
    np.testing.assert_array_equal(found(changed.points, changed.boxes), found(scene.points, scene.boxes))
    assert found(scene.points, scene.boxes).sum() >= 200
    np.testing.assert_array_equal(changed.points[:, 3], scene.points[:, 3])
    np.testing.assert_array_equal(changed.names, scene.names)
    assert changed.attributes == scene.attributes
    assert (changed.id, changed.meta) == (scene.id, scene.meta)
    assert changed.boxes.dtype == changed.points.dtype == np.float32
    assert (np.abs(changed.boxes[:, 6]) <= np.float32(pi)).all()


def test_velocity_and_heading_turn_together() -> None:
    scene = scene_of(0)
    speed = np.array([[3.0]], np.float32)
    scene = replace(scene, velocities=speed * heading(scene.boxes))
    for seed in range(20):
        changed = Augmentation(True, True, pi, (0.5, 2.0), 1.0, 0.4, 0.5)(scene, np.random.default_rng(seed))
        assert changed.velocities is not None
        scale = changed.boxes[:, 3:4] / scene.boxes[:, 3:4]
        np.testing.assert_allclose(changed.velocities, speed * scale * heading(changed.boxes), atol=2e-5)


def test_unknown_velocities_stay_unknown() -> None:
    scene = scene_of(0)
    assert scene.velocities is not None
    unknown = np.isnan(scene.velocities)
    assert unknown.any()
    changed = Augmentation(object_rotation=0.3)(scene, np.random.default_rng(0))
    assert changed.velocities is not None
    np.testing.assert_array_equal(np.isnan(changed.velocities), unknown)
    assert Augmentation()(replace(scene, velocities=None), np.random.default_rng(0)).velocities is None


@pytest.mark.parametrize(
    ("linear", "x", "y", "yaw"),
    [
        pytest.param(np.diag([1, -1]), 3.0, -4.0, -0.3, id="mirror y"),
        pytest.param(np.diag([-1, 1]), -3.0, 4.0, pi - 0.3, id="mirror x"),
        pytest.param(np.array([[0, -1], [1, 0]]), -4.0, 3.0, pi / 2 + 0.3, id="quarter turn"),
    ],
)
def test_transform_of_one_box(linear: Array, x: float, y: float, yaw: float) -> None:
    box = np.array([[3, 4, 1, 4, 2, 1.5, 0.3]], np.float32)
    changed = transform(Scene("a", box[:, :3], boxes=box, names=np.array(["Car"])), linear, 2.0, np.ones(3))
    expected = [[2 * x + 1, 2 * y + 1, 3, 8, 4, 3, yaw]]
    np.testing.assert_allclose(changed.boxes, expected, atol=1e-6)
    np.testing.assert_allclose(changed.points, [[2 * x + 1, 2 * y + 1, 3]], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-pi, pi), st.booleans(), factors)
def test_corners_follow_and_the_inverse_undoes(seed: int, angle: float, mirror: bool, scale: float) -> None:
    scene = scene_of(seed)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.diag([1, -1 if mirror else 1])
    shift = np.array([1.0, -2.0, 0.5])
    changed = transform(scene, linear, scale, shift)
    expected = scale * corners_bev(torch.from_numpy(scene.boxes)).numpy() @ linear.T + shift[:2]
    if mirror:
        expected = expected[:, [3, 2, 1, 0]]  # left and right of a box change places
    np.testing.assert_allclose(corners_bev(torch.from_numpy(changed.boxes)).numpy(), expected, atol=5e-5)
    back = transform(transform(changed, np.eye(2), 1.0, -shift), linear.T, 1 / scale)
    iou = paired_iou_3d(torch.from_numpy(back.boxes).double(), torch.from_numpy(scene.boxes).double())
    np.testing.assert_allclose(iou, 1, atol=1e-4)
    np.testing.assert_allclose(back.points, scene.points, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_moved_objects_keep_their_points_and_meet_no_other(seed: int, crowded: bool) -> None:
    scene = scene_of(seed, crowded=crowded)
    changed = jitter_objects(scene, 0.8, 1.0, np.random.default_rng(seed))
    before, after = (torch.from_numpy(one.boxes).double() for one in (scene, changed))
    was, now = bev_intersection(before, before), bev_intersection(after, after)
    apart = ~torch.eye(len(was), dtype=torch.bool)
    assert float((now - was)[apart].max()) < 1e-4
    own = found(scene.points, scene.boxes)
    assert (found(changed.points, changed.boxes) | ~own).all()
    moved = (changed.boxes != scene.boxes).any(1)
    assert moved.any() or crowded
    assert not moved[((was > 0) & apart).any(1).numpy()].any()
    still = ~own[:, moved].any(1)
    np.testing.assert_array_equal(changed.points[still], scene.points[still])
    np.testing.assert_array_equal(changed.boxes[:, 2:6], scene.boxes[:, 2:6])


def test_draws_cover_both_sides_and_stay_within_the_settings() -> None:
    box = np.array([[10, 5, 0, 4, 2, 1, 0.0]], np.float32)
    scene = Scene("a", np.zeros((0, 3), np.float32), boxes=box, names=np.array(["Car"]))
    generator = np.random.default_rng(0)
    augmentation = Augmentation(rotation=0.5, scaling=(0.9, 1.2))
    boxes = np.concatenate([augmentation(scene, generator).boxes for _ in range(400)])
    factor = boxes[:, 3] / 4
    assert 0.9 <= factor.min() < 0.91
    assert 1.19 < factor.max() <= 1.2
    assert -0.5 <= boxes[:, 6].min() < -0.48
    assert 0.48 < boxes[:, 6].max() <= 0.5
    side = np.sin(np.arctan2(boxes[:, 1], boxes[:, 0]) - boxes[:, 6]) > 0
    assert 150 < side.sum() < 250


def test_the_same_generator_gives_the_same_and_the_input_stays() -> None:
    scene = scene_of(3)
    points, boxes = scene.points.copy(), scene.boxes.copy()
    augmentation = Augmentation(True, True, 1.0, (0.9, 1.1), 0.5, 0.3, 0.3)
    one, other = (augmentation(scene, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(scene.points, points)
    np.testing.assert_array_equal(scene.boxes, boxes)
    assert np.abs(one.boxes - boxes).max() > 0.1


def test_frames_without_points_or_boxes() -> None:
    empty = Scene("a", np.zeros((0, 3), np.float32))
    changed = Augmentation(object_rotation=0.5, object_translation=0.5)(empty, np.random.default_rng(0))
    assert changed.points.shape == (0, 3)
    assert changed.boxes.shape == (0, 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rotation": -0.1}, "rotation must be 0 or more, got -0.1"),
        ({"object_translation": float("nan")}, "object_translation must be 0 or more, got nan"),
        ({"scaling": (1.1, 0.9)}, "the smaller first"),
        ({"scaling": (0.0, 1.0)}, "two positive factors"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**wrong)
