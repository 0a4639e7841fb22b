from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mainstem import BackboneConfig
from mainstem.domains.forecasting import ForecastData, Forecaster
from mainstem.domains.forecasting.backtest import Refitter, backtest

L, H, ROWS = 24, 6, 500


def table(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    day = np.sin(2 * np.pi * np.arange(rows) / 24)
    values = day[:, None] * [1.0, -2.0] + 0.3 * rng.standard_normal((rows, 2))
    values[rng.random((rows, 2)) < 0.02] = np.nan
    time = pd.date_range("2024-01-01", periods=rows, freq="h")
    return pd.DataFrame({"time": time, "a": values[:, 0], "b": values[:, 1]})


def data_of(frame: pd.DataFrame, path: Path, **keywords: Any) -> ForecastData:
    frame.to_csv(path, index=False)
    return ForecastData(path=str(path), lookback=L, horizon=H, split=[300, 350, ROWS], **keywords)


def fitted(data: ForecastData, **keywords: Any) -> Forecaster:
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=8, depth=1, heads=2)
    model = Forecaster(backbone, lookback=L, horizon=H, patch_length=6, **keywords)
    model.attach(data)
    model.fit_ridge(data)
    return model.eval()


def test_without_refit_it_is_the_error_of_every_test_window(tmp_path: Path) -> None:
    data = data_of(table(), tmp_path / "a.csv")
    model = fitted(data)
    result = backtest(model, data)
    batch = data.test_set.__getitems__(range(len(data.test_set)))
    with torch.no_grad():
        error = torch.where(batch["future_observed"], model(batch)[..., 0] - batch["future_values"], 0)
    count = batch["future_observed"].sum((1, 2))
    assert len(result.cutoffs) == len(data.test_set) == ROWS - 350 - H + 1
    np.testing.assert_allclose(result.cutoffs["model/mse"], error.square().sum((1, 2)) / count, rtol=1e-5)
    whole = float(error.square().sum() / count.sum())
    assert result.summary.loc["model", "mse"] == pytest.approx(whole, rel=1e-5)
    assert list(result.summary.index) == ["model", "last value", "seasonal naive", "ridge"]
    assert result.cutoffs["cutoff"].iloc[0] == pd.Timestamp("2024-01-01") + pd.Timedelta(hours=349)


def test_stride_takes_every_nth_cutoff(tmp_path: Path) -> None:
    data = data_of(table(), tmp_path / "a.csv")
    model = fitted(data)
    every, some = backtest(model, data), backtest(model, data, stride=10)
    pd.testing.assert_frame_equal(some.cutoffs, every.cutoffs[::10].reset_index(drop=True))


def test_refit_sees_nothing_after_the_cutoff(tmp_path: Path) -> None:
    frame = table()
    changed = frame.copy()
    changed.loc[400:, ["a", "b"]] *= -3
    first, second = (data_of(f, tmp_path / f"{i}.csv") for i, f in enumerate((frame, changed)))
    model = fitted(first, residual=False)
    results = [backtest(model, data, refit_every=5).cutoffs for data in (first, second)]
    # Cutoffs whose horizon ends before row 400 have nothing to do with what comes later.
    same = results[0]["cutoff"] < pd.Timestamp("2024-01-01") + pd.Timedelta(hours=400 - H)
    assert 40 < int(same.sum()) < len(same)
    pd.testing.assert_frame_equal(results[0][same], results[1][same])
    assert not np.allclose(results[0].loc[~same, "model/mse"], results[1].loc[~same, "model/mse"])


def test_sums_kept_between_refits_are_those_of_all_windows(tmp_path: Path) -> None:
    frame = pd.concat([table(seed=0).assign(id="x"), table(seed=1).assign(id="y")])
    data = data_of(frame, tmp_path / "two.csv", item_column="id")
    weights = []
    for steps in ([[360, 350], [395, 350], [430, 470]], [[430, 470]]):
        model = fitted(data)
        refitter = Refitter(model, model.network, data.test_set.table, 0)
        fill = model.network.ridge.weight.clone()  # type: ignore[union-attr]
        for ends in steps:
            model.network.ridge.weight[0] = fill[0]  # type: ignore[union-attr]
            refitter.refit(ends)
        weights.append(model.network.ridge.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_refit_follows_a_series_that_changes(tmp_path: Path) -> None:
    frame = table()
    # The daily pattern turns round after the training part.
    frame.loc[320:, ["a", "b"]] = frame.loc[320:, ["a", "b"]].to_numpy()[::-1]
    hours = np.arange(ROWS)
    frame.loc[320:, ["a", "b"]] += np.sin(2 * np.pi * hours[320:, None] / 12) * 2
    data = data_of(frame, tmp_path / "a.csv")
    model = fitted(data, residual=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    kept, refitted = backtest(model, data).summary, backtest(model, data, refit_every=10).summary
    assert refitted["mse"]["model"] < 0.8 * kept["mse"]["model"]
    assert refitted["mse"]["last value"] == kept["mse"]["last value"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_residual_can_be_refitted(tmp_path: Path) -> None:
    data = data_of(table(), tmp_path / "a.csv")
    model = fitted(data)
    kept = backtest(model, data, refit_every=100).cutoffs
    trained = backtest(model, data, refit_every=100, residual_epochs=1).cutoffs
    pd.testing.assert_series_equal(kept["ridge/mse"], trained["ridge/mse"])
    assert not np.allclose(kept["model/mse"], trained["model/mse"])


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    data = data_of(table(), tmp_path / "a.csv")
    model = fitted(data)
    with pytest.raises(ValueError, match="refit_every=0 must be at least 1"):
        backtest(model, data, refit_every=0)
    with pytest.raises(ValueError, match="stride=0 must be at least 1"):
        backtest(model, data, stride=0)
    with pytest.raises(ValueError, match="residual_epochs=2 needs refit_every"):
        backtest(model, data, residual_epochs=2)
    raw = Forecaster(BackboneConfig(dim=8, depth=1), lookback=L, horizon=H)
    with pytest.raises(ValueError, match="not fitted"):
        backtest(raw, data)
