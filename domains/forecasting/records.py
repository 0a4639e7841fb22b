"""One time series as the rest of the domain sees it."""

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float32]
Time = pd.DatetimeIndex | NDArray[np.float64]


def _no_columns(rows: int) -> Array:
    return np.zeros((rows, 0), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One item: target channels (N, C) with NaN where missing, their time stamps, and covariates.

    `dt` (N,) is the step to the previous row in units of the median step (the first is 1). `known` (N, K)
    are covariates known in advance, `past` (N, P) covariates known up to now, `static` (S,) constants of the
    item. `future_time` (M,) and `future_known` (M, K) hold the file's rows after the last observed target.
    """

    values: Array
    channels: tuple[str, ...]
    time: Time
    dt: Array
    item: str = "series"
    frequency: str | float | None = None
    known: Array = field(default_factory=lambda: _no_columns(0))
    known_names: tuple[str, ...] = ()
    past: Array = field(default_factory=lambda: _no_columns(0))
    past_names: tuple[str, ...] = ()
    static: Array = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    static_names: tuple[str, ...] = ()
    future_time: Time | None = None
    future_known: Array = field(default_factory=lambda: _no_columns(0))

    def __post_init__(self) -> None:
        rows = len(self.values)
        for name in ("known", "past"):
            if getattr(self, name).size == 0 and not getattr(self, f"{name}_names"):
                object.__setattr__(self, name, _no_columns(rows))
        lengths = {name: len(getattr(self, name)) for name in ("time", "dt", "known", "past")}
        if any(length != rows for length in lengths.values()):
            raise ValueError(f"series '{self.item}' has {rows} rows of values but {lengths} rows of the rest")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def has_dates(self) -> bool:
        """Whether `time` holds calendar dates and not plain numbers."""
        return isinstance(self.time, pd.DatetimeIndex)

    def select(self, channels: tuple[str, ...]) -> "Series":
        """The same series with these channels, in this order."""
        columns = [self.channels.index(name) for name in channels]
        return replace(self, values=self.values[:, columns], channels=channels)


def elapsed(time: Time) -> NDArray[np.float64]:
    """Time since the first row, in seconds for dates."""
    if isinstance(time, pd.DatetimeIndex):
        return np.asarray((time - time[0]).total_seconds(), dtype=np.float64)
    numbers = np.asarray(time, dtype=np.float64)
    return np.asarray(numbers - numbers[:1])


def median_step(time: Time) -> float:
    """Median distance between rows (seconds for dates); 1 where there is none."""
    steps = np.diff(elapsed(time))
    step = float(np.median(steps)) if len(steps) else 0.0
    return step if step > 0 else 1.0


def relative_steps(time: Time, unit: float | None = None) -> Array:
    """Steps between rows in units of `unit` (their median if None), (N,) float32; the first is 1."""
    if len(time) == 0:
        return np.ones(0, dtype=np.float32)
    unit = median_step(time) if unit is None else unit
    return np.concatenate([[1.0], np.diff(elapsed(time)) / unit]).astype(np.float32)
