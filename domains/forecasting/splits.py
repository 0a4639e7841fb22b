"""Which rows train, validate and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .records import Series

Range = tuple[int, int]
Split = str | Sequence[float] | Sequence[str] | None

_MONTH = 30 * 24
OFFICIAL: dict[str, tuple[int, int, int]] = {
    "ett-hour": (12 * _MONTH, 16 * _MONTH, 20 * _MONTH),
    "ett-minute": (48 * _MONTH, 64 * _MONTH, 80 * _MONTH),
}


@dataclass(frozen=True)
class Splits:
    """Row ranges [begin, end) of the targets, one a series."""

    train: list[Range]
    val: list[Range]
    test: list[Range]


def split_rows(series: Sequence[Series], split: Split) -> Splits:
    """Ranges from a rule: "ett-hour", "ett-minute", fractions, row borders, or dates.

    Fractions [train, val, test] give int(train·n) and int(test·n) rows, validation the rest, for each series
    of n rows. Two borders (rows or dates) begin validation and test; a third ends the test.

    Raises:
        ValueError: saying which form is accepted.
    """
    borders = [_borders(one, split) for one in series]
    return Splits(
        train=[(0, a) for a, _, _ in borders],
        val=[(a, b) for a, b, _ in borders],
        test=[(b, c) for _, b, c in borders],
    )


def _borders(series: Series, split: Split) -> tuple[int, int, int]:
    rows = len(series)
    if isinstance(split, str):
        return _official(split, series)
    parts: list[Any] = list(split) if split is not None else [0.7, 0.1, 0.2]
    if parts and all(isinstance(part, str) for part in parts):
        return _dates(series, [str(part) for part in parts])
    numbers = [float(part) for part in parts]
    if len(numbers) == 3 and all(0 <= part <= 1 for part in numbers):
        if abs(sum(numbers) - 1) > 1e-6:
            raise ValueError(f"split={parts} must sum to 1, not {sum(numbers):g}")
        train, test = int(numbers[0] * rows), int(numbers[2] * rows)
        return train, rows - test, rows
    if len(numbers) not in (2, 3) or any(number != int(number) for number in numbers):
        raise _unknown(split)
    return _ordered([int(number) for number in numbers], series, split)


def _official(split: str, series: Series) -> tuple[int, int, int]:
    if split not in OFFICIAL:
        raise _unknown(split)
    borders = OFFICIAL[split]
    if len(series) < borders[-1]:
        raise ValueError(f"split='{split}' needs {borders[-1]} rows, but '{series.item}' has {len(series)}")
    return borders


def _dates(series: Series, parts: list[str]) -> tuple[int, int, int]:
    if not isinstance(series.time, pd.DatetimeIndex):
        raise ValueError(f"split={parts} gives dates, but '{series.item}' has plain numbers as time")
    try:
        stamps = pd.DatetimeIndex([pd.Timestamp(part) for part in parts])
    except ValueError as error:
        raise _unknown(parts) from error
    if series.time.tz is not None and stamps.tz is None:
        stamps = stamps.tz_localize(series.time.tz)
    rows = [int(series.time.searchsorted(stamp)) for stamp in stamps]
    return _ordered(rows, series, parts)


def _ordered(borders: list[int], series: Series, split: Split) -> tuple[int, int, int]:
    if len(borders) == 2:
        borders = [*borders, len(series)]
    if len(borders) != 3:
        raise _unknown(split)
    first, second, end = borders
    if not 0 <= first <= second <= end <= len(series):
        raise ValueError(
            f"split={split} puts the borders of '{series.item}' at rows {borders}, "
            f"which do not rise within its {len(series)} rows"
        )
    return first, second, end


def _unknown(split: object) -> ValueError:
    return ValueError(
        f"split={split!r} is not understood; accepted are {', '.join(repr(name) for name in OFFICIAL)}, "
        f"three fractions [0.7, 0.1, 0.2], two or three row numbers [8640, 11520], "
        f"or two or three dates ['2017-07-01', '2017-11-01']"
    )
