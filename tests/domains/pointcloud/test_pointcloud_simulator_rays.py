"""Where rays meet solids and the ground, against points found by other means."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.simulator.ground import Ground
from mainstem.domains.pointcloud.simulator.render import Sweep, sweep
from mainstem.domains.pointcloud.simulator.sensor import SENSORS, Sensor
from mainstem.domains.pointcloud.simulator.shapes import (
    Parts,
    Row,
    Shape,
    assemble,
    bounds,
    intersect,
    part,
    place,
    to_unit,
    unit_normals,
)

FLAT = Ground(-1.73, (0.0, 0.0), np.zeros((0, 4)), 0.0, 0.0, 1000.0, 0.0)
SHARP = Sensor(SENSORS["beams32"].elevations, 0.35, range_noise=0.0, angle_noise=0.0, drop=0.0)
angles = st.floats(-3, 3)
lengths = st.floats(0.2, 3)


def inside(
    parts: Parts, points: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which points lie in the first part, by the definition of its shape."""
    x, y, z = to_unit(parts)[0] @ (points - parts["centre"][0]).T
    if parts["shape"][0] == Shape.BOX:
        return np.asarray(np.maximum(np.maximum(np.abs(x), np.abs(y)), np.abs(z)) < 1)
    if parts["shape"][0] == Shape.ELLIPSOID:
        return np.asarray(x * x + y * y + z * z < 1)
    return np.asarray((x * x + y * y < 1) & (np.abs(z) < 1))


def solid(shape: Shape, half: tuple[float, float, float], yaw: float, pitch: float) -> Parts:
    return assemble([part(shape, (6.0, 1.0, 0.5), half, yaw=yaw, pitch=pitch, reflectivity=0.5)])


@pytest.mark.parametrize("shape", list(Shape))
@given(half=st.tuples(lengths, lengths, lengths), yaw=angles, pitch=angles, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_rays_enter_and_leave_where_the_solid_begins_and_ends(
    shape: Shape, half: tuple[float, float, float], yaw: float, pitch: float, seed: int
) -> None:
    parts = solid(shape, half, yaw, pitch)
    aim = parts["centre"][0] + np.random.default_rng(seed).normal(0, 0.8, (50, 3))
    rays = aim / np.linalg.norm(aim, axis=1, keepdims=True)
    matrix = to_unit(parts)[0]
    origin = -(matrix @ parts["centre"][0])[:, None]
    near, far = intersect(
        shape, np.repeat(origin, 50, 1).astype(np.float32), (matrix @ rays.T).astype(np.float32)
    )
    met = near < far
    steps = np.linspace(-5, 20, 2501)
    along = inside(parts, (rays[:, None] * steps[:, None]).reshape(-1, 3)).reshape(50, -1)
    assert (along[~met].sum(1) <= 2).all()
    for row in np.flatnonzero(met & (far - near > 0.05)):
        assert abs(steps[along[row]].min() - near[row]) < 0.02
        assert abs(steps[along[row]].max() - far[row]) < 0.02


@pytest.mark.parametrize("shape", list(Shape))
@given(half=st.tuples(lengths, lengths, lengths), pitch=angles)
@settings(max_examples=25, deadline=None)
def test_bounds_are_tight(shape: Shape, half: tuple[float, float, float], pitch: float) -> None:
    parts = solid(shape, half, 0.0, pitch)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 3), -1).reshape(-1, 3)
    if shape == Shape.ELLIPSOID:
        grid = grid / np.maximum(np.linalg.norm(grid, axis=1, keepdims=True), 1)
    elif shape == Shape.CYLINDER:
        grid[:, :2] /= np.maximum(np.linalg.norm(grid[:, :2], axis=1, keepdims=True), 1)
    points = grid @ np.linalg.inv(to_unit(parts)[0]).T + parts["centre"][0]
    low, high = bounds(parts)
    size = (high - low).max()
    assert (points.min(0) >= low - 1e-9).all()
    assert (points.max(0) <= high + 1e-9).all()
    np.testing.assert_allclose(points.min(0), low, atol=0.02 * size)
    np.testing.assert_allclose(points.max(0), high, atol=0.02 * size)


@pytest.mark.parametrize("shape", list(Shape))
def test_normals_point_away_from_the_solid(shape: Shape) -> None:
    generator = np.random.default_rng(0)
    direction = generator.normal(size=(3, 200)).astype(np.float32)
    _, out = intersect(shape, np.zeros((3, 200), np.float32), direction)
    surface = out * direction
    normals = unit_normals(np.full(200, shape, np.int32), surface)
    normals /= np.linalg.norm(normals, axis=0)
    unit = assemble([part(shape, (0, 0, 0), (1, 1, 1), reflectivity=0.5)])
    assert inside(unit, (surface - 1e-3 * normals).T.astype(np.float64)).all()
    assert not inside(unit, (surface + 1e-3 * normals).T.astype(np.float64)).any()


def test_placing_turns_then_moves() -> None:
    parts = assemble([part(Shape.BOX, (1.0, 0.0, 0.5), (1, 1, 1), yaw=0.1, reflectivity=0.5)])
    placed = place(parts, 10.0, 5.0, -1.0, np.pi / 2, owner=3)
    np.testing.assert_allclose(placed["centre"], [[10.0, 6.0, -0.5]], atol=1e-12)
    assert placed["yaw"] == pytest.approx(0.1 + np.pi / 2)
    assert placed["owner"] == 3
    assert parts["owner"] == -1


def look(rows: list[Row], objects: int = 0, sensor: Sensor = SHARP, ground: Ground = FLAT) -> Sweep:
    parts = assemble(rows)
    parts["owner"] = [row if row < objects else -1 for row in range(len(rows))]
    return sweep(parts, ground, objects, sensor, np.random.default_rng(0))


