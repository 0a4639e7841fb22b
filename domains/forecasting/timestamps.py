"""Time columns: parsing, frequency, gaps, and the time stamps that follow the last one."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset

from .records import Time, median_step

Frequency = str | float | None

_DAY = pd.Timedelta(days=1)
_MONTHLY = ("MS", "ME", "BMS", "BME", "QS", "QE", "YS", "YE")


def parse_time(
    column: pd.Series,
    *,
    time_format: str | None = None,
    timezone: str | None = None,
) -> "pd.Series[pd.Timestamp] | pd.Series[float]":
    """Dates, or floats where the column holds plain numbers; one entry a row.

    Numbers of eight digits that read as dates (20240131) are dates.

    Raises:
        ValueError: an empty cell, or one that cannot be read.
    """
    empty = np.flatnonzero(column.isna().to_numpy())
    if len(empty):
        more = f" and in {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ValueError(
            f"time column '{column.name}' is empty in data row {empty[0] + 1}{more}; "
            f"every row needs a time stamp"
        )
    if pd.api.types.is_numeric_dtype(column):
        if time_format is None and not _eight_digits(column):
            if timezone is not None:
                raise ValueError(
                    f"timezone='{timezone}' needs dates, but time column '{column.name}' holds plain numbers"
                )
            return column.astype(np.float64)
        column = column.astype("int64").astype(str)
    dates = (
        column if pd.api.types.is_datetime64_any_dtype(column) else _parse_text(column, time_format, timezone)
    )
    if dates.dt.tz is not None and timezone is not None:
        dates = dates.dt.tz_convert(timezone)
    return dates


def localize(time: pd.DatetimeIndex, timezone: str | None) -> pd.DatetimeIndex:
    """Local clock times to a time zone; the hour that occurs twice in autumn is told apart by its order.

    Raises:
        ValueError: a clock time that does not exist, or an hour of autumn that occurs only once.
    """
    if timezone is None or time.tz is not None:
        return time
    try:
        return time.tz_localize(timezone, ambiguous="infer")
    except Exception as error:
        raise ValueError(
            f"the time stamps do not fit timezone='{timezone}' ({error}); "
            f"write them with their UTC offset instead"
        ) from error


def find_frequency(time: Time) -> Frequency:
    """Pandas alias (or numeric step) of a regular grid that holds every row, gaps allowed; else None."""
    if len(time) < 3:
        return None
    if not isinstance(time, pd.DatetimeIndex):
        return _numeric_step(time)
    inferred = _gapless(time)
    if inferred is not None:
        return inferred
    clock = time.tz_localize(None)
    step = pd.Timedelta(seconds=round(median_step(time), 6))
    if step < _DAY:
        return _tick(time, step)
    if step < 6 * _DAY:
        step = pd.Timedelta(days=round(step / _DAY))
        if step == _DAY and not (clock.day_of_week >= 5).any() and (clock == clock.normalize()).all():
            return "B"
        return _tick(clock, step)
    if step <= 14 * _DAY:
        return _tick(clock, pd.Timedelta(days=round(step / _DAY)))
    return _months(clock, round(step / _DAY / 30.44))


def continue_time(time: Time, frequency: Frequency, steps: int) -> Time:
    """The next `steps` time stamps; an irregular series goes on in its median step."""
    if not isinstance(time, pd.DatetimeIndex):
        step = frequency if isinstance(frequency, float) else median_step(time)
        return np.asarray(time[-1] + step * np.arange(1, steps + 1), dtype=np.float64)
    offset = _offset(frequency) or _median_offset(time)
    following = pd.date_range(time[-1], periods=steps + 1, freq=offset)
    return following[following > time[-1]][:steps]


def full_grid(time: Time, frequency: Frequency) -> Time | None:
    """Every stamp of the grid from the first row to the last; None if a row lies off it."""
    if not isinstance(time, pd.DatetimeIndex):
        if not isinstance(frequency, float):
            return None
        count = round((time[-1] - time[0]) / frequency) + 1
        return np.asarray(time[0] + frequency * np.arange(count), dtype=np.float64)
    offset = _offset(frequency)
    if offset is None:
        return None
    grid = pd.date_range(time[0], time[-1], freq=offset)
    return grid if time.isin(grid).all() else None


def show(moment: object) -> str:
    """A time stamp or a number as a person writes it."""
    if isinstance(moment, pd.Timestamp):
        return str(moment.date()) if moment == moment.normalize() else str(moment)
    return f"{moment:g}" if isinstance(moment, float) else str(moment)


def _eight_digits(column: pd.Series) -> bool:
    if not pd.api.types.is_integer_dtype(column) or not column.between(19000101, 21001231).all():
        return False
    return bool(pd.to_datetime(column.astype(str), format="%Y%m%d", errors="coerce").notna().all())


def _parse_text(column: pd.Series, time_format: str | None, timezone: str | None) -> pd.Series:
    try:
        with warnings.catch_warnings():
            # One format is inferred for all rows; where there is none, no row is guessed on its own.
            warnings.simplefilter("ignore", UserWarning)
            warnings.filterwarnings("error", message="Could not infer format")
            return pd.to_datetime(column, format=time_format)
    except (ValueError, UserWarning) as error:
        first_error = error
    try:
        dates = pd.to_datetime(column, utc=True, format=time_format or "ISO8601")
    except ValueError:
        raise _unreadable(column, time_format) from first_error
    if not column.astype(str).str.contains(r"(?:[+-]\d\d:?\d\d|Z)$").any():
        return dates.dt.tz_localize(None)
    if timezone is None:
        warnings.warn(
            f"time column '{column.name}' mixes UTC offsets and was read as UTC; "
            f"give timezone='Area/City' for hours and days of local time",
            stacklevel=2,
        )
    return dates


def _unreadable(column: pd.Series, time_format: str | None) -> ValueError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        bad = np.flatnonzero(pd.to_datetime(column, errors="coerce", utc=True, format=time_format).isna())
    row = int(bad[0]) if len(bad) else 0
    remedy = "" if time_format else "; if it is a date, give time_format='%d.%m.%Y' or the like"
    fits = f" with time_format='{time_format}'" if time_format else " as a time stamp"
    return ValueError(
        f"time column '{column.name}' holds '{column.iloc[row]}' in data row {row + 1}, which cannot be read"
        f"{fits}{remedy}"
    )


def _gapless(time: pd.DatetimeIndex) -> str | None:
    if not time.is_unique:
        return None
    with warnings.catch_warnings():
        # Pandas 3 returns an alias and warns that pandas 4 will return an offset; either is understood.
        warnings.simplefilter("ignore")
        found: Any = pd.infer_freq(time)
    return None if found is None else str(getattr(found, "freqstr", found))


def _numeric_step(time: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float | None:
    step = median_step(time)
    multiples = np.diff(time) / step
    return (
        step if np.allclose(multiples, np.round(multiples), atol=1e-6) and (multiples > 0.5).all() else None
    )


def _tick(time: pd.DatetimeIndex, step: pd.Timedelta) -> str | None:
    elapsed = time - time[0]
    if step <= pd.Timedelta(0) or (elapsed % step != pd.Timedelta(0)).any() or not time.is_unique:
        return None
    offset = to_offset(step)
    return None if offset is None else str(offset.freqstr)


def _months(time: pd.DatetimeIndex, months: int) -> str | None:
    for alias in _MONTHLY:
        offset = to_offset(alias)
        if offset is not None and all(offset.is_on_offset(stamp) for stamp in time):
            span = 3 if alias.startswith("Q") else 12 if alias.startswith("Y") else 1
            if months == span:
                return alias
    return None


def _offset(frequency: Frequency) -> BaseOffset | None:
    return to_offset(frequency) if isinstance(frequency, str) else None


def _median_offset(time: pd.DatetimeIndex) -> "pd.Timedelta | pd.DateOffset":
    """The median step; months where every row falls on the same day of its month, say the 15th."""
    step = pd.Timedelta(seconds=median_step(time))
    if step < 27 * _DAY or not (time.day == time[-1].day).all():
        return step
    return pd.DateOffset(months=round(step / _DAY / 30.44))
