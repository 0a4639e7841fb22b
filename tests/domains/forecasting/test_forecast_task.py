import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mainstem import BackboneConfig
from mainstem.core.training import EpochSeed, UntrainedCandidate
from mainstem.domains.forecasting import ForecastData, Forecaster
from mainstem.domains.forecasting.ridge import RidgeHead

L, H = 24, 6
ETT = Path(__file__).parents[4] / "shared/data/forecasting/ett"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*is deprecated")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")
        yield


@pytest.fixture
def table() -> pd.DataFrame:
    """600 hours of two channels with a daily pattern, and some missing values."""
    rng = np.random.default_rng(0)
    time = pd.date_range("2024-01-01", periods=600, freq="h")
    day = np.sin(2 * np.pi * np.arange(600) / 24)
    noise = rng.standard_normal((600, 2)).cumsum(0) * 0.05 + rng.standard_normal((600, 2)) * 0.2
    values = 50 + 10 * (day[:, None] * [1.0, -0.5] + noise)
    values[rng.random((600, 2)) < 0.02] = np.nan
    return pd.DataFrame({"time": time, "load": values[:, 0], "wind": values[:, 1]})


@pytest.fixture
def file(table: pd.DataFrame, tmp_path: Path) -> Path:
    path = tmp_path / "series.csv"
    table.to_csv(path, index=False)
    return path


def data_of(file: Path, **keywords: Any) -> ForecastData:
    return ForecastData(path=str(file), lookback=L, horizon=H, batch_size=32, seed=0, **keywords)


def forecaster(**keywords: Any) -> Forecaster:
    torch.manual_seed(0)
    backbone = BackboneConfig(mixer=keywords.pop("mixer", "gla"), dim=16, depth=1, heads=2, dropout=0.1)
    settings = {"lookback": L, "horizon": H, "patch_length": 6, "quantiles": [0.1, 0.5, 0.9], **keywords}
    return Forecaster(backbone, **settings)


def trainer(directory: Path, epochs: int = 1, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=directory,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[EpochSeed(1), UntrainedCandidate(), *callbacks],
    )


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


@pytest.mark.parametrize("head", ["point", "quantile", "gaussian", "student_t"])
def test_fit_test_predict(head: Any, file: Path, tmp_path: Path) -> None:
    model, data = forecaster(head=head), data_of(file)
    run = trainer(tmp_path)
    run.fit(model, data)
    results = run.test(model, data, verbose=False)[0]
    for row in ("", "last value/", "seasonal naive/", "ridge/"):
        assert {f"test/{row}{name}" for name in ("mse", "mae", "mase", "mae_original")} <= results.keys()
    assert all(np.isfinite(value) for value in results.values())
    assert results["test/mse"] < results["test/last value/mse"]
    assert results["test/coverage80"] == pytest.approx(0.8, abs=0.15)
    outputs: Any = run.predict(model, data)
    assert outputs[0]["point"].shape == (1, H, 2)
    assert outputs[0]["quantiles"].shape == (1, H, 2, 3)
    assert bool((outputs[0]["quantiles"].diff(dim=-1) >= 0).all())
    frame = pd.read_csv(model.write_predictions(outputs, data, tmp_path / "out")[0])
    point = "median" if head == "quantile" else "mean"
    assert list(frame.columns) == ["item", "origin", "time", "channel", point, "q0.1", "q0.5", "q0.9"]
    assert frame["time"].iloc[0] == "2024-01-26 00:00:00"


def test_metrics_do_not_depend_on_the_batch_size_nor_masked_targets(file: Path, tmp_path: Path) -> None:
    model, data = forecaster(), data_of(file)
    run = trainer(tmp_path)
    run.fit(model, data)
    results = [run.test(model, data, verbose=False)[0]]
    other = data_of(file)
    other.batch_size = 7
    hidden = ~other.test_set.table.observed
    assert hidden.any()
    other.test_set.table.values[hidden] = torch.nan
    results.append(run.test(model, other, verbose=False)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_test_metrics_are_those_of_the_forecasts(file: Path, tmp_path: Path) -> None:
    model, data = forecaster(), data_of(file)
    run = trainer(tmp_path)
    run.fit(model, data)
    results = run.test(model, data, verbose=False)[0]
    batch = data.test_set.__getitems__(range(len(data.test_set)))
    with torch.no_grad():
        point = model.eval()(batch)[..., 0]
    known = batch["future_observed"]
    error = (point - batch["future_values"])[known]
    assert results["test/mse"] == pytest.approx(float(error.square().mean()), rel=1e-4)
    original = (data.scaler.inverse(point) - data.scaler.inverse(batch["future_values"]))[known]
    assert results["test/mae_original"] == pytest.approx(float(original.abs().mean()), rel=1e-4)
    naive = batch["past_values"][:, -24:][:, :H]
    both = known & batch["past_observed"][:, -24:][:, :H]
    expected = (naive - batch["future_values"])[both].abs().mean()
    assert results["test/seasonal naive/mae"] == pytest.approx(float(expected), rel=0.05)


def test_ridge_alone_needs_no_training(file: Path, tmp_path: Path) -> None:
    model, data = forecaster(residual=False), data_of(file)
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    run = trainer(tmp_path, 5, best)
    run.fit(model, data)
    assert run.global_step == 0
    results = run.test(model, data, ckpt_path=best.best_model_path, weights_only=True, verbose=False)[0]
    assert results["test/mse"] == results["test/ridge/mse"]
    assert 0.6 < results["test/coverage80"] < 0.95


def test_residual_alone_learns(file: Path, tmp_path: Path) -> None:
    model, data = forecaster(ridge=False, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)), data_of(file)
    run = trainer(tmp_path, 8)
    run.fit(model, data)
    results = run.test(model, data, verbose=False)[0]
    assert "test/ridge/mse" not in results
    assert results["test/mse"] < 0.5 * results["test/last value/mse"]


