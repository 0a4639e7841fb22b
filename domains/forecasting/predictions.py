"""Forecasts as files: a table in original units and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ...core.files import write_whole
from .data import ForecastData
from .plots import Panel, forecast_figure, horizon_figure

MAX_PICTURES = 4
MAX_PANELS = 8


def write_predictions(
    outputs: Sequence[Mapping[str, Tensor]],
    data: ForecastData,
    directory: Path,
    *,
    levels: Sequence[float],
    point: str,
    errors: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write `forecast.csv`, and `forecast-<n>.png` of up to four windows; each file whole or not at all.

    Args:
        outputs: what `Forecaster.predict_step` returned for each batch.
        data: where time stamps, names and the scaler come from.
        directory: made if it is not there.
        levels: quantile levels, in the order of the outputs.
        point: column name of the point forecast.
        errors: mean absolute error (H,) by name, drawn to `horizon.png`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    windows = to_original(outputs, data)
    paths = [directory / "forecast.csv"]
    frame = prediction_frame(windows, data, levels, point)
    write_whole(paths[0], lambda path: frame.to_csv(path, index=False, float_format="%.8g"))
    count = len(windows["item"])
    shown = np.unique(np.linspace(0, count - 1, min(count, MAX_PICTURES)).round().astype(int))
    for number in shown:
        figure = window_figure(windows, data, int(number), levels, point)
        paths.append(_save(figure, directory / f"forecast-{number + 1}.png"))
    if errors is not None:
        paths.append(_save(horizon_figure(errors), directory / "horizon.png"))
    return paths


def to_original(outputs: Sequence[Mapping[str, Tensor]], data: ForecastData) -> dict[str, Tensor]:
    """All windows in original units, with NaN where nothing was observed."""
    joined = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    item = joined["item"]
    windows = {"item": item, "start": joined["start"]}
    for part in ("past", "future"):
        values = data.scaler.inverse(joined[f"{part}_values"], item)
        windows[part] = torch.where(joined[f"{part}_observed"], values, torch.nan)
    windows["point"] = data.scaler.inverse(joined["point"], item)
    # The scaler wants the channels last.
    windows["quantiles"] = data.scaler.inverse(joined["quantiles"].movedim(-1, 1), item).movedim(1, -1)
    return windows


def prediction_frame(
    windows: Mapping[str, Tensor], data: ForecastData, levels: Sequence[float], point: str
) -> pd.DataFrame:
    """A row a window, step and channel: item, origin, time, channel, point, quantiles, truth where known."""
    B, H, C = windows["point"].shape
    L = data.lookback
    times = [data.window_time(int(i), int(s)) for i, s in zip(windows["item"], windows["start"], strict=True)]
    items = [data.series[int(i)].item for i in windows["item"]]
    columns: dict[str, Any] = {
        "item": np.repeat(items, H * C),
        "origin": np.concatenate([np.repeat(_texts(time[L - 1 : L]), H * C) for time in times]),
        "time": np.concatenate([np.repeat(_texts(time[L:]), C) for time in times]),
        "channel": np.tile(list(data.channels), B * H),
        point: windows["point"].flatten().numpy(),
    }
    for index, level in enumerate(levels):
        columns[f"q{level:g}"] = windows["quantiles"][..., index].flatten().numpy()
    frame = pd.DataFrame(columns)
    if not bool(windows["future"].isnan().all()):
        frame["truth"] = windows["future"].flatten().numpy()
    return frame


def window_figure(
    windows: Mapping[str, Tensor], data: ForecastData, number: int, levels: Sequence[float], point: str
) -> Figure:
    """Picture of one window: a panel for each of the first channels."""
    item = int(windows["item"][number])
    time = data.window_time(item, int(windows["start"][number]))
    panels = [
        Panel(
            title=name,
            past=windows["past"][number, :, channel].numpy(),
            truth=windows["future"][number, :, channel].numpy(),
            point=windows["point"][number, :, channel].numpy(),
            quantiles=windows["quantiles"][number, :, channel].numpy(),
        )
        for channel, name in enumerate(data.channels[:MAX_PANELS])
    ]
    title = data.series[item].item
    if len(data.channels) > len(panels):
        title += f" (first {len(panels)} of {len(data.channels)} channels)"
    elif title == data.channels[0]:
        title = ""
    return forecast_figure(time, panels, levels=levels, point=point, title=title)


def _texts(time: Any) -> "np.ndarray[Any, Any]":
    if not isinstance(time, pd.DatetimeIndex):
        return np.asarray(time)
    return time.astype(str).to_numpy()


def _save(figure: Figure, path: Path) -> Path:
    return write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
