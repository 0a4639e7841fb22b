"""Pictures of frames and of results, made without pyplot: no shared state, no display needed."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from .boxes import corners_bev
from .detections import Detections
from .grid import Grid
from .metrics.ranges import Range
from .scene import Array, Scene

_BACKGROUND, _TRUTH, _OTHER = "0.09", "#35e04f", "#1e7d2c"
# Bright on the dark ground, apart from green and from each other for the colour-blind too.
_COLORS = (
    *("#ff9d2e", "#4fb3ff", "#ff6fd0", "#ffe14d", "#ff5a4f"),
    *("#b59bff", "#5ff0e6", "#ffffff", "#c98a5a", "#9aa0a6"),
)
# More scores than this hide the boxes.
_MAX_SCORES = 60
_LEGEND_COLUMNS = 4
# Without its darkest part, which nobody would see.
_HEIGHTS = LinearSegmentedColormap.from_list("heights", colormaps["cividis"](np.linspace(0.25, 1, 64)))


def bev_figure(
    scene: Scene,
    detections: Detections | None = None,
    classes: Sequence[str] = (),
    *,
    threshold: float = 0.0,
    grid: Grid | None = None,
    title: str | None = None,
) -> Figure:
    """A frame from above: points coloured by height, labelled boxes green, predicted ones by class.

    A tick leads out of a box's front. Boxes of classes that the detector does not know are thin.

    Args:
        scene: the frame; without labelled boxes only the predictions are drawn.
        detections: predicted boxes on the CPU, or ``None`` for a picture of the labels alone.
        classes: names of the labels of ``detections``.
        threshold: predictions with a smaller score are left out.
        grid: range that is shown; without one, what holds the points and boxes.
        title: instead of the frame's name.
    """
    x, y = _limits(scene, grid)
    # Colour bar and labels take an inch and a half of the width; title, labels and legend more of the height.
    height = float(np.clip(7.5 * (y[1] - y[0]) / (x[1] - x[0]), 1.5, 10.0))
    rows = -(-(2 + len(classes)) // _LEGEND_COLUMNS)
    figure = Figure(figsize=(9.0, height + 1.2 + 0.22 * rows), layout="compressed")
    axis = figure.subplots()
    axis.set_facecolor(_BACKGROUND)
    axis.set_aspect("equal")
    axis.set_xlim(*x)
    axis.set_ylim(*y)
    _draw_points(figure, axis, scene.points)
    handles = _draw_truth(axis, scene, classes)
    if detections is not None:
        handles += _draw_detections(axis, detections[detections.scores >= threshold], classes)
    axis.set_xlabel("x, forward (m)", fontsize=9)
    axis.set_ylabel("y, to the left (m)", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_title(scene.id if title is None else title, fontsize=10, loc="left")
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(_LEGEND_COLUMNS, len(handles)),
            fontsize=9,
            facecolor=_BACKGROUND,
            labelcolor="white",
            framealpha=1.0,
        )
    return figure


def range_figure(precisions: Mapping[str, Mapping[Range, float]], *, ylabel: str = "AP") -> Figure:
    """Average precision by distance: a group of bars a range, a bar a class.

    Args:
        precisions: for each class its values from 0 to 100, as `metrics.ranges.by_range` gives them; NaN
            where a range holds no box.
        ylabel: what the values are.

    Raises:
        ValueError: classes with different ranges.
    """
    ranges = list(next(iter(precisions.values()), {}))
    bins = [f"{r.low:g}–{r.high:g}" if np.isfinite(r.high) else f"{r.low:g}+" for r in ranges]
    figure = Figure(figsize=(max(4.8, 1.0 + 1.3 * len(bins)), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / max(1, len(precisions))
    for place, (name, by_range) in enumerate(precisions.items()):
        if list(by_range) != ranges:
            given, first = (", ".join(one.name for one in some) for some in (by_range, ranges))
            raise ValueError(f"precisions: '{name}' has the ranges {given}, the first class has {first}")
        values = list(by_range.values())
        left = np.arange(len(bins)) - 0.4 + (place + 0.5) * width
        bars = axis.bar(left, np.nan_to_num(np.asarray(values, float)), width * 0.94, label=name)
        texts = ["–" if np.isnan(value) else f"{value:.0f}" for value in values]
        axis.bar_label(bars, texts, fontsize=8, padding=1)
    axis.set_xticks(range(len(bins)), bins)
    axis.set_xlabel("distance from the sensor (m)")
    axis.set_ylabel(ylabel)
    axis.set_ylim(0, 105)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def precision_recall_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Precision over recall, both from 0 to 1: a line for each name."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, (recall, precision) in curves.items():
        axis.plot(np.asarray(recall), np.asarray(precision), linewidth=1.6, label=name)
    axis.set_xlabel("recall")
    axis.set_ylabel("precision")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.03)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _limits(scene: Scene, grid: Grid | None) -> tuple[tuple[float, float], tuple[float, float]]:
    """What is shown along x and y."""
    if grid is not None:
        return (grid.low[0], grid.high[0]), (grid.low[1], grid.high[1])
    points = scene.points[np.isfinite(scene.points[:, :2]).all(1), :2]
    seen = [scene.boxes[:, :2]]
    if len(points):
        # A few stray returns far away would make everything else tiny.
        seen.append(np.quantile(points, (0.002, 0.998), axis=0))
    places = np.concatenate(seen) if sum(map(len, seen)) else np.zeros((1, 2))
    low, high = places.min(0) - 3, places.max(0) + 3
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def _draw_points(figure: Figure, axis: Axes, points: Array) -> None:
    points = points[np.isfinite(points[:, :3]).all(1)]
    if len(points) == 0:
        return
    low, high = np.quantile(points[:, 2], (0.02, 0.98))
    # The highest last, and so on top; fewer points are drawn larger.
    order = np.argsort(points[:, 2], kind="stable")
    drawn = axis.scatter(
        points[order, 0],
        points[order, 1],
        c=points[order, 2],
        s=float(np.clip(3e4 / len(points), 0.4, 3.0)),
        cmap=_HEIGHTS,
        vmin=float(low),
        vmax=float(max(high, low + 1e-3)),
        linewidths=0,
        rasterized=True,
        zorder=1,
    )
    bar = figure.colorbar(drawn, ax=axis, shrink=0.6, pad=0.01, aspect=30, extend="both")
    bar.set_label("height z (m)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_truth(axis: Axes, scene: Scene, classes: Sequence[str]) -> list[Line2D]:
    known = np.isin(scene.names, list(classes)) if len(classes) else np.ones(len(scene.names), bool)
    handles = []
    for rows, color, width, label in (
        (known, _TRUTH, 1.5, "labelled"),
        (~known, _OTHER, 1.0, "labelled, other classes"),
    ):
        if rows.any():
            _outline(axis, scene.boxes[rows], color, width, zorder=3)
            handles.append(Line2D([], [], color=color, linewidth=width, label=f"{label} ({rows.sum()})"))
    return handles


def _draw_detections(axis: Axes, detections: Detections, classes: Sequence[str]) -> list[Line2D]:
    handles = []
    boxes, labels = detections.boxes.numpy(), detections.labels.numpy()
    for label, name in enumerate(classes):
        rows = labels == label
        color = _COLORS[label % len(_COLORS)]
        # Every class stands in the legend, found or not, so that pictures of many frames read alike.
        handles.append(Line2D([], [], color=color, linewidth=1.5, label=f"{name} ({rows.sum()})"))
        if rows.any():
            _outline(axis, boxes[rows], color, 1.2, zorder=4)
    for row in detections.scores.argsort(descending=True)[:_MAX_SCORES].tolist():
        corners = corners_bev(detections.boxes[row : row + 1])[0].numpy()
        upper_right = corners[corners.sum(1).argmax()]
        axis.annotate(
            f"{float(detections.scores[row]):.2f}",
            (float(upper_right[0]), float(upper_right[1])),
            xytext=(1, 1),
            textcoords="offset points",
            color=_COLORS[int(labels[row]) % len(_COLORS)],
            fontsize=6,
            annotation_clip=True,
            clip_on=True,
            path_effects=[withStroke(linewidth=1.2, foreground="black")],
            zorder=5,
        )
    return handles


def _outline(axis: Axes, boxes: Array, color: str, width: float, zorder: int) -> None:
    """Edges of boxes seen from above, and a tick from the middle out of the front."""
    tensor = torch.from_numpy(np.asarray(boxes, np.float64))
    edges = PolyCollection(
        list(corners_bev(tensor).numpy()),
        facecolors="none",
        edgecolors=color,
        linewidths=width,
        zorder=zorder,
    )
    centre, yaw = tensor[:, :2], tensor[:, 6]
    heading = torch.stack([yaw.cos(), yaw.sin()], 1) * (tensor[:, 3:4] / 2)
    ticks = torch.stack([centre, centre + 1.35 * heading], 1)
    axis.add_collection(edges)
    axis.add_collection(
        LineCollection(list(ticks.numpy()), colors=color, linewidths=width, zorder=zorder), autolim=False
    )
