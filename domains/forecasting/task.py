"""Training, evaluation and prediction of the forecaster."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import AdamW

from ...core import BackboneConfig
from ...core.training import DomainModule, MetricInfo
from ...core.training.optim import Schedule
from .baselines import season_length, untrained
from .calibration import ConformalCalibration
from .data import ForecastData
from .heads import HeadName, LossName, QuantileHead, build_head
from .metrics import ObservedMean, crps_quantiles
from .model import ForecastModel, Inputs, PatchResidual
from .predictions import write_predictions
from .ridge import Batch, RidgeHead, window_moments
from .windows import SeriesTable

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
BASELINES = ("last value", "seasonal naive", "ridge")

_CYCLES = ("hour_of_day", "day_of_week", "month_of_year")
_DAYS = {
    "minute_of_hour": 1 / 24,
    "hour_of_day": 1.0,
    "day_of_week": 7.0,
    "day_of_month": 30.4,
    "week_of_year": 365.25,
    "month_of_year": 365.25,
}
# A position that was seen only a few times stands for those days, not for what recurs.
_MIN_ROUNDS = 30
_ERRORS = ("mse", "mae", "mase", "mae_original")
_CALIBRATION_ELEMENTS = 20_000_000
_FIXED = ("lookback", "horizon", "head", "ridge", "residual")


class Forecaster(DomainModule):
    """Closed-form ridge plus a backbone residual on patches, quantiles calibrated on the validation windows.

    The ridge is fitted before training; the residual starts at zero, so that the untrained model is the
    ridge. Errors are of scaled data, the field's protocol; `mae_original` is in the data's own units.

    Args:
        backbone: the stack of token mixers; a token is a patch of one channel.
        lookback: L, rows that the model sees.
        horizon: H, rows that it forecasts.
        patch_length: rows in a token.
        patch_stride: rows from one token of the lookback to the next; None is `patch_length`.
        channel_mixing: one sequence of all channels' tokens instead of one for each channel.
        head: what is forecast of every step; "quantile" needs 0.5 among the quantiles.
        loss: of the point head; the others have their own.
        quantiles: levels that are calibrated and written.
        ridge: with the closed-form part; without, the residual is added to the window's mean.
        residual: with the backbone.
        optimizer: given the parameter groups, makes the optimizer.
        schedule: "constant", or "cosine" from the full learning rate to zero at the end of training.
        warmup_steps: optimizer steps over which the learning rate first rises linearly.
    """

    summary_metrics: ClassVar[dict[str, MetricInfo]] = {
        "mse": ("lower", "σ²"),
        "mae": ("lower", "σ"),
        "mase": ("lower", ""),
        "mae_original": ("lower", "data's"),
        "crps": ("lower", "σ"),
        "crps_calibrated": ("lower", "σ"),
    }
    # Less than this of the ridge's validation error is noise: residuals chosen for less did worse on test.
    untrained_margin: ClassVar[float] = 0.005
    items: list[str]
    mase_scale: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        lookback: int = 96,
        horizon: int = 96,
        patch_length: int = 16,
        patch_stride: int | None = None,
        channel_mixing: bool = False,
        head: HeadName = "point",
        loss: LossName = "mse",
        quantiles: Sequence[float] = QUANTILES,
        ridge: bool = True,
        residual: bool = True,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, warmup_steps)
        for name, number in (("lookback", lookback), ("horizon", horizon)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if not ridge and not residual:
            raise ValueError("ridge=False and residual=False leave no model: switch one of them on")
        self.lookback, self.horizon = lookback, horizon
        self.patch_length, self.patch_stride = patch_length, patch_stride or patch_length
        self.channel_mixing, self.with_ridge, self.with_residual = channel_mixing, ridge, residual
        self.head = build_head(head, quantiles, loss)
        self.levels = [round(level, 6) for level in self.head.levels.tolist()]
        self.calibration = ConformalCalibration(self.levels, horizon)
        self.model: ForecastModel | None = None
        self.inputs: Inputs | None = None
        self.items = []
        self.scores = nn.ModuleDict()
        for stage in ("val", "test"):
            names = [*_ERRORS, "crps"]
            names += ["loss"] if stage == "val" else ["crps_calibrated", "coverage", "coverage_uncalibrated"]
            rows = {"model": names, **{name: [*_ERRORS] for name in BASELINES if stage == "test"}}
            self.scores[stage] = nn.ModuleDict(
                {row: nn.ModuleDict({name: ObservedMean() for name in named}) for row, named in rows.items()}
            )
        self._kept: list[dict[str, Tensor]] = []

    # Building

    def build(self, inputs: Inputs) -> None:
        """Make the network for batches of this kind; at the first data seen, or from a checkpoint."""
        if self.model is not None:
            return
        self.inputs = inputs
        candidates = [name for name in _CYCLES if name in inputs.calendar][:1]
        ridge = residual = None
        if self.with_ridge:
            ridge = RidgeHead(self.lookback, self.horizon, calendar=inputs.calendar, candidates=candidates)
        if self.with_residual:
            residual = PatchResidual(
                inputs,
                self.lookback,
                self.horizon,
                self.backbone_config,
                num_outputs=self.head.num_outputs,
                patch_length=self.patch_length,
                patch_stride=self.patch_stride,
                channel_mixing=self.channel_mixing,
            )
        self.model = ForecastModel(self.head, self.horizon, ridge, residual)

    def setup(self, stage: str) -> None:
        """Build the network for the data.

        Raises:
            ValueError: if the data module's windows are not those of the model.
        """
        self.attach(self.data)

    def on_fit_start(self) -> None:
        """Fit the ridge, unless the checkpoint that training resumes from has brought it."""
        self.fit_ridge(self.data)

    def attach(self, data: ForecastData) -> None:
        """Build the network for the data if there is none yet, and check that they fit.

        Raises:
            ValueError: if the data module's windows are not those of the model.
        """
        for name in ("lookback", "horizon"):
            if getattr(data, name) != getattr(self, name):
                raise ValueError(f"model.{name}={getattr(self, name)} but data.{name}={getattr(data, name)}")
        inputs = describe(data)
        self.build(inputs)
        assert self.inputs is not None
        if replace(inputs, cycles=self.inputs.cycles) != self.inputs:
            raise ValueError(f"the model was built for {self.inputs}, but the data gives {inputs}")
        if not self.items:
            self.items = [one.item for one in data.series]
        self.rows = _rows(self.items, [one.item for one in data.series])
        self.season = season_length(data.frequency)

    def fit_ridge(self, data: ForecastData) -> None:
        """Fit the closed-form part on the training windows, if there is one and it was not fitted before."""
        ridge = self.network.ridge
        if ridge is not None and not ridge.fitted:
            ridge.fit(data.train_set, data.val_set)

    @property
    def network(self) -> ForecastModel:
        """The network, once built."""
        if self.model is None:
            raise ValueError("the forecaster has no network before it has seen data or a checkpoint")
        return self.model

    @property
    def data(self) -> ForecastData:
        """The data module of the trainer."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ForecastData):
            raise ValueError(f"data must be a ForecastData, not {type(data).__name__}")
        return data

    # Steps

    def forward(self, batch: Batch) -> Tensor:
        """The head's parameters of the forecast, (B, H, C, R), in scaled units."""
        forecast: Tensor = self.network(batch)
        return forecast

    def known_items(self, batch: Batch) -> Batch:
        """The batch with items numbered as in training, and -1 for one that was not there."""
        return {**batch, "item": self.rows.to(batch["item"].device)[batch["item"]]}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean loss over the observed targets."""
        loss = self.head.loss(self(self.known_items(batch)), batch["future_values"])
        observed = batch["future_observed"]
        loss = torch.where(observed, loss, 0).sum() / observed.sum().clamp_min(1)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(observed))
        return loss

    def on_train_start(self) -> None:
        """Without a residual there is nothing to train."""
        if not self.with_residual:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        """None where the ridge is all there is."""
        if self.with_residual:
            return super().configure_optimizers()
        warnings.filterwarnings("ignore", message=".*configure_optimizers.* returned `None`")
        return None

    def on_validation_start(self) -> None:
        """Begin to collect windows for the calibration."""
        self._kept = []
        self._begin_evaluation(self.data.val_set.table)

    def on_test_start(self) -> None:
        """Refuse a model that was never fitted."""
        self._begin_evaluation(self.data.test_set.table)

    def on_predict_start(self) -> None:
        """Refuse a model that was never fitted."""
        self._check_fitted()

    def _begin_evaluation(self, table: SeriesTable) -> None:
        self._check_fitted()
        self.mase_scale = naive_error(table, self.data.splits.train, self.season or 1)

    def _check_fitted(self) -> None:
        if self.network.ridge is not None and not self.network.ridge.fitted:
            raise ValueError("the model is not trained: fit it first, or give ckpt_path")

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Update the validation metrics."""
        forecast = self._evaluate("val", batch)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._keep(batch, forecast, batch_index)

    def on_validation_epoch_end(self) -> None:
        """Calibrate, so that every checkpoint holds the calibration of its own weights."""
        if self._kept:
            kept = {name: torch.cat([part[name] for part in self._kept]) for name in self._kept[0]}
            if self.trainer.world_size > 1:
                gathered: Any = self.all_gather(kept)
                kept = {name: tensor.flatten(0, 1) for name, tensor in gathered.items()}
            self.calibration.fit(self.head.quantiles(kept.pop("forecast")), **kept)
            self._kept = []

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Update the test metrics of the model and of every baseline."""
        self._evaluate("test", batch)
        for name, forecast in self.baselines(batch).items():
            self._update_errors("test", name, forecast, batch)

    def baselines(self, batch: Batch) -> dict[str, Tensor]:
        """Forecasts (B, H, C) of the baselines by name."""
        found = untrained(self.data.test_set.table, batch, self.horizon, self.season)
        if self.network.ridge is not None:
            found["ridge"] = self.network.ridge(self.known_items(batch))
        return found

    def _evaluate(self, stage: str, batch: Batch) -> Tensor:
        forecast: Tensor = self(self.known_items(batch))
        target, observed = batch["future_values"], batch["future_observed"]
        scores: dict[str, Tensor] = {}
        if self.head.num_outputs > 1:
            scores["crps"] = self.head.crps(forecast, target)
        if stage == "val":
            scores["loss"] = self.head.loss(forecast, target)
        else:
            scores |= self._interval_scores(forecast, batch)
        for name, values in scores.items():
            self._update(stage, "model", name, values, observed)
        self._update_errors(stage, "model", self.head.point(forecast), batch)
        return forecast

    def _interval_scores(self, forecast: Tensor, batch: Batch) -> dict[str, Tensor]:
        """CRPS of the calibrated quantiles, and whether the outermost hold the target, before and after."""
        target = batch["future_values"]
        quantiles: dict[str, Tensor] = {}
        if self.head.num_outputs > 1:
            quantiles["coverage_uncalibrated"] = self.head.quantiles(forecast)
        scores: dict[str, Tensor] = {}
        if self.calibration.fitted:
            quantiles["coverage"] = self.calibrated(forecast, batch)
            levels = self.head.levels.to(forecast)
            scores["crps_calibrated"] = crps_quantiles(quantiles["coverage"], target, levels)
        for name, q in quantiles.items():
            scores[name] = ((q[..., 0] <= target) & (target <= q[..., -1])).float()
        return scores

    def _update_errors(self, stage: str, row: str, point: Tensor, batch: Batch) -> None:
        error, observed = point - batch["future_values"], batch["future_observed"]
        scale = self.mase_scale.to(error)[batch["item"]][:, None]
        self._update(stage, row, "mse", error.square(), observed)
        self._update(stage, row, "mae", error.abs(), observed)
        self._update(stage, row, "mase", error.abs() / scale, observed & (scale > 0))
        original = self.data.scaler.inverse_scale(error.cpu(), batch["item"].cpu()).to(error.device)
        self._update(stage, row, "mae_original", original.abs(), observed)

    def _update(self, stage: str, row: str, name: str, values: Tensor, observed: Tensor) -> None:
        metric = self.scores[stage][row][name]  # type: ignore[index]
        metric.update(values, observed)
        shown = name.replace("coverage", f"coverage{self.interval}")
        key = f"{stage}/{shown}" if row == "model" else f"{stage}/{row}/{shown}"
        self.log(key, metric, on_step=False, on_epoch=True, batch_size=len(values))

    @property
    def interval(self) -> int:
        """Nominal coverage, in per cent, of the interval between the outermost quantiles."""
        return round(100 * float(self.levels[-1] - self.levels[0]))

    def _keep(self, batch: Batch, forecast: Tensor, batch_index: int) -> None:
        windows = len(self.data.val_set)
        every = -(-windows * forecast[0].numel() // _CALIBRATION_ELEMENTS)
        # Neighbouring windows say nearly the same, so every n-th will do.
        rows = torch.arange((-batch_index * self.data.batch_size) % every, len(forecast), every)
        _, sd = window_moments(batch["past_values"], batch["past_observed"])
        kept = {
            "forecast": forecast,
            "target": batch["future_values"],
            "observed": batch["future_observed"],
            "sd": sd,
        }
        self._kept.append({name: tensor[rows.to(tensor.device)] for name, tensor in kept.items()})

    def calibrated(self, forecast: Tensor, batch: Batch) -> Tensor:
        """Quantiles (B, H, C, Q) after calibration."""
        _, sd = window_moments(batch["past_values"], batch["past_observed"])
        quantiles: Tensor = self.calibration(self.head.quantiles(forecast), sd)
        return quantiles

    def predict_step(self, batch: Batch, batch_index: int = 0) -> dict[str, Tensor]:
        """Point (B, H, C) and calibrated quantiles (B, H, C, Q), scaled, with the window they belong to."""
        forecast = self(self.known_items(batch))
        kept = ("item", "start", "past_values", "past_observed", "future_values", "future_observed")
        outputs = {name: batch[name] for name in kept}
        outputs |= {"point": self.head.point(forecast), "quantiles": self.calibrated(forecast, batch)}
        if self.network.ridge is not None:
            outputs["ridge"] = self.network.ridge(self.known_items(batch))
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def write_predictions(
        self, outputs: list[Any], datamodule: LightningDataModule, directory: Path
    ) -> list[Path]:
        """Write `forecast.csv` in original units, up to four pictures, and errors by horizon step."""
        assert isinstance(datamodule, ForecastData)
        point = "median" if isinstance(self.head, QuantileHead) else "mean"
        errors = self._errors_by_step(outputs, datamodule)
        return write_predictions(
            outputs, datamodule, directory, levels=self.levels, point=point, errors=errors
        )

    def _errors_by_step(self, outputs: Sequence[Batch], data: ForecastData) -> dict[str, Tensor] | None:
        """Mean absolute error (H,), scaled, of the model and the baselines; None where no truth is known."""
        metrics: dict[str, ObservedMean] = {}
        for output in outputs:
            forecasts = {"model": output["point"]}
            forecasts |= {"ridge": output["ridge"]} if "ridge" in output else {}
            forecasts |= untrained(data.predict_set.table, output, self.horizon, self.season)
            for name, forecast in forecasts.items():
                error = (forecast - output["future_values"]).abs()
                metrics.setdefault(name, ObservedMean(self.horizon)).update(error, output["future_observed"])
        if not all(bool(metric.count.all()) for metric in metrics.values()):
            return None
        return {name: metric.compute() for name, metric in metrics.items()}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the network was built for."""
        super().on_save_checkpoint(checkpoint)
        if self.inputs is not None:
            checkpoint["inputs"] = asdict(self.inputs)
            checkpoint["items"] = list(self.items)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that the checkpoint holds.

        Raises:
            ValueError: if it holds a model of another class or shape.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        for name in _FIXED:
            if name in saved and saved[name] != self.hparams[name]:
                raise ValueError(
                    f"the checkpoint has {name}={saved[name]}, the model {name}={self.hparams[name]}"
                )
        self.build(Inputs(**checkpoint["inputs"]))
        self.items = list(checkpoint["items"])


