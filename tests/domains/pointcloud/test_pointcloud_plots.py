from math import inf, nan

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from mainstem.domains.pointcloud.boxes import corners_bev
from mainstem.domains.pointcloud.detections import Detections
from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.metrics.ranges import Range
from mainstem.domains.pointcloud.plots import bev_figure, precision_recall_figure, range_figure
from mainstem.domains.pointcloud.scene import Scene

CLASSES = ("Car", "Pedestrian")
GRID = Grid((0, -20, -3), (40, 20, 1), (1, 1, 1))


def scene(count: int = 500) -> Scene:
    points = np.random.default_rng(0).uniform([0, -20, -2], [40, 20, 1], (count, 3)).astype(np.float32)
    boxes = np.array([[10, 2, 0, 4, 2, 1.5, np.pi / 2], [30, -5, 0, 8, 3, 3, 0]], np.float32)
    return Scene("frame 7", points, (), boxes, np.array(["Car", "Truck"]))


FOUND = Detections(
    torch.tensor([[10.0, 2, 0, 4, 2, 1.5, 0], [20, 2, 0, 0.6, 0.6, 1.7, 0], [25, 2, 0, 4, 2, 1.5, 0]]),
    torch.tensor([0.87, 0.41, 0.05]),
    torch.tensor([0, 1, 0]),
)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_picture_has_points_boxes_headings_and_scores() -> None:
    figure = bev_figure(scene(), FOUND, CLASSES, threshold=0.1, grid=GRID)
    axis = figure.axes[0]
    assert legend(figure) == ["labelled (1)", "labelled, other classes (1)", "Car (1)", "Pedestrian (1)"]
    assert [text.get_text() for text in axis.texts] == ["0.87", "0.41"]
    assert axis.get_title(loc="left") == "frame 7"
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 40), (-20, 20))
    outlines = [one for one in axis.collections if isinstance(one, PolyCollection)]
    vertices = outlines[0].get_paths()[0].vertices
    # The labelled car looks along y: 4 m long there and 2 m wide along x.
    np.testing.assert_allclose(np.ptp(vertices, axis=0), [2, 4], atol=1e-5)
    ticks = [one for one in axis.collections if isinstance(one, LineCollection)]
    start, end = ticks[0].get_segments()[0]
    np.testing.assert_allclose(start, [10, 2], atol=1e-5)
    np.testing.assert_allclose(end, [10, 2 + 1.35 * 2], atol=1e-5)


def test_a_score_stands_at_a_corner_of_its_box() -> None:
    turned = Detections(
        torch.tensor([[10.0, 2, 0, 4, 2, 1.5, 2.2]]), torch.tensor([0.87]), torch.zeros(1, dtype=torch.long)
    )
    (text,) = bev_figure(scene(), turned, CLASSES, grid=GRID).axes[0].texts
    assert isinstance(text, Annotation)
    assert np.abs(corners_bev(turned.boxes)[0].numpy() - text.xy).sum(1).min() < 1e-5


def test_labels_are_green_and_classes_differ() -> None:
    figure = bev_figure(scene(), FOUND, CLASSES, grid=GRID)
    outlines = [one for one in figure.axes[0].collections if isinstance(one, PolyCollection)]
    colors = [tuple(np.asarray(one.get_edgecolor())[0].tolist()) for one in outlines]
    assert len(set(colors)) == 4
    red, green, blue, _ = colors[0]
    assert green > 2 * red
    assert green > 2 * blue


def test_points_are_coloured_by_height_the_highest_on_top() -> None:
    heights = np.asarray(bev_figure(scene(), grid=GRID).axes[0].collections[0].get_array())
    np.testing.assert_array_equal(heights, np.sort(scene().points[:, 2]))


@pytest.mark.parametrize("count", [0, 1])
def test_few_points_and_no_box_make_a_picture(count: int) -> None:
    empty = Scene("empty", np.full((count, 4), np.nan, np.float32), ("intensity",))
    figure = bev_figure(empty, Detections.none(), CLASSES)
    figure.draw_without_rendering()
    assert legend(figure) == ["Car (0)", "Pedestrian (0)"]


def test_without_a_grid_points_and_boxes_are_shown() -> None:
    axis = bev_figure(scene()).axes[0]
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    assert left < 0.5
    assert right > 39
    assert low < -19
    assert high > 19


def test_scores_stay_readable_with_very_many_boxes() -> None:
    many = Detections(torch.ones(300, 7), torch.linspace(0, 1, 300), torch.zeros(300, dtype=torch.int64))
    texts = [float(text.get_text()) for text in bev_figure(scene(), many, CLASSES).axes[0].texts]
    assert len(texts) == 60
    assert min(texts) == pytest.approx(0.8, abs=0.01)


def test_range_figure_has_a_bar_a_class_and_range() -> None:
    near, far = Range(0, 30), Range(30, inf)
    figure = range_figure({"Car": {near: 80.0, far: 20.0}, "Cyclist": {near: 50.0, far: nan}})
    axis = figure.axes[0]
    assert [patch.get_height() for patch in axis.patches] == [80, 20, 50, 0]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axis.texts] == ["80", "20", "50", "–"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0–30", "30+"]
    with pytest.raises(
        ValueError, match="'Cyclist' has the ranges 0-30m, the first class has 0-30m, 30-infm"
    ):
        range_figure({"Car": {near: 1.0, far: 2.0}, "Cyclist": {near: 1.0}})


def test_precision_recall_figure_draws_each_curve() -> None:
    figure = precision_recall_figure({"Car": ([0, 1], [1, 0.5]), "Cyclist": ([0, 0.5], [0.9, 0.1])})
    lines = figure.axes[0].lines
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata()), [1, 0.5])
    assert legend(figure) == ["Car", "Cyclist"]
