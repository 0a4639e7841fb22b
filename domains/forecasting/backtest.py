"""Rolling-origin backtest: forecasts from every cutoff of the test rows, refitted on the way if so wished."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ...core.training.optim import parameter_groups
from .baselines import untrained
from .data import ForecastData
from .model import ForecastModel
from .ridge import Batch, NormalEquations, RidgeHead
from .task import Forecaster
from .windows import SeriesTable, WindowDataset, window_starts

_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """The errors at each cutoff, model and baselines side by side, and their mean and spread over cutoffs."""

    cutoffs: pd.DataFrame
    summary: pd.DataFrame


def backtest(
    forecaster: Forecaster,
    data: ForecastData,
    *,
    refit_every: int | None = None,
    residual_epochs: int = 0,
    stride: int = 1,
) -> Backtest:
    """Forecast from every `stride`-th cutoff of the test rows, each with what was known up to then.

    Args:
        forecaster: a fitted one; it is left as it is.
        data: its data.
        refit_every: cutoffs between refits of the ridge on all windows that end before the cutoff; None never
            refits. Calendar column and shrinkage stay as they were chosen.
        residual_epochs: passes of training that the residual gets at each refit; 0 keeps it.
        stride: rows from one cutoff to the next.

    Returns:
        Errors in scaled units, and the mean absolute error in the data's own.

    Raises:
        ValueError: if the forecaster is not fitted, or a number is out of range.
    """
    if refit_every is not None and refit_every < 1:
        raise ValueError(f"refit_every={refit_every} must be at least 1, or None")
    if stride < 1 or residual_epochs < 0:
        raise ValueError(
            f"stride={stride} must be at least 1 and residual_epochs={residual_epochs} not negative"
        )
    forecaster.attach(data)
    if forecaster.network.ridge is not None and not forecaster.network.ridge.fitted:
        raise ValueError("the forecaster is not fitted: train it, or load a checkpoint")
    if residual_epochs and (refit_every is None or forecaster.network.residual is None):
        raise ValueError(f"residual_epochs={residual_epochs} needs refit_every and a model with a residual")
    table = data.test_set.table
    L, H, ranges = data.lookback, data.horizon, data.splits.test
    windows = WindowDataset(table, ranges, lookback=L, horizon=H, stride=stride)
    starts = [window_starts(span, L, H, stride) for span in ranges]
    network = copy.deepcopy(forecaster.network).eval()
    refitter = Refitter(forecaster, network, table, residual_epochs) if refit_every is not None else None
    parts = []
    for indices, origins in _stretches(starts, refit_every):
        if refitter is not None:
            refitter.refit([origin + L for origin in origins])
        parts += [
            _errors(forecaster, network, data, windows.__getitems__(chunk))
            for chunk in torch.split(indices, _BATCH)
        ]
    cutoffs = pd.concat(parts, ignore_index=True)
    return Backtest(cutoffs=cutoffs, summary=summarise(cutoffs))


def summarise(cutoffs: pd.DataFrame) -> pd.DataFrame:
    """Mean over all observed targets, and standard deviation and worst over cutoffs; a row a forecast."""
    rows = []
    for name in dict.fromkeys(name.partition("/")[0] for name in map(str, cutoffs) if "/" in name):
        row: dict[str, object] = {"forecast": name}
        for metric in ("mse", "mae", "mae_original"):
            values = cutoffs[f"{name}/{metric}"]
            row[metric] = (values * cutoffs["observed"]).sum() / cutoffs["observed"].sum()
            row[f"{metric}_std"], row[f"{metric}_worst"] = values.std(ddof=0), values.max()
        rows.append(row)
    return pd.DataFrame(rows).set_index("forecast")


class Refitter:
    """Refits a network on all windows that end before a row of each series; the sums of before are kept.

    Args:
        forecaster: whose items and optimizer are used.
        network: refitted in place.
        table: the rows.
        residual_epochs: passes of training of the residual.
    """

    def __init__(
        self, forecaster: Forecaster, network: ForecastModel, table: SeriesTable, residual_epochs: int
    ) -> None:
        self.forecaster, self.network, self.table = forecaster, network, table
        self.residual_epochs = residual_epochs
        self.equations: NormalEquations | None = None
        self.ends = [0] * (len(table.offsets) - 1)

    def refit(self, ends: Sequence[int]) -> None:
        """Add the windows whose targets end in [last refit's end, `ends`) and solve again."""
        if self.network.ridge is not None:
            self._refit_ridge(self.network.ridge, ends)
        self.ends = list(ends)
        if self.residual_epochs:
            self._train(self._windows([(0, end) for end in ends]))

    def _refit_ridge(self, ridge: RidgeHead, ends: Sequence[int]) -> None:
        H = self.forecaster.horizon
        new = [
            (max(0, before - H + 1) if before else 0, end)
            for before, end in zip(self.ends, ends, strict=True)
        ]
        column, shrinkage = ridge.choice["calendar"], ridge.choice["shrinkage"]
        windows = _Known(self._windows(new), self.forecaster)
        self.equations = ridge.accumulate(windows, self.equations, fill=ridge.weight[0].double())
        ridge.weight = ridge.solve(self.equations, column, shrinkage).to(ridge.weight)

    def _windows(self, ranges: Sequence[tuple[int, int]]) -> WindowDataset:
        return WindowDataset(
            self.table, ranges, lookback=self.forecaster.lookback, horizon=self.forecaster.horizon
        )

    def _train(self, windows: WindowDataset) -> None:
        optimizer = self.forecaster.optimizer(parameter_groups(self.network.named_parameters()))
        self.network.train()
        for _ in range(self.residual_epochs):
            for indices in torch.split(torch.randperm(len(windows)), 128):
                batch = self.forecaster.known_items(windows.__getitems__(indices))
                loss = self.network.head.loss(self.network(batch), batch["future_values"])
                observed = batch["future_observed"]
                optimizer.zero_grad()
                mean = torch.where(observed, loss, 0).sum() / observed.sum().clamp_min(1)
                mean.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.network.eval()


class _Known:
    """Windows whose items are numbered as in training."""

    def __init__(self, windows: WindowDataset, forecaster: Forecaster) -> None:
        self.windows, self.forecaster = windows, forecaster

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.forecaster.known_items(self.windows.__getitems__(indices))


def _stretches(starts: Sequence[range], every: int | None) -> Iterator[tuple[Tensor, list[int]]]:
    """Indices of the windows between two refits, and the first row of each series' first one."""
    counts = [len(rows) for rows in starts]
    every = every or max(counts)
    offsets = [sum(counts[:i]) for i in range(len(counts))]
    for first in range(0, max(counts), every):
        indices = [
            offset + torch.arange(min(first, count), min(first + every, count))
            for offset, count in zip(offsets, counts, strict=True)
        ]
        # A series whose windows are used up stays where its last one began.
        origins = [rows[min(first, len(rows) - 1)] if rows else rows.start for rows in starts]
        yield torch.cat(indices), origins


@torch.no_grad()
def _errors(forecaster: Forecaster, network: ForecastModel, data: ForecastData, batch: Batch) -> pd.DataFrame:
    known = forecaster.known_items(batch)
    forecasts = {"model": network.head.point(network(known))}
    forecasts |= untrained(data.test_set.table, batch, forecaster.horizon, forecaster.season)
    if network.ridge is not None:
        forecasts["ridge"] = network.ridge(known)
    observed = batch["future_observed"]
    count = observed.sum((1, 2))
    rows = zip(batch["item"].tolist(), batch["start"].tolist(), strict=True)
    last = data.lookback - 1
    columns: dict[str, object] = {
        "item": [data.series[i].item for i in batch["item"].tolist()],
        "cutoff": [data.series[i].time[start + last] for i, start in rows],
        "observed": count.numpy(),
    }
    for name, forecast in forecasts.items():
        error = torch.where(observed, forecast - batch["future_values"], 0)
        original = data.scaler.inverse_scale(error, batch["item"])
        for metric, values in {
            "mse": error.square(),
            "mae": error.abs(),
            "mae_original": original.abs(),
        }.items():
            columns[f"{name}/{metric}"] = (values.sum((1, 2)) / count).numpy()
    return pd.DataFrame(columns)
