"""The forecasting data module: a public set, or a file of one's own, as windows."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch.utils.data import DataLoader

from ...core.training.data import DomainData
from .calendar import CALENDAR_SIZES, calendar_names
from .columns import Columns
from .files import read_table
from .future import future_time, joined, with_future
from .readers import Regular, read_series
from .records import Series, Time, median_step
from .scaling import ScaleBy, Scaler, Scalers
from .sources import PUBLIC, SOURCES, Source, embedded_co2, read_public
from .splits import Splits, split_rows
from .windows import Batch, SeriesTable, WindowDataset, whole_batch, window_starts


class ForecastData(DomainData):
    """Windows of `lookback` + `horizon` rows over one or many series.

    Args:
        source: "co2" (weekly, ships with statsmodels), a public set, or "file"; None is "file" where a path
            is given and else "co2".
        path: the public set's file or folder, or a CSV or Parquet file of one's own, wide or long.
        lookback: L, rows that the model sees.
        horizon: H, rows that it forecasts.
        split: None takes the published borders of a public set, [0.7, 0.1, 0.2] elsewhere. Three fractions,
            two or three row numbers, two or three dates (first row of validation, of test, end), "ett-hour"
            or "ett-minute".
        scale: standardise each "channel" over all items, each channel of each "item", or "none"; always with
            the observed training rows only.
        channels: columns to forecast; None takes all columns not otherwise used.
        time_column: None guesses it; "row" numbers the rows.
        item_column: column that names the series of a long file.
        known_covariates: columns known for the future too.
        past_covariates: columns known up to the present.
        static_covariates: numeric columns that are constant within an item.
        regular: "auto" puts the rows that are missing from a regular grid in as missing values, "never" keeps
            the rows as they are, with their distances in `dt`.
        timezone: zone of local clock times ("Europe/Berlin"), or to convert times with an offset to.
        time_format: strptime format of the time column.
        skip_short: leave out series shorter than L + H instead of refusing them.
        eval_stride: rows from one validation or test window to the next.
        predict: forecast the "future" after each series' last row, or windows of the "test" rows that follow
            one another without overlap, whose truth is known.
        batch_size: windows in a batch.
        num_workers: processes that gather batches; 0 is the fastest, gathering is one indexing operation.
        pin_memory: page-locked batches.
        seed: of the training order; None takes the global seed.
    """

    def __init__(
        self,
        source: Source | None = None,
        path: str | None = None,
        lookback: int = 96,
        horizon: int = 96,
        split: list[int] | list[float] | list[str] | str | None = None,
        scale: ScaleBy = "channel",
        channels: list[str] | None = None,
        time_column: str | None = None,
        item_column: str | None = None,
        known_covariates: list[str] | None = None,
        past_covariates: list[str] | None = None,
        static_covariates: list[str] | None = None,
        regular: Regular = "auto",
        timezone: str | None = None,
        time_format: str | None = None,
        skip_short: bool = False,
        eval_stride: int = 1,
        predict: Literal["future", "test"] = "future",
        batch_size: int = 32,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        source = source or ("file" if path is not None else "co2")
        _check_choice("source", source, SOURCES)
        _check_choice("scale", scale, ("channel", "item", "none"))
        _check_choice("regular", regular, ("auto", "never"))
        _check_choice("predict", predict, ("future", "test"))
        for name, number in (("lookback", lookback), ("horizon", horizon), ("eval_stride", eval_stride)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if source == "file" and path is None:
            raise ValueError("source='file' needs path=... of a .csv or .parquet file")
        if source == "co2" and path is not None:
            raise ValueError(
                f"source='co2' ships with statsmodels and takes no path, but path='{path}' was given"
            )
        self.source, self.path, self.split = source, path, split
        self.lookback, self.horizon, self.eval_stride = lookback, horizon, eval_stride
        self.scale, self.predict_on, self.skip_short = scale, predict, skip_short
        self.regular, self.timezone, self.time_format = regular, timezone, time_format
        self.columns = Columns(
            time=time_column, item=item_column, channels=channels,
            known=known_covariates or (), past=past_covariates or (), static=static_covariates or (),
        )  # fmt: skip
        self._trained: dict[str, Any] | None = None
        self._series: list[Series] | None = None
        self._calendar: tuple[str, ...] | None = None
        self._splits: Splits | None = None
        self._scalers: Scalers | None = None
        self._table: SeriesTable | None = None
        self._sets: dict[str, WindowDataset] = {}

    # What set-up finds

    @property
    def series(self) -> list[Series]:
        """The series, in original units; read at first use."""
        if self._series is None:
            self._series = self._fit_to_training(self._read())
        return self._series

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the forecast channels."""
        return self.series[0].channels

    @property
    def frequency(self) -> str | float | None:
        """Pandas alias of the row spacing, a number for a numeric time, None where it is irregular."""
        return self.series[0].frequency

    @property
    def calendar(self) -> dict[str, int]:
        """Calendar columns of a batch, in order, each with its number of positions."""
        series = self.series
        if self._calendar is None:
            finest = min(series, key=lambda one: median_step(one.time))
            self._calendar = calendar_names(finest.time)
        return {name: CALENDAR_SIZES[name] for name in self._calendar}

    @property
    def splits(self) -> Splits:
        """Target rows of training, validation and test, a range a series."""
        if self._splits is None:
            official = PUBLIC[self.source].split if self.source in PUBLIC else None
            self._splits = split_rows(self.series, self.split if self.split is not None else official)
        return self._splits

    @property
    def scaler(self) -> Scaler:
        """Scaler of the channels: the checkpoint's, or else fitted on the training rows."""
        return self.scalers.values

    @property
    def scalers(self) -> Scalers:
        """Scalers of the channels and the covariates."""
        if self._scalers is None:
            self._scalers = (
                Scalers.fit(self.series, self.splits.train, self.scale)
                if self._trained is None
                else Scalers.from_state_dict(self._trained["scalers"], [one.item for one in self.series])
            )
        return self._scalers

    @property
    def train_set(self) -> WindowDataset:
        """Training windows."""
        return self._windows("train", stride=1)

    @property
    def val_set(self) -> WindowDataset:
        """Validation windows."""
        return self._windows("val", stride=self.eval_stride)

    @property
    def test_set(self) -> WindowDataset:
        """Test windows, all of them."""
        return self._windows("test", stride=self.eval_stride)

    @property
    def predict_set(self) -> WindowDataset:
        """One window a series, whose horizon is the future, or consecutive test windows."""
        if self.predict_on == "test":
            return self._windows("test", stride=self.horizon)
        if "future" not in self._sets:
            self._sets["future"] = self._future_windows()
        return self._sets["future"]

    # Lightning

    def setup(self, stage: str | None = None) -> None:
        """Read the file and check that there are windows for `stage`.

        Raises:
            ValueError: if the file cannot give what `stage` needs.
        """
        self.take_up_checkpoint()
        parts = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for part in parts.get(stage or "fit", ()):
            self._check_windows(part)
        if stage == "fit":
            _ = self.scalers
        if stage == "predict" and self.predict_on == "future":
            self._with_future()
        elif stage == "predict":
            self._check_windows("test")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training windows."""
        return self.training_loader(self.train_set, whole_batch)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation windows in time order."""
        return self.evaluation_loader(self.val_set, whole_batch)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test windows in time order, none dropped."""
        return self.evaluation_loader(self.test_set, whole_batch)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The windows to forecast."""
        return self.evaluation_loader(self.predict_set, whole_batch)

    def state_dict(self) -> dict[str, Any]:
        """Scalers, channels and calendar of the training data, so that a new file is treated as it was."""
        return super().state_dict() | {
            "scalers": self.scalers.state_dict(),
            "channels": list(self.channels),
            "covariates": {role: list(getattr(self.series[0], f"{role}_names")) for role in _ROLES},
            "calendar": list(self.calendar),
            "frequency": self.frequency,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the training data's scalers, and check that this file has its channels.

        Raises:
            ValueError: naming the channels that are missing.
        """
        super().load_state_dict(state_dict)
        if state_dict == self._trained:
            return
        series = self._series
        self._clear()
        self._trained = state_dict
        if series is not None:
            self._series = self._fit_to_training(series)

    # Times of a window, for plots and tables

    def window_time(self, item: int, start: int) -> Time:
        """Time stamps (L + H,) of the window of series `item` that begins at row `start`, into the future."""
        series = self.series[item]
        stop = start + self.lookback + self.horizon
        beyond = stop - len(series)
        if beyond <= 0:
            return series.time[start:stop]
        return joined(series.time[start:], future_time(series, beyond))

    # Inside

    def _clear(self) -> None:
        self._series = self._calendar = self._splits = self._scalers = self._table = None
        self._sets = {}

    def _read(self) -> list[Series]:
        if self.source == "co2":
            return embedded_co2()
        if self.source in PUBLIC:
            series = read_public(self.source, self.path)
            return [one.select(_known_channels(one, self.columns.channels)) for one in series]
        series = read_series(
            read_table(str(self.path)),
            self.columns,
            regular=self.regular,
            timezone=self.timezone,
            time_format=self.time_format,
        )
        if not self.skip_short:
            return series
        return [one for one in series if len(one) >= self.lookback + self.horizon] or series

    def _fit_to_training(self, series: list[Series]) -> list[Series]:
        if self._trained is None:
            return series
        wanted = tuple(self._trained["channels"])
        for role in _ROLES:
            names, has = self._trained["covariates"][role], list(getattr(series[0], f"{role}_names"))
            if names != has:
                raise ValueError(
                    f"the model was trained with {role}_covariates={names}, but this data has {has}"
                )
        have = series[0].channels
        missing = [name for name in wanted if name not in have]
        if missing:
            raise ValueError(
                f"the model was trained on channel '{missing[0]}', which this data lacks; it has "
                f"{', '.join(have)}, and needs {', '.join(wanted)}"
            )
        if len(have) > len(wanted):
            extra = ", ".join(name for name in have if name not in wanted)
            warnings.warn(f"channels that the model was not trained on are left out: {extra}", stacklevel=2)
        self._calendar = tuple(self._trained["calendar"])
        trained, now = self._trained["frequency"], series[0].frequency
        if trained is not None and now is not None and trained != now:
            warnings.warn(
                f"the model was trained on rows {trained!r} apart; these are {now!r} apart", stacklevel=2
            )
        return [one.select(wanted) for one in series]

    def _windows(self, part: str, stride: int) -> WindowDataset:
        key = f"{part}/{stride}"
        if key not in self._sets:
            self._check_windows(part)
            if self._table is None:
                self._table = SeriesTable(self.series, self.scalers, calendar=tuple(self.calendar))
            self._sets[key] = WindowDataset(
                self._table,
                getattr(self.splits, part),
                lookback=self.lookback,
                horizon=self.horizon,
                stride=stride,
            )
        return self._sets[key]

    def _check_windows(self, part: str) -> None:
        L, H = self.lookback, self.horizon
        self._refuse_short(L + H, f"lookback={L} and horizon={H}")
        spans = getattr(self.splits, part)
        if not any(len(window_starts(span, L, H)) for span in spans):
            rows = max(end - begin for begin, end in spans)
            need = f"lookback + horizon = {L + H}" if part == "train" else f"horizon = {H}"
            raise ValueError(
                f"the {part} part has {rows} rows, too few for one window, which needs {need}; "
                f"shorten the window or move the split"
            )

    def _refuse_short(self, need: int, reason: str) -> None:
        for one in self.series:
            if len(one) < need:
                many = "; skip_short=True leaves such series out" if len(self.series) > 1 else ""
                raise ValueError(f"'{one.item}' has {len(one)} rows, but {reason} need at least {need}{many}")

    def _with_future(self) -> list[Series]:
        self._refuse_short(self.lookback, f"forecasts with lookback={self.lookback}")
        return [with_future(one, self.lookback, self.horizon) for one in self.series]

    def _future_windows(self) -> WindowDataset:
        L, H = self.lookback, self.horizon
        windows = self._with_future()
        table = SeriesTable(
            windows,
            self.scalers,
            calendar=tuple(self.calendar),
            first_rows=[len(one) - L for one in self.series],
        )
        return WindowDataset(table, [(L, L + H)] * len(windows), lookback=L, horizon=H)


_ROLES = ("known", "past", "static")


def _known_channels(series: Series, channels: Sequence[str] | None) -> tuple[str, ...]:
    if channels is None:
        return series.channels
    unknown = [name for name in channels if name not in series.channels]
    if unknown:
        raise ValueError(f"channel '{unknown[0]}' is not in the file, which has {', '.join(series.channels)}")
    return tuple(channels)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}='{value}' is unknown; choose one of {', '.join(choices)}")
