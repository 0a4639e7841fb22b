"""Forecasts that need no training; every table shows them beside the model."""

import pandas as pd
import torch
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import Tick
from torch import Tensor
from torch.nn import functional as F

from .ridge import Batch
from .windows import SeriesTable


def last_value(batch: Batch, horizon: int) -> Tensor:
    """The last observed value of every channel, (B, H, C); 0, the training mean, if nothing was observed."""
    value, _ = last_observed(batch["past_values"], batch["past_observed"])
    return value[:, None].expand(-1, horizon, -1)


def seasonal_naive(batch: Batch, horizon: int, season: int) -> Tensor:
    """The last observed value at the same phase of the season, else the last observed value. (B, H, C).

    Raises:
        ValueError: if the lookback is shorter than the season.
    """
    values, observed = batch["past_values"], batch["past_observed"]
    B, L, C = values.shape
    if not 1 <= season <= L:
        raise ValueError(f"season={season} must be from 1 to the lookback, {L}")
    periods = -(-L // season)
    pad = (0, 0, periods * season - L, 0)
    values = F.pad(values, pad).view(B, periods, season, C).flatten(2)
    observed = F.pad(observed, pad).view(B, periods, season, C).flatten(2)
    value, found = last_observed(values, observed)
    value, found = value.view(B, season, C), found.view(B, season, C)
    phase = torch.arange(horizon, device=values.device) % season
    return torch.where(found[:, phase], value[:, phase], last_value(batch, horizon))


def last_observed(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Last observed of (B, T, …) along T, or 0, and whether there is one."""
    order = torch.arange(1, values.shape[1] + 1, device=values.device)[None, :, None]
    last = (observed * order).amax(1, keepdim=True)
    value = torch.where(observed, values, 0).gather(1, (last - 1).clamp_min(0))
    return torch.where(last > 0, value, 0)[:, 0], (last > 0)[:, 0]


def untrained(table: SeriesTable, batch: Batch, horizon: int, season: int | None) -> dict[str, Tensor]:
    """Forecasts (B, H, C) of the baselines by name; the seasonal one only where there is a season."""
    found = {"last value": last_value(batch, horizon)}
    if season is not None:
        past = history(table, batch, max(season, batch["past_values"].shape[1]))
        found["seasonal naive"] = seasonal_naive(past, horizon, season)
    return found


def history(table: SeriesTable, batch: Batch, rows: int) -> Batch:
    """The last `rows` rows before each window's horizon, which may reach back further than its lookback."""
    item, L = batch["item"].cpu(), batch["past_values"].shape[1]
    stop = batch["start"].cpu() - table.first_rows[item] + L
    index = stop[:, None] + torch.arange(-rows, 0)
    exists = index >= 0
    index = table.offsets[item][:, None] + index.clamp_min(0)
    observed = table.observed[index] & exists[..., None]
    device = batch["past_values"].device
    return {"past_values": table.values[index].to(device), "past_observed": observed.to(device)}


def season_length(frequency: str | float | None) -> int | None:
    """Rows in a season: a day, for daily rows a week, for coarser ones a year; None where unknown."""
    if not isinstance(frequency, str):
        return None
    offset = to_offset(frequency)
    code = offset.rule_code.partition("-")[0]
    per_year = {
        "W": 52,
        "M": 12,
        "ME": 12,
        "MS": 12,
        "BME": 12,
        "BMS": 12,
        "QE": 4,
        "QS": 4,
        "BQE": 4,
        "BQS": 4,
    }
    per_week = {"D": 7, "B": 5, "C": 5}
    if code in per_year or code in per_week:
        rows = (per_year | per_week)[code] // offset.n
    elif isinstance(offset, Tick):
        rows = round(pd.Timedelta(days=1) / pd.Timedelta(offset))
    else:
        return None
    return rows if rows > 1 else None