def test_a_training_that_only_harms_leaves_the_ridge_as_best(file: Path, tmp_path: Path) -> None:
    model, data = forecaster(optimizer=lambda p: torch.optim.SGD(p, lr=30.0)), data_of(file)
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    run = trainer(tmp_path, 1, best)
    run.fit(model, data)
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] == 0
    results = run.test(model, data, ckpt_path=best.best_model_path, weights_only=True, verbose=False)[0]
    assert results["test/mse"] == results["test/ridge/mse"]


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = forecaster()
    trainer(tmp_path, 4, ModelCheckpoint(tmp_path / "whole")).fit(whole, data_of(file))
    half, last = forecaster(), ModelCheckpoint(tmp_path / "half", save_last=True)
    trainer(tmp_path, 2, last).fit(half, data_of(file))
    assert not same(whole.state_dict(), half.state_dict())
    resumed = forecaster()
    torch.manual_seed(123)
    monkeypatch.setattr(RidgeHead, "fit", None)  # the checkpoint has brought it
    run = trainer(tmp_path, 4, ModelCheckpoint(tmp_path / "half"))
    run.fit(resumed, data_of(file), ckpt_path=last.last_model_path, weights_only=True)
    assert same(whole.state_dict(), resumed.state_dict())


def test_checkpoint_is_whole_in_itself(file: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    model, data = forecaster(head="quantile"), data_of(file)
    last = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, 1, last)
    run.fit(model, data)
    loaded = Forecaster.load_from_checkpoint(last.last_model_path, weights_only=True)
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.calibration.fitted
    batch = data.test_set.__getitems__([0, 1])
    loaded.attach(data)
    assert torch.equal(loaded.eval()(batch), model.eval()(batch))
    # A file whose values moved is scaled as the training data was.
    moved = tmp_path / "moved.csv"
    table.assign(load=table["load"] + 1000).to_csv(moved, index=False)
    other = data_of(moved)
    outputs: Any = run.predict(loaded, other, ckpt_path=last.last_model_path, weights_only=True)
    original: Any = run.predict(model, data, ckpt_path=last.last_model_path, weights_only=True)
    now = other.scaler.inverse(outputs[0]["point"])[..., 0] - 1000
    torch.testing.assert_close(now, data.scaler.inverse(original[0]["point"])[..., 0], rtol=1e-3, atol=1e-2)


def test_many_items_and_one_that_was_not_there(table: pd.DataFrame, tmp_path: Path) -> None:
    parts = [table.assign(shop=name) for name in ("a", "b")]
    file, later = tmp_path / "two.csv", tmp_path / "new.csv"
    pd.concat(parts).to_csv(file, index=False)
    pd.concat([parts[1], table.assign(shop="c")]).to_csv(later, index=False)
    model, data = forecaster(), data_of(file, item_column="shop")
    run = trainer(tmp_path)
    run.fit(model, data)
    model.attach(data_of(later, item_column="shop"))
    assert model.rows.tolist() == [1, -1]


def test_other_data_or_settings_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.horizon=12 but data\.horizon=6"):
        trainer(tmp_path).fit(forecaster(horizon=12), data_of(file))
    with pytest.raises(ValueError, match="the model is not trained"):
        trainer(tmp_path).test(forecaster(), data_of(file))
    with pytest.raises(ValueError, match="leave no model"):
        forecaster(ridge=False, residual=False)
    last = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, 1, last).fit(forecaster(), data_of(file))
    with pytest.raises(ValueError, match="the checkpoint has head=point, the model head=quantile"):
        trainer(tmp_path).test(
            forecaster(head="quantile"), data_of(file), ckpt_path=last.last_model_path, weights_only=True
        )


@pytest.mark.skipif(not ETT.exists(), reason="ETTh1 is not there")
def test_etth1_ridge_and_baselines_through_the_trainer(tmp_path: Path) -> None:
    data = ForecastData(source="etth1", path=str(ETT), lookback=96, horizon=96, batch_size=512)
    model = Forecaster(BackboneConfig(dim=16, depth=1), residual=False)
    run = trainer(tmp_path)
    run.fit(model, data)
    results = run.test(model, data, verbose=False)[0]
    assert results["test/mse"] <= 0.372
    assert results["test/mae"] <= 0.389
    assert results["test/last value/mse"] == pytest.approx(1.294, abs=0.002)
    assert results["test/seasonal naive/mse"] == pytest.approx(0.512, abs=0.002)
    assert results["test/coverage90"] == pytest.approx(0.9, abs=0.05)
