"""Calendar positions of time stamps, as integers that a table or a one-hot can index."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .records import Time, median_step

CALENDAR_SIZES: dict[str, int] = {
    "minute_of_hour": 60,
    "hour_of_day": 24,
    "day_of_week": 7,
    "day_of_month": 31,
    "week_of_year": 53,
    "month_of_year": 12,
}
_HOUR, _DAY = 3600.0, 86400.0


def calendar_names(time: Time) -> tuple[str, ...]:
    """The positions that vary at this spacing: the hour for rows closer than a day; () for plain numbers."""
    if not isinstance(time, pd.DatetimeIndex) or len(time) < 2:
        return ()
    step = median_step(time)
    if step < _HOUR:
        return ("minute_of_hour", "hour_of_day", "day_of_week", "month_of_year")
    if step < _DAY:
        return ("hour_of_day", "day_of_week", "day_of_month", "month_of_year")
    if step < 6 * _DAY:
        return ("day_of_week", "day_of_month", "month_of_year")
    if step < 27 * _DAY:
        return ("week_of_year", "month_of_year")
    return ("month_of_year",) if step < 350 * _DAY else ()


def calendar_positions(time: Time, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Positions counted from 0, (N, F) int64 with one column a name."""
    columns = [_position(time, name) for name in names] if isinstance(time, pd.DatetimeIndex) else []
    return np.stack(columns, axis=1) if columns else np.zeros((len(time), 0), dtype=np.int64)


def _position(time: pd.DatetimeIndex, name: str) -> NDArray[np.int64]:
    match name:
        case "minute_of_hour":
            numbers = time.minute
        case "hour_of_day":
            numbers = time.hour
        case "day_of_week":
            numbers = time.day_of_week
        case "day_of_month":
            numbers = time.day - 1
        case "week_of_year":
            # ISO week 53 exists in leap weeks only; counting days keeps every year alike.
            numbers = (time.day_of_year - 1) // 7
        case "month_of_year":
            numbers = time.month - 1
        case _:
            raise ValueError(f"calendar position '{name}' is unknown; known: {', '.join(CALENDAR_SIZES)}")
    return np.asarray(numbers, dtype=np.int64)
