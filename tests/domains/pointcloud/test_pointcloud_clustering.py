import time
from dataclasses import replace
from math import pi

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from mainstem.domains.pointcloud.boxes import corners_bev
from mainstem.domains.pointcloud.clustering import (
    Clustering,
    Size,
    cluster,
    components,
    fit_rectangles,
    ground,
)
from mainstem.domains.pointcloud.overlap import bev_iou
from mainstem.domains.pointcloud.scene import Array, Scene
from mainstem.domains.pointcloud.simulator import Simulator

CLASSES = ("Car", "Pedestrian", "Cyclist")


def terrain(xy: Array) -> Array:
    height: Array = -1.73 + 0.02 * xy[:, 0] - 0.01 * xy[:, 1] + 0.15 * np.sin(xy[:, 0] / 12)
    return height


def flat_ground(rng: np.random.Generator, count: int = 6000) -> Array:
    xy = rng.uniform([0, -30], [60, 30], (count, 2))
    return np.column_stack([xy, terrain(xy) + rng.normal(0, 0.02, count)])


def near_sides(box: Array, rng: np.random.Generator, count: int = 400) -> Array:
    """Points on the vertical sides of ``box`` that the sensor at the origin can see."""
    corners = corners_bev(torch.from_numpy(box[None])).numpy()[0]
    following = np.roll(corners, -1, 0)
    outward = np.stack([following[:, 1] - corners[:, 1], corners[:, 0] - following[:, 0]], 1)
    sides = np.flatnonzero((outward * corners).sum(1) < 0)
    side, share = rng.choice(sides, count), rng.random((count, 1))
    xy = corners[side] + share * (following - corners)[side]
    return np.column_stack([xy, box[2] + rng.uniform(-0.5, 0.5, count) * box[5]])


def standing(x: float, y: float, edges: tuple[float, float, float], yaw: float) -> Array:
    base = float(terrain(np.array([[x, y]]))[0])
    return np.array([x, y, base + edges[2] / 2, *edges, yaw])


def test_ground_is_found_below_what_stands_on_it() -> None:
    rng = np.random.default_rng(0)
    walls = np.column_stack([rng.uniform([0, 25], [60, 30], (4000, 2)), rng.uniform(0, 4, 4000)])
    floor = flat_ground(rng)
    hidden = floor[floor[:, 1] < 25]  # no ground is seen below the walls
    found = ground(np.concatenate([hidden, walls]))
    xy = rng.uniform([1, -29], [59, 22], (500, 2))
    error = np.abs(found.height(xy) - terrain(xy))
    assert np.median(error) < 0.06
    assert error.max() < 0.25


def test_ground_of_few_points() -> None:
    assert ground(np.zeros((0, 3))).height(np.array([[3.0, 4.0]])) == [0]
    one = ground(np.array([[10.0, 2.0, -1.5]]))
    np.testing.assert_allclose(one.height(np.array([[10.0, 2.0]])), [-1.5], atol=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 3))
def test_components_are_those_of_the_distance_graph(seed: int, reach: float) -> None:
    xy = np.random.default_rng(seed).uniform(-15, 15, (40, 2))
    linked = cdist(xy, xy) <= reach
    for _ in range(6):  # reachable in 64 steps
        linked = (linked.astype(int) @ linked.astype(int)) > 0
    label = components(xy, reach, cell=1e-6)
    np.testing.assert_array_equal(label[:, None] == label, linked)


def test_the_shorter_reach_of_a_pair_counts() -> None:
    xy = np.array([[0.0, 0], [1, 0], [2, 0]])
    a, b, c = components(xy, np.array([1.5, 1.5, 0.5])).tolist()
    assert a == b != c
    assert components(np.zeros((0, 2)), 1.0).shape == (0,)


