"""From a table, wide or long, to series: which column is what, order, gaps, and what is refused."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from .columns import Columns, numeric, refuse_empty, resolve_columns
from .records import Array, Series, Time, relative_steps
from .timestamps import find_frequency, full_grid, localize, parse_time, show

Regular = Literal["auto", "never"]

_MAX_GRID_GROWTH = 4


def read_series(
    frame: pd.DataFrame,
    columns: Columns | None = None,
    *,
    regular: Regular = "auto",
    timezone: str | None = None,
    time_format: str | None = None,
    as_is: bool = False,
    name: str = "series",
) -> list[Series]:
    """Series of a table, one an item (one in all for a wide table), in time order.

    Gaps: with `regular="auto"`, rows that are missing from a regular grid are put in, all values missing;
    with "never", or where there are covariates (which nobody could fill in), the rows stay and `dt` tells
    the gap.
    `as_is` keeps rows as the file has them, duplicates too: the public benchmark files count rows, not hours.

    Raises:
        ValueError: naming the column, what it holds, and what is accepted.
    """
    columns = resolve_columns(frame, columns or Columns())
    channels = list(columns.channels or ())
    numbers = {
        column: numeric(frame[column])
        for column in [*channels, *columns.known, *columns.past, *columns.static]
    }
    refuse_empty(numbers, channels)
    data = pd.DataFrame(numbers, index=frame.index)
    if columns.time is None:
        time: pd.Series = pd.Series(np.arange(len(frame), dtype=np.float64), index=frame.index)
    else:
        time = parse_time(frame[columns.time], time_format=time_format, timezone=timezone)
    builder = _Builder(columns, channels, regular, timezone, as_is)
    if columns.item is None:
        series = [builder.build(name, time, data)]
        builder.tell()
        return series
    items = frame[columns.item]
    if items.isna().any():
        row = int(np.argmax(items.isna().to_numpy()))
        raise ValueError(f"item column '{columns.item}' is empty in data row {row + 1}")
    groups = items.groupby(items, sort=False).groups
    series = [builder.build(str(item), time.loc[rows], data.loc[rows]) for item, rows in groups.items()]
    builder.tell()
    return series


@dataclass(frozen=True)
class _Builder:
    columns: Columns
    channels: list[str]
    regular: Regular
    timezone: str | None
    as_is: bool
    unsorted: list[str] = field(default_factory=list)
    added: list[int] = field(default_factory=list)

    def tell(self) -> None:
        """Say once what was done to the rows."""
        if self.unsorted:
            where = f"{len(self.unsorted)} items" if self.columns.item else "the file"
            warnings.warn(f"the rows of {where} were not in time order and were sorted", stacklevel=3)
        if self.added:
            where = f" of {len(self.added)} items" if self.columns.item else ""
            warnings.warn(
                f"{sum(self.added)} rows{where} are missing from the regular grid and were added as missing "
                f"values; regular='never' keeps the rows as they are",
                stacklevel=3,
            )

    def build(self, item: str, time: pd.Series, data: pd.DataFrame) -> Series:
        label = f" of item '{item}'" if self.columns.item else ""
        time, data = self._ordered(time, data, label)
        stamps: Time = (
            localize(pd.DatetimeIndex(time), self.timezone)
            if pd.api.types.is_datetime64_any_dtype(time)
            else time.to_numpy(dtype=np.float64)
        )
        if not self.as_is:
            self._refuse_duplicates(stamps, time.index, label)
        frequency = find_frequency(stamps)
        data = data.reset_index(drop=True)
        if self._fills_gaps and frequency is not None:
            stamps, data = self._fill_gaps(stamps, data, frequency)
        return self._split_future(item, stamps, data, frequency)

    @property
    def _fills_gaps(self) -> bool:
        return self.regular == "auto" and not self.as_is and not self.columns.known and not self.columns.past

    def _ordered(self, time: pd.Series, data: pd.DataFrame, label: str) -> tuple[pd.Series, pd.DataFrame]:
        naive_local_time = self.timezone is not None
        if self.as_is or time.is_monotonic_increasing or (naive_local_time and _autumn_only(time)):
            return time, data
        self.unsorted.append(label)
        order = time.argsort(kind="stable").to_numpy()
        return time.iloc[order], data.iloc[order]

    def _refuse_duplicates(self, stamps: Time, rows: pd.Index, label: str) -> None:
        repeated = pd.Index(stamps).duplicated()
        if not repeated.any():
            return
        second = int(np.argmax(repeated))
        first = int(np.argmax(pd.Index(stamps) == stamps[second]))
        remedy = (
            "keep one of them"
            if self.columns.item
            else "keep one of them, name the series of a long file with item_column=..., "
            "or give timezone='Area/City' if it is the repeated hour of autumn"
        )
        raise ValueError(
            f"time stamp {show(stamps[second])}{label} occurs twice "
            f"(data rows {rows[first] + 1} and {rows[second] + 1}); {remedy}"
        )

    def _fill_gaps(
        self, stamps: Time, data: pd.DataFrame, frequency: str | float
    ) -> tuple[Time, pd.DataFrame]:
        grid = full_grid(stamps, frequency)
        if grid is None or len(grid) == len(stamps) or len(grid) > _MAX_GRID_GROWTH * len(stamps):
            return stamps, data
        self.added.append(len(grid) - len(stamps))
        if isinstance(grid, pd.DatetimeIndex):
            wanted = grid.get_indexer(pd.DatetimeIndex(stamps))
        else:
            wanted = np.round((np.asarray(stamps) - grid[0]) / (grid[1] - grid[0])).astype(np.int64)
        data = data.set_index(pd.Index(wanted)).reindex(range(len(grid)))
        data[list(self.columns.static)] = data[list(self.columns.static)].ffill()
        return grid, data

    def _split_future(
        self, item: str, stamps: Time, data: pd.DataFrame, frequency: str | float | None
    ) -> Series:
        columns = self.columns
        values = _matrix(data, self.channels)
        observed = np.flatnonzero(~np.isnan(values).all(axis=1))
        # Rows after the last target that give known covariates are the future, not missing values.
        end = int(observed[-1]) + 1 if columns.known and len(observed) else len(values)
        known, past = _matrix(data, columns.known), _matrix(data, columns.past)
        _refuse_gaps(known, columns.known, item, "known_covariates")
        _refuse_gaps(past[:end], columns.past, item, "past_covariates")
        return Series(
            item=item,
            values=values[:end],
            channels=tuple(self.channels),
            time=stamps[:end],
            dt=relative_steps(stamps[:end]),
            frequency=frequency,
            known=known[:end],
            known_names=tuple(columns.known),
            past=past[:end],
            past_names=tuple(columns.past),
            static=_static(data, columns.static, item),
            static_names=tuple(columns.static),
            future_time=stamps[end:] if end < len(values) else None,
            future_known=known[end:],
        )


def _refuse_gaps(values: Array, names: Sequence[str], item: str, argument: str) -> None:
    missing = np.isnan(values)
    if missing.any():
        row, column = (int(axis[0]) for axis in np.nonzero(missing))
        raise ValueError(
            f"{argument} column '{names[column]}' of '{item}' has no value in row {row + 1} of the series; "
            f"covariates must be complete (a column with missing values can be a channel)"
        )


def _static(data: pd.DataFrame, names: Sequence[str], item: str) -> Array:
    values = _matrix(data, names)
    changing = [
        name for name, column in zip(names, values.T) if len(np.unique(column)) != 1 or np.isnan(column).any()
    ]
    if changing:
        raise ValueError(
            f"static_covariates column '{changing[0]}' changes or is missing within item '{item}'"
        )
    return values[0] if len(values) else np.zeros(len(names), dtype=np.float32)


def _matrix(data: pd.DataFrame, names: Sequence[str]) -> Array:
    return np.ascontiguousarray(data[list(names)].to_numpy(dtype=np.float32))


def _autumn_only(time: pd.Series) -> bool:
    # Local clock times step back by an hour once a year; that is not disorder.
    if not pd.api.types.is_datetime64_any_dtype(time):
        return False
    steps = time.diff().dropna()
    back = steps[steps < pd.Timedelta(0)]
    return (
        len(back) > 0 and bool((back >= pd.Timedelta(hours=-1)).all()) and len(back) <= 1 + len(time) / 2000
    )