def describe(data: ForecastData) -> Inputs:
    """What the batches of a data module hold."""
    one = data.series[0]
    return Inputs(
        channels=len(data.channels),
        calendar=data.calendar,
        cycles=tuple(name for name in data.calendar if _rounds(data, name) >= _MIN_ROUNDS),
        past=len(one.past_names),
        known=len(one.known_names),
        static=len(one.static_names),
    )


def _rounds(data: ForecastData, column: str) -> float:
    """How often the calendar column comes round in the longest training part."""
    days = 0.0
    for one, (begin, end) in zip(data.series, data.splits.train, strict=True):
        if isinstance(one.time, pd.DatetimeIndex) and end > begin:
            days = max(days, (one.time[end - 1] - one.time[begin]) / pd.Timedelta(days=1))
    return days / _DAYS[column]


def naive_error(table: SeriesTable, ranges: Sequence[tuple[int, int]], season: int) -> Tensor:
    """Mean absolute error of the seasonal naive on the training rows, scaled; (items, C), for the MASE."""
    rows = []
    for i, (begin, end) in enumerate(ranges):
        span = slice(int(table.offsets[i]) + begin, int(table.offsets[i]) + end)
        values, observed = table.values[span], table.observed[span]
        known = observed[season:] & observed[:-season]
        error = torch.where(known, values[season:] - values[:-season], 0).abs()
        rows.append(error.sum(0) / known.sum(0).clamp_min(1))
    return torch.stack(rows)


def _rows(trained: Sequence[str], items: Sequence[str]) -> Tensor:
    """For each item of the data its number in training, or -1."""
    if len(trained) == len(items) == 1:
        return torch.zeros(1, dtype=torch.long)
    known = {item: index for index, item in enumerate(trained)}
    return torch.tensor([known.get(item, -1) for item in items])
