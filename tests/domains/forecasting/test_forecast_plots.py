from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from mainstem import BackboneConfig
from mainstem.domains.forecasting import ForecastData, Forecaster
from mainstem.domains.forecasting.plots import Panel, forecast_figure, horizon_figure
from mainstem.domains.forecasting.predictions import prediction_frame, to_original, write_predictions

LEVELS = [0.1, 0.5, 0.9]
PNG = b"\x89PNG\r\n\x1a\n"


def panel(title: str = "load", truth: bool = True) -> Panel:
    point = np.linspace(0, 1, 4, dtype=np.float32)
    known = point + 0.1 if truth else np.full(4, np.nan, dtype=np.float32)
    return Panel(
        title=title,
        past=np.arange(10, dtype=np.float32),
        truth=known.astype(np.float32),
        point=point,
        quantiles=np.stack([point - 1, point, point + 1], -1),
    )


@pytest.fixture
def data(tmp_path: Path) -> ForecastData:
    rng = np.random.default_rng(0)
    values = 100 + 5 * rng.standard_normal((300, 2))
    values[250, 0] = np.nan
    time = pd.date_range("2024-03-30", periods=300, freq="h", tz="UTC")
    pd.DataFrame({"when": time, "load": values[:, 0], "wind": values[:, 1]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    return ForecastData(path=str(tmp_path / "a.csv"), lookback=24, horizon=6, predict="test")


def outputs(data: ForecastData) -> tuple[Forecaster, list[dict[str, Tensor]]]:
    model = Forecaster(
        BackboneConfig(dim=8, depth=1, heads=2), lookback=24, horizon=6, patch_length=6, quantiles=LEVELS
    )
    model.attach(data)
    model.fit_ridge(data)
    model.eval()
    with torch.no_grad():
        return model, [model.predict_step(batch) for batch in data.predict_dataloader()]


@pytest.mark.parametrize("time", [pd.date_range("2024-01-01", periods=14, freq="D"), np.arange(14.0)])
def test_figure_has_context_truth_forecast_and_fan(time: pd.DatetimeIndex) -> None:
    figure = forecast_figure(time, [panel(), panel("wind", truth=False)], levels=LEVELS, title="two")
    with_truth, without = figure.axes
    labels = [line.get_label() for line in with_truth.lines]
    assert labels[:3] == ["context", "truth", "forecast (median)"]
    assert [line.get_label() for line in without.lines][:2] == ["context", "forecast (median)"]
    assert [fan.get_label() for fan in with_truth.collections] == ["10% to 90%"]
    assert with_truth.get_title(loc="left") == "load"
    np.testing.assert_allclose(np.asarray(with_truth.lines[2].get_ydata()), panel().point)
    assert np.size(with_truth.lines[2].get_xdata()) == 4


def test_long_context_is_cut_so_that_the_forecast_can_be_seen() -> None:
    long = panel()
    figure = forecast_figure(
        np.arange(104.0), [Panel(**{**vars(long), "past": np.zeros(100, np.float32)})], levels=LEVELS
    )
    assert np.size(figure.axes[0].lines[0].get_xdata()) == 12


def test_horizon_figure_draws_the_model_solid_and_baselines_dashed() -> None:
    figure = horizon_figure({"model": torch.tensor([0.1, 0.2]), "last value": torch.tensor([0.3, 0.4])})
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_no_figure_stays_open() -> None:
    horizon_figure({"model": torch.tensor([0.1, 0.2])})
    assert pyplot.get_fignums() == []


def test_written_files(data: ForecastData, tmp_path: Path) -> None:
    model, batches = outputs(data)
    directory = tmp_path / "out"
    paths = model.write_predictions(batches, data, directory)
    windows = len(data.predict_set)
    names = ["forecast.csv", "forecast-1.png", "forecast-4.png", "forecast-7.png", f"forecast-{windows}.png"]
    assert [path.name for path in paths] == [*names, "horizon.png"]
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in paths)
    assert all(path.read_bytes().startswith(PNG) for path in paths[1:])
    frame = pd.read_csv(paths[0])
    assert len(frame) == windows * 6 * 2
    assert list(frame.columns) == [
        "item",
        "origin",
        "time",
        "channel",
        "mean",
        "q0.1",
        "q0.5",
        "q0.9",
        "truth",
    ]


def test_table_holds_original_units_and_times(data: ForecastData) -> None:
    _, batches = outputs(data)
    frame = prediction_frame(to_original(batches, data), data, LEVELS, "mean")
    source = data.series[0]
    first = int(batches[0]["start"][0]) + 24
    assert frame["time"].iloc[0] == str(source.time[first])
    assert frame["origin"].iloc[0] == str(source.time[first - 1])
    for channel, name in enumerate(data.channels):
        rows = frame[frame["channel"] == name]
        truth = source.values[first : first + len(rows), channel]
        np.testing.assert_allclose(rows["truth"], truth, rtol=1e-5)
        point = torch.cat([batch["point"] for batch in batches])[..., channel].flatten()
        scaled = point * data.scaler.scale[0, channel] + data.scaler.mean[0, channel]
        np.testing.assert_allclose(rows["mean"], scaled, rtol=1e-5)
    assert frame["truth"].isna().sum() == 1


def test_nothing_half_written(data: ForecastData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, batches = outputs(data)

    def fail(self: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_text("item,ori")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        write_predictions(batches, data, tmp_path / "out", levels=LEVELS, point="mean")
    assert list((tmp_path / "out").iterdir()) == []
