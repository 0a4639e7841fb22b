"""The picture of `mainstem bench`: time against length, both logarithmic, one panel an operation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from .bench_run import Row
from .operations import Shape

STYLES = {"reference": ":", "chunked": "--", "cpu": "-", "triton": "-"}
MARKERS = "sD^vPX*"
"""Of the peers, which are grey."""
Curve = tuple[tuple[str, str, str], list[Row]]


def draw(rows: Sequence[Row], header: Mapping[str, str]) -> Figure:
    """Draw forward + backward (forward alone where there is no other) of ours and of every peer."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.forward_ms:
            curves.setdefault((row.operation, row.variant, row.backend), []).append(row)
    names = list(dict.fromkeys(operation for operation, _, _ in curves)) or ["nothing measured"]
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(5.0 * across, 4.8 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, name in zip(panels, names):
        _panel(panel, name, [curve for curve in curves.items() if curve[0][0] == name])
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"{header['device']}, {header['threads']} thread(s), {header['dtype']}", fontsize=10)
    return figure


def _panel(panel: Axes, name: str, curves: Sequence[Curve]) -> None:
    both = any(row.both_ms for _, group in curves for row in group)
    shapes = sorted({_shape(row) for _, group in curves for row in group})
    one_kind = len({(batch, heads, dim) for batch, _, heads, dim in shapes}) == 1
    # Shapes that differ in more than their length stand side by side.
    places = {shape: shape[1] if one_kind else index for index, shape in enumerate(shapes)}
    variants = list(dict.fromkeys(variant for (_, variant, _), _ in curves))
    peers = list(dict.fromkeys(label for label, _ in _peers(curves)))
    for (_, variant, backend), group in curves:
        if not group[0].peer:
            label = backend if len(variants) == 1 else f"{variant}, {backend}"
            style = {"linestyle": STYLES[backend], "marker": "o", "color": f"C{variants.index(variant)}"}
            _curve(panel, group, both, label, places, style)
    for label, group in _peers(curves):
        style = {"linestyle": "-.", "marker": MARKERS[peers.index(label) % len(MARKERS)], "color": "0.4"}
        _curve(panel, group, both, label, places, style)
    what = "forward + backward" if both else "forward"
    panel.set(yscale="log", title=name, ylabel=f"{what}, ms")
    if one_kind:
        panel.set(xscale="log", xlabel="tokens T")
        panel.set_xticks([shape[1] for shape in shapes], [str(shape[1]) for shape in shapes])
    else:
        panel.set_xticks(range(len(shapes)), ["×".join(map(str, shape)) for shape in shapes], rotation=25)
        panel.tick_params("x", labelsize=6)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    panel.grid(alpha=0.3)
    if panel.has_data():
        # Below the panel, where it hides no curve.
        panel.legend(
            fontsize=6.5,
            handlelength=3.2,
            numpoints=2,
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
        )


def _peers(curves: Sequence[Curve]) -> list[tuple[str, list[Row]]]:
    """Give the peers' curves with their labels: one that has the same times for all variants comes once."""
    found: dict[tuple[str, tuple[float | None, ...]], tuple[str, list[Row]]] = {}
    names: dict[str, set[tuple[float | None, ...]]] = {}
    for (_, variant, backend), group in curves:
        if group[0].peer:
            times = tuple(row.both_ms or row.forward_ms for row in group)
            found.setdefault((backend, times), (variant, group))
            names.setdefault(backend, set()).add(times)
    return [
        (backend if len(names[backend]) == 1 else f"{backend}, {variant}", group)
        for (backend, _), (variant, group) in found.items()
    ]


def _shape(row: Row) -> Shape:
    return Shape(row.batch, row.length, row.heads, row.dim)


def _curve(
    panel: Axes,
    group: Sequence[Row],
    both: bool,
    label: str,
    places: Mapping[Shape, int],
    style: Mapping[str, Any],
) -> None:
    points = sorted((places[_shape(row)], row.both_ms if both else row.forward_ms) for row in group)
    x, y = zip(*points)
    panel.plot(x, y, markersize=3, label=label, **style)
