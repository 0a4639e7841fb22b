"""KITTI's calibrations and labels, there and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.kitti_labels import (
    Calibration,
    boxes_from_camera,
    boxes_to_camera,
    read_ignored,
    read_labels,
    write_labels,
)

REAL = Path(__file__).parents[4] / "shared" / "data" / "lidar" / "kitti_object"

TILTED = Calibration(
    np.array([[707.0, 0, 604, 45.8], [0, 707, 180.5, -0.35], [0, 0, 1, 0.005]]),
    np.array([[0.99991, 0.0101, -0.0085], [-0.0101, 0.99994, -0.004], [0.0085, 0.0041, 0.99996]]),
    np.array([[0.007, -0.99997, -0.0028, -0.025], [-0.001, 0.0027, -0.99999, -0.06],
              [0.99998, 0.0069, -0.001, -0.33]]),
)  # fmt: skip
numbers = st.floats(-50, 50, width=32)
boxes = st.lists(
    st.tuples(numbers, numbers, numbers, *[st.floats(0.2, 12)] * 3, st.floats(-3.14, 3.14)), max_size=5
).map(lambda rows: np.array(rows, np.float64).reshape(-1, 7))


def test_a_box_whose_place_is_known() -> None:
    # 10 m ahead, 2 m to the left, on ground 1.7 m below, pointing ahead: in the camera it points along z.
    box = np.array([[10, 2, -0.95, 4, 1.8, 1.5, 0]])
    camera = boxes_to_camera(box, Calibration.default())
    np.testing.assert_allclose(camera, [[1.5, 1.8, 4, -2, 1.7, 10, -np.pi / 2]])
    pixels, depth = Calibration.default().project(box)
    np.testing.assert_allclose(depth, [10])
    np.testing.assert_allclose(pixels, [[609.5593 - 721.5377 * 0.2, 172.854 + 721.5377 * 0.095]], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(boxes)
def test_to_the_camera_and_back(given: np.ndarray) -> None:
    back = boxes_from_camera(boxes_to_camera(given, TILTED), TILTED)
    np.testing.assert_allclose(back[:, :6], given[:, :6], atol=1e-4)
    np.testing.assert_allclose(np.cos(back[:, 6] - given[:, 6]), 1, atol=1e-6)
    np.testing.assert_allclose(TILTED.to_lidar(TILTED.to_camera(given)), given[:, :3], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(boxes)
def test_files_keep_boxes_to_a_tenth_of_a_millimetre(
    tmp_path_factory: pytest.TempPathFactory, given: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("labels") / "000000.txt"
    write_labels(path, given, ["Car"] * len(given), np.linspace(0, 1, len(given)), TILTED)
    back, names, attributes = read_labels(path, TILTED)
    np.testing.assert_allclose(back[:, :6], given[:, :6], atol=5e-4)
    np.testing.assert_allclose(np.cos(back[:, 6] - given[:, 6]), 1, atol=1e-6)
    assert names.tolist() == ["Car"] * len(given)
    if len(given):
        np.testing.assert_allclose(attributes["score"], np.linspace(0, 1, len(given)), atol=1e-6)


def test_calibrations_are_read_as_written(tmp_path: Path) -> None:
    TILTED.write(tmp_path / "calib.txt")
    back = Calibration.read(tmp_path / "calib.txt")
    for name in ("projection", "rectification", "velodyne_to_camera"):
        np.testing.assert_allclose(getattr(back, name), getattr(TILTED, name), rtol=1e-11)
    lines = (tmp_path / "calib.txt").read_text()
    assert [line.split(":")[0] for line in lines.splitlines()] == [
        "P0", "P1", "P2", "P3", "R0_rect", "Tr_velo_to_cam", "Tr_imu_to_velo"
    ]  # fmt: skip
    # The tracking benchmark's names, without colons.
    tracking = lines.replace("R0_rect:", "R_rect").replace("Tr_velo_to_cam:", "Tr_velo_cam")
    (tmp_path / "tracking.txt").write_text(tracking)
    np.testing.assert_allclose(Calibration.read(tmp_path / "tracking.txt").rectification, back.rectification)


def test_calibrations_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "calib.txt"
    TILTED.write(path)
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if "velo_to_cam" not in line))
    with pytest.raises(ValueError, match=r"calib\.txt' has no Tr_velo_to_cam or Tr_velo_cam; it has P0, P1"):
        Calibration.read(path)
    path.write_text(whole.replace("R0_rect:", "R0_rect: 1"))
    with pytest.raises(ValueError, match="R0_rect must be 9 numbers, got '1 "):
        Calibration.read(path)
    with pytest.raises(FileNotFoundError, match=r"none\.txt' does not exist"):
        Calibration.read(tmp_path / "none.txt")


def test_the_image_cuts_boxes() -> None:
    camera = Calibration.default()
    box = np.array([[10, 0, 0, 4, 2, 1.5, 0]])
    left = camera.image_boxes(box)[0][0, 0]
    assert left == pytest.approx(609.5593 - 721.5377 * 1 / 8)
    # The left edge of the image is 609.56 / 721.54 m to the left at 1 m: half of a thin plate is beyond it.
    plate = np.array([[10, 10 * 609.5593 / 721.5377, 0, 1e-6, 2, 1, 0]])
    image, truncation = camera.image_boxes(plate)
    assert image[0, 0] == 0
    assert truncation[0] == pytest.approx(0.5, abs=1e-3)
    behind = camera.image_boxes(-box)[0]
    np.testing.assert_array_equal(behind, np.zeros((1, 4)))
    np.testing.assert_array_equal(
        camera.in_view(np.array([[10, 0, 0], [-10, 0, 0], [1, 5, 0], [np.nan, 0, 0]])),
        [True, False, False, False],
    )
    assert replace(camera, image_size=(600, 375)).in_view(np.array([[10.0, 0, 0]])).tolist() == [False]


def test_observation_angle_and_what_is_not_labelled(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    box = np.array([[10, 10, 0, 4, 2, 1.5, 0.3]])
    write_labels(path, box, ["Car"], None, Calibration.default(), ignored=np.array([[1, 2, 3, 4.5]]))
    back, names, attributes = read_labels(path, Calibration.default())
    # ry = -0.3 - π/2, and the box is seen at -45°.
    np.testing.assert_allclose(attributes["alpha"], [-0.3 - np.pi / 2 + np.pi / 4], atol=1e-4)
    assert names.tolist() == ["Car"]
    assert len(back) == 1
    assert "score" not in attributes
    np.testing.assert_array_equal(read_ignored(path), [[1, 2, 3, 4.5]])


def test_labels_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Car 0 0 0 1 2 3 4 1 2 4 0 0 9\n")
    with pytest.raises(ValueError, match=r"a\.txt', line 1: 14 fields"):
        read_labels(path, TILTED)
    path.write_text("\nCar 0 0 0 1 2 3 4 1 2 4 0 nan 9 0\n")
    with pytest.raises(ValueError, match=r"line 2: 'nan' is not a number"):
        read_labels(path, TILTED)
    with pytest.raises(ValueError, match="names has 2 entries for 1 boxes"):
        write_labels(path, np.ones((1, 7)), ["Car", "Van"])
    with pytest.raises(ValueError, match="must be one word, got 'a car'"):
        write_labels(path, np.ones((1, 7)), ["a car"])
    path.write_text("")
    assert read_labels(path, TILTED)[0].shape == (0, 7)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real frames")
def test_real_labels_come_back_and_project_onto_their_image_boxes(tmp_path: Path) -> None:
    apart, cut = [], []
    for path in sorted((REAL / "label_2").glob("*.txt")):
        calibration = Calibration.read(REAL / "calib" / path.name)
        given, names, attributes = read_labels(path, calibration)
        write_labels(tmp_path / path.name, given, names, None, calibration, attributes, read_ignored(path))
        back, again, _ = read_labels(tmp_path / path.name, calibration)
        np.testing.assert_allclose(back, given, atol=1e-4)
        assert again.tolist() == names.tolist()
        image, truncation = calibration.image_boxes(given)
        labelled = np.stack([attributes[f"image_{side}"] for side in ("left", "top", "right", "bottom")], 1)
        apart.append(np.abs(image - labelled).max(1))
        cut.append(np.abs(truncation - attributes["truncation"]))
    assert np.median(np.concatenate(apart)) < 0.5
    assert np.quantile(np.concatenate(apart), 0.9) < 3
    assert np.quantile(np.concatenate(cut), 0.95) < 0.05
