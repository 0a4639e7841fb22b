from math import pi

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainstem.domains.pointcloud.boxes import corners, corners_bev, points_in_boxes, wrap_angle


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    low, high = [-30, -30, -3, 0.3, 0.3, 0.3, -4], [30, 30, 1, 8, 3, 3, 4]
    return torch.from_numpy(rng.uniform(low, high, (count, 7)))


def test_corners_of_a_turned_box() -> None:
    box = torch.tensor([[10.0, 20.0, 1.0, 4.0, 2.0, 1.0, pi / 2]])
    expected = torch.tensor([[9.0, 22.0], [9.0, 18.0], [11.0, 18.0], [11.0, 22.0]])
    torch.testing.assert_close(corners_bev(box)[0], expected)
    all_corners = corners(box)[0]
    torch.testing.assert_close(all_corners[:4, :2], expected)
    torch.testing.assert_close(all_corners[4:, :2], expected)
    torch.testing.assert_close(all_corners[:, 2], torch.tensor([0.5] * 4 + [1.5] * 4))


def test_corners_run_counter_clockwise_round_the_area() -> None:
    boxes = random_boxes(50)
    x, y = corners_bev(boxes).unbind(2)
    area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2
    torch.testing.assert_close(area, boxes[:, 3] * boxes[:, 4])


def test_points_placed_in_a_box_are_found_there() -> None:
    boxes = random_boxes(40)
    share = torch.rand(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.75
    for box in boxes:
        forward = torch.stack([box[6].cos(), box[6].sin()])
        left = torch.stack([-forward[1], forward[0]])
        local = share * box[3:6]
        flat = local[:, :1] * forward + local[:, 1:2] * left
        points = torch.cat([box[:3] + torch.cat([flat, local[:, 2:]], 1), share], 1)
        found = points_in_boxes(points, box[None])[:, 0]
        assert torch.equal(found, (share.abs() <= 0.5).all(1))
        assert 0 < int(found.sum()) < 1000


def test_many_boxes_at_once_are_as_one_by_one() -> None:
    boxes = random_boxes(60)
    rng = np.random.default_rng(1)
    points = torch.from_numpy(rng.uniform([-30, -30, -3], [30, 30, 1], (100_000, 3)))
    together = points_in_boxes(points, boxes)
    assert together.shape == (100_000, 60)
    for column in (0, 31, 59):
        assert torch.equal(together[:, column], points_in_boxes(points, boxes[column, None])[:, 0])


def test_borders_belong_to_a_box_and_nan_does_not() -> None:
    box = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.0]])
    points = torch.tensor([[2.0, 1.0, 1.0], [2.0001, 0.0, 0.0], [0.0, 0.0, -1.0], [float("nan"), 0.0, 0.0]])
    assert points_in_boxes(points, box)[:, 0].tolist() == [True, False, True, False]


def test_no_points_and_no_boxes() -> None:
    assert points_in_boxes(torch.zeros(0, 4), random_boxes(3).float()).shape == (0, 3)
    assert points_in_boxes(torch.zeros(5, 4), torch.zeros(0, 7)).shape == (5, 0)
    assert corners(torch.zeros(0, 7)).shape == (0, 8, 3)


@given(st.floats(-1000, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_a_wrapped_angle_points_the_same_way(angle: float, dtype: torch.dtype) -> None:
    given_angle = torch.tensor([angle], dtype=dtype)
    wrapped = wrap_angle(given_angle)
    assert -np.float64(np.float32(pi)) <= float(wrapped) < float(torch.tensor(pi, dtype=dtype))
    tolerance = 1e-3 if dtype is torch.float32 else 1e-9
    assert abs(float(torch.sin((wrapped - given_angle) / 2))) < tolerance


def test_the_ends_of_the_circle_wrap_to_minus_pi() -> None:
    angles = torch.tensor([pi, -pi, 3 * pi, 0.0, -pi - 1e-12], dtype=torch.float64)
    expected = torch.tensor([-pi, -pi, -pi, 0.0, pi - 1e-12], dtype=torch.float64)
    torch.testing.assert_close(wrap_angle(angles), expected, atol=1e-12, rtol=0)
