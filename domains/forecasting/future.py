"""The rows that follow a series: their time stamps and known covariates."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd

from .records import Series, Time, median_step, relative_steps
from .timestamps import continue_time, show


def with_future(series: Series, lookback: int, horizon: int) -> Series:
    """The last `lookback` rows and `horizon` rows of the future, whose values are missing."""
    known = series.known[-lookback:]
    if series.known_names:
        given = len(series.future_known)
        if given < horizon:
            raise ValueError(
                f"known_covariates {', '.join(series.known_names)} are needed for the {horizon} rows after "
                f"{show(series.time[-1])} of '{series.item}', but the file has {given}; "
                f"add the rows with the channels left empty"
            )
        known = np.concatenate([known, series.future_known[:horizon]])
    if series.frequency is None and series.future_time is None:
        warnings.warn(
            f"'{series.item}' has no regular spacing; its forecast goes on in the median step", stacklevel=2
        )
    time = joined(series.time, future_time(series, horizon))
    dt = relative_steps(time, unit=median_step(series.time))
    blank = np.full((horizon, len(series.channels)), np.nan, dtype=np.float32)
    no_past = np.zeros((horizon, len(series.past_names)), dtype=np.float32)
    return replace(
        series,
        values=np.concatenate([series.values[-lookback:], blank]),
        time=time[-lookback - horizon :],
        dt=dt[-lookback - horizon :],
        known=known if series.known_names else np.zeros((lookback + horizon, 0), dtype=np.float32),
        past=np.concatenate([series.past[-lookback:], no_past]),
    )


def future_time(series: Series, steps: int) -> Time:
    """The file's time stamps after the last row, then as many as are still wanted."""
    given = series.future_time[:steps] if series.future_time is not None else series.time[:0]
    rest = steps - len(given)
    if not rest:
        return given
    before = joined(series.time, given)
    return joined(given, continue_time(before, series.frequency, rest))


def joined(first: Time, second: Time) -> Time:
    """Two stretches of time, one after the other."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.concatenate([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)])
    return pd.DatetimeIndex(first.append(second))