def wall(x: float, half: float = 2.0, y: float = 0.0, **more: float) -> Row:
    return part(Shape.BOX, (x + 0.1, y, 0.0), (0.1, half, 1.5), **{"reflectivity": 0.9, **more})


def test_a_wall_is_hit_on_its_face_and_hides_what_is_behind() -> None:
    seen = look([wall(10.0, 2.0), wall(20.0, 1.0)], objects=2)
    face = seen.points[seen.owner == 0]
    np.testing.assert_allclose(face[:, 0], 10.0, atol=1e-4)
    assert np.abs(face[:, 1]).max() <= 2.0
    y = 10 * np.tan(SHARP.azimuths)
    z = np.hypot(10, y) * np.tan(SHARP.beams)[:, None]
    assert len(face) == ((np.abs(y) < 2) & (np.abs(z) < 1.5)).sum()
    assert seen.visible[1] == 0
    assert seen.alone[1] > 20
    assert not (seen.owner == 1).any()


def test_half_of_a_hidden_wall_is_hidden() -> None:
    seen = look([wall(20.0, 3.0), wall(10.0, 1.5, y=-1.5)], objects=1)
    assert 1 - seen.visible[0] / seen.alone[0] == pytest.approx(0.5, abs=0.05)


def test_transparency_and_porosity_let_rays_pass() -> None:
    glass = look([wall(10.0, transparency=0.55), wall(12.0, 1.0)], objects=2)
    # Of the rays towards the wall behind, 55 % get there.
    assert glass.visible[1] / glass.alone[1] == pytest.approx(0.55, abs=0.06)
    leaves = part(Shape.BOX, (12.0, 0.0, 0.0), (2.0, 2.0, 1.5), reflectivity=0.9, free_path=1.0)
    seen = look([leaves], objects=1)
    x, y, z, _ = seen.points[seen.owner == 0].T
    depth = x[(np.abs(y) < 0.1 * x) & (np.abs(z) < 0.1 * x)]  # of rays that go through from front to back
    assert depth.min() >= 10.0
    assert depth.max() <= 14.0
    # An exponential cut at 4 free paths, whose mean is 1 − 4/(e⁴ − 1).
    assert depth.mean() - 10 == pytest.approx(1 - 4 / (np.exp(4) - 1), rel=0.12)


@pytest.mark.parametrize(
    ("x", "half", "reflectivity"),
    [(10.0, 2.0, 0.9), (60.0, 12.0, 0.02), (60.0, 12.0, 0.05), (60.0, 12.0, 0.9)],
)
def test_dark_and_far_surfaces_return_less(x: float, half: float, reflectivity: float) -> None:
    fine = replace(
        SHARP, elevations=SENSORS["beams64"].elevations, azimuth_step=0.1
    )  # some 2000 rays meet it
    seen = look([wall(x, half, reflectivity=reflectivity)], objects=1, sensor=fine)
    share = (seen.owner == 0).sum() / seen.visible[0]
    assert share == pytest.approx(1 - np.exp(-reflectivity / (x * x * 1.2e-5)), abs=0.06)


def test_flat_ground_is_met_where_it_is() -> None:
    seen = look([])
    assert (seen.owner == -1).all()
    ground = seen.points
    np.testing.assert_allclose(ground[:, 2], -1.73, atol=2e-3)
    expected = 1.73 / np.tan(-SHARP.beams[SHARP.beams < np.radians(-2)])
    found = np.hypot(ground[:, 0], ground[:, 1])
    assert np.abs(found[:, None] - expected).min(1)[found < 45].max() < 0.05


def test_uneven_ground_is_met_on_its_surface_and_hides_what_lies_behind_a_rise() -> None:
    waves = np.array([[0.1, 0.1, 0.2, 1.0], [0.05, -0.3, 0.1, 2.0]])
    ground = Ground(-1.73, (0.01, -0.02), waves, 0.0, 0.0, 1000.0, 0.0)
    seen = look([], ground=ground)
    points = seen.points[seen.points[:, 0] < 40].astype(np.float64)
    np.testing.assert_allclose(points[:, 2], ground.at(points[:, 0], points[:, 1]), atol=0.01)
    hill = Ground(-1.73, (0.0, 0.0), np.array([[1.5, 0.2, 0.0, 0.0]]), 0.0, 0.0, 1000.0, 0.0)
    x = look([], ground=hill).points[:, 0]
    assert not ((x > 9.0) & (x < 28.0)).any()  # the hill's top is at 7.9 m, its valley at 23.6 m


def test_a_part_behind_the_sensor_lies_across_the_seam() -> None:
    ring = Sensor(SHARP.elevations, 0.35, 180.0, range_noise=0.0, angle_noise=0.0, drop=0.0)
    seen = look([wall(-10.2)], objects=1, sensor=ring)
    face = seen.points[seen.owner == 0]
    np.testing.assert_allclose(face[:, 0], -10.0, atol=1e-4)
    assert face[:, 1].min() < -1.9
    assert face[:, 1].max() > 1.9
    assert len(face) == pytest.approx((look([wall(10.0)], objects=1).owner == 0).sum(), rel=0.03)


def test_sensor_presets() -> None:
    fine = SENSORS["beams64"]
    assert fine.rays(np.random.default_rng(0)).shape == (3, 64, 478)
    assert SENSORS["beams32"].rays(np.random.default_rng(0)).shape == (3, 32, 232)
    np.testing.assert_allclose(np.degrees(fine.beams[[0, 31, 32, 63]]), [2, -8.333, -8.83, -24.33], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(fine.rays(np.random.default_rng(0)), axis=0), 1, rtol=1e-5)
