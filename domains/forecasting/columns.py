"""What the columns of a table are, and whether they hold numbers."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

_TIME_NAMES = ("date", "datetime", "timestamp", "time", "ds", "date_time", "day", "month", "year")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a table are.

    Args:
        time: time column; None guesses it by name, then by what can be read as dates; "row" numbers the rows.
        item: column that tells the series of a long table apart; None for a wide table.
        channels: target columns; None takes every column not otherwise used.
        known: covariates known in advance.
        past: covariates known up to now.
        static: constants of an item.
    """

    time: str | None = None
    item: str | None = None
    channels: Sequence[str] | None = None
    known: Sequence[str] = ()
    past: Sequence[str] = ()
    static: Sequence[str] = ()


def resolve_columns(frame: pd.DataFrame, columns: Columns) -> Columns:
    """The same with the guesses made: time column and channels.

    Raises:
        ValueError: a name that the table lacks, a column used twice, no time column, no channel.
    """
    guess = columns.time if columns.time is not None else _guess_time(frame, columns)
    time = None if guess == "row" else guess
    named = [name for name in (time, columns.item) if name] + [*columns.known, *columns.past, *columns.static]
    _check_names(frame, [*named, *(columns.channels or ())])
    channels = (
        [str(name) for name in frame.columns if name not in named]
        if columns.channels is None
        else list(columns.channels)
    )
    if not channels:
        raise ValueError(f"no column is left for channels: the file has {_listed(frame.columns)}")
    twice = pd.Index([*named, *channels])
    if twice.has_duplicates:
        raise ValueError(f"column '{twice[twice.duplicated()][0]}' is given two roles")
    return Columns(
        time=time, item=columns.item, channels=channels,
        known=columns.known, past=columns.past, static=columns.static,
    )  # fmt: skip


def numeric(column: pd.Series) -> NDArray[np.float64]:
    """Numbers of a column, NaN where a cell is empty.

    Raises:
        ValueError: a cell that is not a finite number.
    """
    if pd.api.types.is_datetime64_any_dtype(column):
        raise ValueError(f"column '{column.name}' holds dates, not numbers; leave it out with channels=[...]")
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(np.isnan(numbers) & column.notna().to_numpy())
    if not pd.api.types.is_numeric_dtype(column):
        # An empty cell is a missing value, also in a column that is text because of another cell.
        blank = column.astype(str).str.strip().eq("").to_numpy()
        bad = bad[~blank[bad]]
    if len(bad):
        raise ValueError(
            f"column '{column.name}' is not numeric: data row {bad[0] + 1} holds '{column.iloc[bad[0]]}'; "
            f"leave the column out with channels=[...], or name its role (item_column, time_column)"
        )
    if np.isinf(numbers).any():
        row = int(np.argmax(np.isinf(numbers)))
        raise ValueError(
            f"column '{column.name}' is infinite in data row {row + 1}; leave the cell empty if it is missing"
        )
    return numbers


def refuse_empty(numbers: dict[str, NDArray[np.float64]], channels: Sequence[str]) -> None:
    """Refuse a channel without a single value."""
    for name in channels:
        if np.isnan(numbers[name]).all():
            raise ValueError(f"channel '{name}' has no value in any row; leave it out with channels=[...]")


def _guess_time(frame: pd.DataFrame, columns: Columns) -> str:
    used = {columns.item, *(columns.channels or ()), *columns.known, *columns.past, *columns.static}
    free = [name for name in frame.columns if name not in used]
    for wanted in _TIME_NAMES:
        for name in free:
            if name.strip().lower() == wanted:
                return str(name)
    for name in free:
        if pd.api.types.is_datetime64_any_dtype(frame[name]) or _reads_as_dates(frame[name]):
            return str(name)
    raise ValueError(
        f"no time column found among {_listed(frame.columns)}; name it with time_column=..., "
        f"or give time_column='row' to number the rows"
    )


def _reads_as_dates(column: pd.Series) -> bool:
    head = column.dropna().head(20)
    if pd.api.types.is_numeric_dtype(column) or head.empty:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.filterwarnings("error", message="Could not infer format")
        try:
            return bool(pd.to_datetime(head, errors="coerce", utc=True).notna().all())
        except UserWarning:
            return False


def _check_names(frame: pd.DataFrame, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in frame.columns]
    if unknown:
        raise ValueError(f"column '{unknown[0]}' is not in the file, which has {_listed(frame.columns)}")


def _listed(names: Sequence[str] | pd.Index, most: int = 20) -> str:
    shown = ", ".join(f"'{name}'" for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
