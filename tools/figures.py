"""The figures of a comparison as SVG that takes its text colour from the page, light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from .summary import Row, Summary, Values, format_number

_INK = "#123456"
"""Stands for the colour of the page's text until the SVG is written."""
_STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, those that suit a light and a dark page.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")


def colours(mixers: Sequence[str]) -> dict[str, str]:
    """Give every mixer one colour for all figures."""
    return {mixer: _COLOURS[index % len(_COLOURS)] for index, mixer in enumerate(mixers)}


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as an inline ``<svg>`` element; ``name`` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(_INK, "currentColor")


def draw(summary: Summary) -> list[tuple[str, str]]:
    """Return every figure as SVG with its caption."""
    colour = colours([row.mixer for row in summary.rows])
    figures = []
    with rc_context(_STYLE):
        metrics = to_svg(_metrics(summary, colour), "metrics")
        figures.append((metrics, "Test metrics: a dot a seed, a bar at the mean, baselines as dashed lines."))
        curves = _curves(summary, colour)
        if curves is not None:
            caption = f"Validation during training ({summary.rows[0].size.monitor}): a line a seed."
            figures.append((to_svg(curves, "curves"), caption))
        tradeoff = to_svg(_tradeoff(summary, colour), "tradeoff")
        caption = "Quality against the memory of one decode state and against training speed; bars are ± one "
        figures.append((tradeoff, f"{caption}standard deviation over seeds."))
    return figures


def _label(metric: str, summary: Summary) -> str:
    direction, unit = summary.metrics[metric]
    return f"{metric}{f' [{unit}]' if unit else ''}, {direction} is better"


def _metrics(summary: Summary, colour: Mapping[str, str]) -> Figure:
    names = list(summary.metrics)[:4]
    across = min(2, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(
        figsize=(4.6 * across, down * (1.3 + 0.34 * len(summary.rows) + 0.12 * len(summary.baselines))),
        layout="constrained",
    )
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, name in zip(panels, names):
        _metric_panel(panel, name, summary, colour)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return figure


def _metric_panel(panel: Axes, metric: str, summary: Summary, colour: Mapping[str, str]) -> None:
    mixers = [row.mixer for row in summary.rows]
    for place, row in enumerate(summary.rows):
        found = row.metric(metric)
        panel.plot(found.values, [place] * len(found.values), "o", color=colour[row.mixer], alpha=0.7, ms=5)
        panel.plot(found.mean, place, "|", color=colour[row.mixer], ms=18, mew=2.5)
    baselines = {name: found[metric] for name, found in summary.baselines.items() if metric in found}
    values = [value for row in summary.rows for value in row.metric(metric).values]
    off_scale = _draw_baselines(panel, baselines, values)
    panel.xaxis.set_major_locator(MaxNLocator(4))  # numbers of five digits overlap where there are more
    panel.set_yticks(range(len(mixers)), mixers)
    panel.set_ylim(len(mixers) - 0.5, -0.6)
    notes = [f"off the scale: {note}" for note in off_scale]
    panel.set_xlabel("\n".join([_label(metric, summary), *notes]))
    panel.grid(axis="x", alpha=0.25)


def _draw_baselines(panel: Axes, baselines: Mapping[str, Values], values: Sequence[float]) -> list[str]:
    """Draw those near the mixers' values as lines; returns those that are too far off to show."""
    low, high = min(values), max(values)
    nearest = min((abs(found.mean - (low + high) / 2) for found in baselines.values()), default=0.0)
    reach = 2.5 * max(high - low, nearest, 1e-9)
    off = []
    for name, found in baselines.items():
        if low - reach <= found.mean <= high + reach:
            panel.axvline(found.mean, color=_INK, ls="--", lw=1, alpha=0.7)
            panel.annotate(
                name,
                (found.mean, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
            )
        else:
            off.append(f"{name} {format_number(found.mean)}")
    return off


def _curves(summary: Summary, colour: Mapping[str, str]) -> Figure | None:
    if not any(len(result.curve) > 1 for row in summary.rows for result in row.results):
        return None
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    panel = figure.subplots()
    for row in summary.rows:
        for number, result in enumerate(row.results):
            label = row.mixer if number == 0 else None
            steps, values = zip(*result.curve)
            panel.plot(steps, values, color=colour[row.mixer], lw=1.4, alpha=0.75, label=label)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(xlabel="training step", ylabel=summary.rows[0].size.monitor)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=9)
    return figure


def _tradeoff(summary: Summary, colour: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    metric = next(iter(summary.metrics))
    decoding = all(row.size.state_bytes is not None for row in summary.rows)
    panels = figure.subplots(1, 2, sharey=True) if decoding else [figure.subplots()]
    rates = [(row, row.tokens_per_second / 1e3) for row in summary.rows]
    _scatter(panels[-1], rates, metric, colour)
    panels[-1].set_xlabel("training rate [thousand tokens/s]")
    if decoding:
        states = [(row, (row.size.state_bytes or 0) / 1024) for row in summary.rows]
        _scatter(panels[0], states, metric, colour)
        panels[0].set_xlabel(f"decode state after {summary.rows[0].size.context} tokens [KiB]")
    panels[0].set_ylabel(_label(metric, summary))
    return figure


def _scatter(
    panel: Axes, points: Sequence[tuple[Row, float]], metric: str, colour: Mapping[str, str]
) -> None:
    for place, (row, x) in enumerate(sorted(points, key=lambda point: point[1])):
        found = row.metric(metric)
        panel.errorbar(
            x, found.mean, found.std or 0, fmt="o", ms=7, capsize=3, color=colour[row.mixer], label=row.mixer
        )
        panel.annotate(
            row.mixer,
            (x, found.mean),
            # Neighbours are labelled on opposite sides, the last one on its right.
            xytext=(8, 5) if (len(points) - place) % 2 else (-8, 5),
            ha="left" if (len(points) - place) % 2 else "right",
            textcoords="offset points",
            fontsize=9,
        )
    xs = [x for _, x in points]
    panel.margins(x=0.25, y=0.2)
    if min(xs) > 0 and max(xs) > 8 * min(xs):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