@pytest.mark.parametrize("sides", [1, 2, 4])
def test_rectangles_follow_the_sides_that_are_seen(sides: int) -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform([-20, -20, 0, 3, 0.5, 1], [20, 20, 0, 6, 2, 1], (30, 6))
    boxes = np.column_stack([boxes, np.deg2rad(rng.choice(np.arange(0, 180, 3), 30))])
    corners = corners_bev(torch.from_numpy(boxes)).numpy()
    # Of a box: its left side, then its back, its right side and its front.
    share = np.linspace(0, 1, 20)[:, None]
    edges = [corners[:, i, None] * (1 - share) + corners[:, (i + 1) % 4, None] * share for i in range(sides)]
    points = np.concatenate(edges, 1)
    found = fit_rectangles(points.reshape(-1, 2), np.arange(30) * points.shape[1])
    np.testing.assert_allclose(found[:, 2], boxes[:, 3], atol=1e-6)
    np.testing.assert_allclose(found[:, 3], 0 if sides == 1 else boxes[:, 4], atol=1e-6)
    np.testing.assert_allclose(np.sin(found[:, 4] - boxes[:, 6]), 0, atol=1e-6)
    assert ((found[:, 4] >= 0) & (found[:, 4] < pi)).all()
    middle = (corners[:, 0] + corners[:, 1]) / 2 if sides == 1 else boxes[:, :2]
    np.testing.assert_allclose(found[:, :2], middle, atol=1e-6)


@pytest.mark.parametrize("yaw", [0.0, 0.6, pi / 2, -1.2])
def test_objects_of_each_class_are_found_and_named(yaw: float) -> None:
    rng = np.random.default_rng(0)
    boxes = [
        standing(15, 4, (3.9, 1.6, 1.5), yaw),
        standing(10, -4, (0.85, 0.65, 1.75), yaw),
        standing(20, -8, (1.75, 0.6, 1.75), yaw),
        standing(30, 12, (3.9, 1.6, 1.5), yaw + 0.7),
    ]
    cloud = np.concatenate([flat_ground(rng), *(near_sides(box, rng) for box in boxes)])
    found = cluster(Scene("a", cloud.astype(np.float32)), CLASSES)
    assert len(found) == 4
    iou = bev_iou(found.boxes.double(), torch.from_numpy(np.stack(boxes)))
    best, row = iou.max(0)
    assert found.labels[row].tolist() == [0, 1, 2, 0]
    assert float(best.min()) > 0.6
    np.testing.assert_allclose(found.boxes[row, 2], [box[2] for box in boxes], atol=0.15)
    assert (found.scores.diff() <= 0).all()
    assert 0 < float(found.scores.min()) <= float(found.scores.max()) < 1


def test_a_car_seen_from_behind_grows_away_from_the_sensor() -> None:
    rng = np.random.default_rng(0)
    car = standing(20, 0, (3.9, 1.63, 1.53), 0)
    cloud = np.concatenate([flat_ground(rng), near_sides(car, rng)])
    found = cluster(Scene("a", cloud.astype(np.float32)), CLASSES)
    assert found.labels.tolist() == [0]
    assert float(bev_iou(found.boxes.double(), torch.from_numpy(car[None]))) > 0.9


def test_walls_and_bare_ground_give_nothing() -> None:
    rng = np.random.default_rng(0)
    wall = near_sides(standing(30, 10, (25, 0.3, 3), 0), rng, 3000)
    scene = Scene("a", np.concatenate([flat_ground(rng), wall]).astype(np.float32))
    assert len(cluster(scene, CLASSES)) == 0
    nothing = cluster(Scene("a", np.zeros((0, 3), np.float32)), CLASSES)
    assert nothing.boxes.shape == (0, 7)
    gaps = np.full((10, 3), np.nan, np.float32)
    assert len(cluster(replace(scene, points=np.concatenate([scene.points, gaps])), CLASSES)) == 0


def test_classes_need_sizes() -> None:
    scene = Scene("a", np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="sizes: none for Tram; there are Car, Van"):
        cluster(scene, ("Car", "Tram"))
    own = Clustering(sizes={"Tram": Size(30, 2.6, 3.5)})
    assert len(cluster(scene, ("Tram",), own)) == 0


def test_on_simulated_streets_it_finds_many_cars_quickly() -> None:
    source = Simulator(12, seed=5, sensor="beams64")
    found = labelled = 0
    times = []
    for scene in (source[index] for index in range(12)):
        start = time.process_time()
        boxes = cluster(scene, source.classes)
        times.append(time.process_time() - start)
        cars = scene.boxes[(scene.names == "Car") & (scene.attributes["points"] >= 50)]
        of_cars = boxes[boxes.labels == source.classes.index("Car")].boxes
        labelled += len(cars)
        if len(of_cars) and len(cars):
            found += int((bev_iou(torch.from_numpy(cars), of_cars).max(1).values > 0.5).sum())
    assert labelled >= 20
    assert 0.5 < found / labelled < 1
    assert min(times) < 0.06
