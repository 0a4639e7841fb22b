"""Pictures of forecasts, made without pyplot: no shared state, no display needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from .records import Time

Values = NDArray[np.float32]

_CONTEXT, _TRUTH, _FORECAST = "0.45", "black", "tab:blue"
# Longer contexts than this many horizons leave no room for the forecast.
_CONTEXT_HORIZONS = 3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A channel of a window: past (L,), truth (H,), point (H,), quantiles (H, Q); NaN where missing."""

    title: str
    past: Values
    truth: Values
    point: Values
    quantiles: Values


def forecast_figure(
    time: Time, panels: Sequence[Panel], *, levels: Sequence[float], point: str = "median", title: str = ""
) -> Figure:
    """Context, truth where it is known, forecast and the fan of its quantiles; a panel a channel.

    Args:
        time: time stamps (L + H,).
        panels: the channels.
        levels: quantile levels in rising order.
        point: what the point forecast is called.
        title: of the figure.
    """
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns + 2.0, 2.2 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, np.asarray(time), panel, levels, point)
        if isinstance(time, pd.DatetimeIndex):
            locator = AutoDateLocator(minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
            axis.xaxis.set_major_locator(locator)
            formatter = ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
            axis.xaxis.set_major_formatter(formatter)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
    )
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw(axis: Axes, time: Any, panel: Panel, levels: Sequence[float], point: str) -> None:
    L, H = len(panel.past), len(panel.point)
    first = max(0, L - _CONTEXT_HORIZONS * H)
    axis.plot(time[first:L], panel.past[first:], color=_CONTEXT, linewidth=1, label="context")
    for low, high in zip(range(len(levels)), reversed(range(len(levels))), strict=False):
        if low >= high or np.allclose(panel.quantiles[:, low], panel.quantiles[:, high]):
            break
        axis.fill_between(
            time[L:],
            panel.quantiles[:, low],
            panel.quantiles[:, high],
            color=_shade(low),
            linewidth=0,
            label=f"{levels[low]:.0%} to {levels[high]:.0%}",
        )
    if not np.isnan(panel.truth).all():
        # Joined to the context, so that the eye does not read the gap of one step as a jump.
        truth = np.concatenate([panel.past[-1:], panel.truth])
        axis.plot(time[L - 1 :], truth, color=_TRUTH, linewidth=1, label="truth")
    axis.plot(time[L:], panel.point, color=_FORECAST, linewidth=1.6, label=f"forecast ({point})")
    axis.axvline(time[L - 1], color="0.8", linewidth=0.8, zorder=0)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.01)


def horizon_figure(errors: Mapping[str, Tensor], *, ylabel: str = "mean absolute error (scaled)") -> Figure:
    """Error of every horizon step: the model, which comes first, and dashed the baselines; each (H,)."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for index, (name, error) in enumerate(errors.items()):
        steps = np.arange(1, len(error) + 1)
        style = {"linewidth": 2.0} if index == 0 else {"linewidth": 1.2, "linestyle": "--"}
        axis.plot(steps, error.numpy(), label=name, **style)
    axis.set_xlabel("horizon step")
    axis.set_ylabel(ylabel)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _shade(band: int) -> tuple[float, ...]:
    """Color of a band of the fan, darker from the outermost (0) inward, as the legend must show it too."""
    strength = 1 - 0.8 ** (band + 1)
    return tuple(1 - strength * (1 - part) for part in to_rgb(_FORECAST))
