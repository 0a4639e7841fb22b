"""Windows over series: index views into one table, gathered a batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .calendar import calendar_positions
from .records import Array, Series
from .scaling import Scaler, Scalers

Batch = dict[str, Tensor]
Range = tuple[int, int]


class SeriesTable:
    """All rows of all series, one after the other, scaled, with a mask; every split shares this one copy.

    Values are float32 (ΣN, C), 0 where `observed` is False; series i owns rows [offsets[i], offsets[i+1]).
    `first_rows[i]` is the row number, within the file's series, of its first row here.
    """

    def __init__(
        self,
        series: Sequence[Series],
        scalers: Scalers,
        *,
        calendar: tuple[str, ...] = (),
        first_rows: Sequence[int] | None = None,
    ) -> None:
        lengths = torch.tensor([0, *(len(one) for one in series)])
        self.offsets = lengths.cumsum(0)
        self.first_rows = torch.tensor(list(first_rows) if first_rows is not None else [0] * len(series))
        self.calendar_names = calendar
        scaled = torch.cat(
            [scalers.values.transform(torch.tensor(one.values), i) for i, one in enumerate(series)]
        )
        self.observed = ~torch.isnan(scaled)
        self.values = scaled.nan_to_num_(0.0)
        self.dt = torch.cat([torch.tensor(one.dt) for one in series])
        self.calendar = torch.cat([torch.tensor(calendar_positions(one.time, calendar)) for one in series])
        self.known = _covariates([one.known for one in series], scalers.known)
        self.past = _covariates([one.past for one in series], scalers.past)
        self.static = _covariates([one.static[None] for one in series], scalers.static)


def _covariates(parts: Sequence[Array], scaler: Scaler) -> Tensor:
    return scaler.transform(torch.tensor(np.concatenate(parts)))


def window_starts(span: Range, lookback: int, horizon: int, stride: int = 1) -> range:
    """First rows of the windows whose horizon lies in [begin, end) and whose lookback may begin before it."""
    begin, end = span
    first = max(begin - lookback, 0)
    return range(first, max(first, end - lookback - horizon + 1), stride)


class WindowDataset(Dataset[Batch]):
    """Every window of `lookback` + `horizon` rows whose horizon lies in its series' range [begin, end).

    The lookback may reach back over `begin`, so a range [8640, 11520) has 2880 − H + 1 windows; a range that
    starts at 0 has end − L − H + 1. Nothing is copied but the rows of the batch asked for.
    """

    def __init__(
        self,
        table: SeriesTable,
        ranges: Sequence[Range],
        *,
        lookback: int,
        horizon: int,
        stride: int = 1,
    ) -> None:
        self.table, self.lookback, self.horizon, self.stride = table, lookback, horizon, stride
        self._starts = [window_starts(span, lookback, horizon, stride) for span in ranges]
        self._ends = torch.tensor([len(starts) for starts in self._starts]).cumsum(0)
        self._firsts = torch.tensor([starts.start for starts in self._starts])
        self._window = torch.arange(lookback + horizon)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return {name: tensor[0] for name, tensor in self.__getitems__([index % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """The whole batch in one gather a tensor; shapes (B, L, C), (B, H, C), (B, L+H, ·)."""
        table, L = self.table, self.lookback
        item, start = self._locate(torch.as_tensor(indices))
        rows = (table.offsets[item] + start)[:, None] + self._window
        values, observed = _take(table.values, rows), _take(table.observed, rows)
        return {
            "past_values": values[:, :L],
            "past_observed": observed[:, :L],
            "future_values": values[:, L:],
            "future_observed": observed[:, L:],
            "dt": table.dt[rows],
            "calendar": _take(table.calendar, rows),
            "past_covariates": _take(table.past, rows[:, :L]),
            "known_covariates": _take(table.known, rows),
            "static": table.static[item],
            "item": item,
            "start": table.first_rows[item] + start,
        }

    def windows_as_view(self) -> list[tuple[Tensor, Tensor]]:
        """Values and observed mask, (windows, L+H, C) each, of every series that has windows; not copied."""
        size = self.lookback + self.horizon
        views = []
        for i, starts in enumerate(self._starts):
            if not len(starts):
                continue
            base = int(self.table.offsets[i])
            rows = slice(base + starts[0], base + starts[-1] + size)
            values, observed = (
                tensor[rows].unfold(0, size, self.stride).transpose(1, 2)
                for tensor in (self.table.values, self.table.observed)
            )
            views.append((values, observed))
        return views

    def _locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        item = torch.searchsorted(self._ends, index, right=True)
        before = torch.where(item > 0, self._ends[item - 1], 0)
        return item, self._firsts[item] + (index - before) * self.stride


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    # index_select over rows is several times faster than advanced indexing for wide tables.
    return tensor.index_select(0, rows.flatten()).view(*rows.shape, tensor.shape[-1])


def whole_batch(batch: Batch) -> Batch:
    """The collate function that goes with `__getitems__`, which has already built the batch."""
    return batch
