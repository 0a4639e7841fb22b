import time
from math import pi, sqrt

import numpy as np
import pytest
import shapely  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem.domains.pointcloud.boxes import corners_bev
from mainstem.domains.pointcloud.overlap import bev_intersection, bev_iou, iou_3d, nms, paired_iou_3d


def random_boxes(count: int, extent: float = 12.0, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    low, high = [0, 0, -1, 0.3, 0.3, 0.3, -6], [extent, extent, 1, 6, 3, 3, 6]
    return torch.from_numpy(rng.uniform(low, high, (count, 7)))


def box(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def with_shapely(a: Tensor, b: Tensor) -> Tensor:
    one, other = (shapely.polygons(corners_bev(boxes.double()).numpy()) for boxes in (a, b))
    return torch.from_numpy(shapely.area(shapely.intersection(one[:, None], other[None])))


def test_intersection_is_that_of_shapely() -> None:
    a, b = random_boxes(150), random_boxes(150, seed=1)
    expected = with_shapely(a, b)
    assert int((expected > 0).sum()) > 2000
    torch.testing.assert_close(bev_intersection(a, b), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(bev_intersection(a.float(), b.float()).double(), expected, atol=2e-5, rtol=0)


def test_far_from_the_origin_no_digits_are_lost() -> None:
    a, b = random_boxes(60), random_boxes(60, seed=1)
    offset = box(4096, -2048, 0, 0, 0, 0, 0)
    near = bev_intersection(a, b)
    torch.testing.assert_close(bev_intersection(a + offset, b + offset), near, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turn", [0, pi, -pi, 2 * pi])
def test_identical_and_flipped_boxes_overlap_wholly(dtype: torch.dtype, turn: float) -> None:
    a = random_boxes(300).to(dtype)
    b = a.clone()
    b[:, 6] += turn
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    one = torch.ones(len(a), dtype=dtype)
    for iou in (bev_iou(a, b).diagonal(), iou_3d(a, b).diagonal(), paired_iou_3d(a, b)):
        torch.testing.assert_close(iou, one, atol=tolerance, rtol=0)
        assert float(iou.max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param((0, 0, 0, 4, 2, 1, 0), (4, 0, 0, 4, 2, 1, 0), 0.0, id="touching at an edge"),
        pytest.param((0, 0, 0, 4, 2, 1, 0), (4, 2, 0, 4, 2, 1, 0), 0.0, id="touching at a corner"),
        pytest.param((0, 0, 0, 4, 2, 1, 0.3), (0.1, 0.1, 0, 1, 0.5, 1, 1.1), 0.5, id="contained"),
        pytest.param((0, 0, 0, 4, 2, 1, 0), (1, 0, 0, 2, 2, 1, 0), 4.0, id="contained, three edges shared"),
        pytest.param((0, 0, 0, 4, 2, 1, 0), (3, 1, 0, 4, 2, 1, 0), 1.0, id="a corner"),
        pytest.param((0, 0, 0, 2, 2, 1, 0), (0, 0, 0, 2, 2, 1, pi / 4), 8 * (sqrt(2) - 1), id="octagon"),
        pytest.param((0, 0, 0, 6, 1, 1, 0), (0, 0, 0, 6, 1, 1, pi / 2), 1.0, id="cross"),
        pytest.param((0, 0, 0, 0, 0, 1, 0), (0, 0, 0, 4, 2, 1, 0.5), 0.0, id="point"),
        pytest.param((0, 0, 0, 4, 0, 1, 0.7), (0, 0, 0, 4, 2, 1, 0.5), 0.0, id="line"),
        pytest.param((0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 0), 0.0, id="two points"),
        pytest.param((0, 0, 0, 4, 0, 1, 1e-40), (0, 0, 0, 4, 2, 1, 0), 0.0, id="line, denormal angle"),
        pytest.param((0, 0, 0, 4, 2, 1, 1e-40), (0, 0, 0, 4, 2, 1, 0), 8.0, id="denormal angle"),
    ],
)
def test_intersection_of_special_pairs(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    for one, other in ((box(*a), box(*b)), (box(*b), box(*a))):
        assert float(bev_intersection(one, other)) == pytest.approx(expected, abs=1e-12)
        assert float(bev_intersection(one.float(), other.float())) == pytest.approx(expected, abs=2e-6)
        iou = bev_iou(one, other)
        union = float(one[0, 3] * one[0, 4] + other[0, 3] * other[0, 4]) - expected
        assert float(iou) == pytest.approx(expected / union if union else 0.0, abs=1e-12)


# Grids of values make shared edges, shared corners and right angles common.
coordinate = st.one_of(st.integers(-3, 3).map(float), st.floats(-3, 3))
edge = st.one_of(st.integers(0, 4).map(float), st.floats(0, 4))
angle = st.one_of(st.integers(-8, 8).map(lambda quarter: quarter * pi / 4), st.floats(-7, 7))
a_box = st.tuples(coordinate, coordinate, coordinate, edge, edge, edge, angle)


@settings(max_examples=200, deadline=None)
@given(a_box, a_box)
def test_any_pair_is_as_with_shapely(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    one, other = box(*a), box(*b)
    shared = bev_intersection(one, other)
    torch.testing.assert_close(shared, with_shapely(one, other), atol=1e-6, rtol=0)
    torch.testing.assert_close(shared, bev_intersection(other, one).T, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_apart_share_exactly_nothing(dtype: torch.dtype) -> None:
    a, b = random_boxes(300), random_boxes(300, seed=1)
    one, other = (shapely.polygons(corners_bev(boxes).numpy()) for boxes in (a, b))
    apart = torch.from_numpy(shapely.distance(one[:, None], other[None]) > 1e-3)
    reach = (a[:, None, :2] - b[:, :2]).norm(dim=2) < 3
    assert int((apart & reach).sum()) > 500
    shared = bev_intersection(a.to(dtype), b.to(dtype))
    assert int(shared[apart].count_nonzero()) == 0


def test_3d_overlap_is_area_times_height_over_the_union() -> None:
    a, b = random_boxes(40), random_boxes(40, seed=1)
    iou = iou_3d(a, b)
    for row in range(0, 40, 3):
        for column in range(0, 40, 3):
            one, other = a[row], b[column]
            bottom = max(one[2] - one[5] / 2, other[2] - other[5] / 2)
            top = min(one[2] + one[5] / 2, other[2] + other[5] / 2)
            shared = with_shapely(a[row, None], b[column, None])[0, 0] * max(0.0, float(top - bottom))
            union = one[3:6].prod() + other[3:6].prod() - shared
            assert float(iou[row, column]) == pytest.approx(float(shared / union), abs=1e-12)
    assert int((iou > 0).sum()) > 50
    torch.testing.assert_close(paired_iou_3d(a, b), iou.diagonal())


def test_no_boxes() -> None:
    none, some = torch.zeros(0, 7), random_boxes(3).float()
    assert bev_iou(none, some).shape == (0, 3)
    assert iou_3d(some, none).shape == (3, 0)
    assert paired_iou_3d(none, none).shape == (0,)
    assert nms(none, torch.zeros(0), 0.5).shape == (0,)


def test_many_pairs_in_pieces_are_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_boxes(50), random_boxes(30, seed=1)
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole, kept = bev_intersection(a, b), nms(a, scores, 0.2)
    monkeypatch.setattr("mainstem.domains.pointcloud.overlap._CHUNK", 70)
    torch.testing.assert_close(bev_intersection(a, b), whole, atol=0, rtol=0)
    assert torch.equal(nms(a, scores, 0.2), kept)


def slow_nms(boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor) -> list[int]:
    iou = bev_iou(boxes, boxes)
    kept: list[int] = []
    for row in sorted(range(len(boxes)), key=lambda row: -float(scores[row])):
        if not any(labels[row] == labels[best] and iou[best, row] > threshold for best in kept):
            kept.append(row)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2, 0.7])
def test_nms_is_the_greedy_one(threshold: float) -> None:
    boxes = random_boxes(120)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 20, (120,), generator=generator) / 20  # many are equal
    labels = torch.randint(0, 3, (120,), generator=generator)
    expected = slow_nms(boxes, scores, threshold, labels)
    assert nms(boxes, scores, threshold, labels).tolist() == expected
    assert nms(boxes, scores, threshold, labels, limit=7).tolist() == expected[:7]
    assert nms(boxes, scores, threshold).tolist() == slow_nms(boxes, scores, threshold, 0 * labels)


def test_nms_keeps_the_first_of_equals_and_other_labels() -> None:
    boxes = box(0, 0, 0, 4, 2, 1, 0).repeat(3, 1)
    scores = torch.tensor([0.5, 0.9, 0.9])
    assert nms(boxes, scores, 0.5).tolist() == [1]
    assert nms(boxes, scores, 0.5, torch.tensor([0, 1, 0])).tolist() == [1, 2]
    assert nms(boxes, scores, 0.5, torch.arange(3), limit=2).tolist() == [1, 2]
    assert nms(boxes, scores, 1.0).dtype is torch.int64


def test_nms_of_500_boxes_is_fast() -> None:
    boxes = random_boxes(500, extent=20).float()
    scores = torch.rand(500, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(5):
        start = time.process_time()
        nms(boxes, scores, 0.1)
        times.append(time.process_time() - start)
    assert min(times) < 0.03
