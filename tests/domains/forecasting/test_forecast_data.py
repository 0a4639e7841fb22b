"""The data module: counts, predictions' windows, state in checkpoints, resuming, and its sentences."""

import inspect
import warnings
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import OmegaConf

from mainstem import BackboneConfig
from mainstem.core.mixers import MIXERS
from mainstem.domains.forecasting.data import ForecastData
from mainstem.domains.forecasting.task import Forecaster

# Of torch, within Lightning.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")

REAL = Path(__file__).parents[4] / "shared" / "data" / "forecasting"
COLUMNS = ["a", "b", "c"]


def write(folder: Path, rows: int = 120, name: str = "mine.csv", freq: str = "h", **columns: Any) -> Path:
    values = np.random.default_rng(0).normal(5, 2, size=(rows, 3)).round(4)
    frame = pd.DataFrame(values, columns=COLUMNS).assign(**columns)
    frame.insert(0, "date", pd.date_range("2024-01-01", periods=rows, freq=freq).astype(str))
    path = folder / name
    frame.to_csv(path, index=False)
    return path


def data(path: Path, **options: Any) -> ForecastData:
    return ForecastData(path=str(path), **{"lookback": 8, "horizon": 4, "batch_size": 16, **options})


def refused(module: ForecastData, stage: str = "fit") -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (each test looks at the sentence)
        module.setup(stage)
    assert "\n" not in str(error.value)
    return str(error.value)


# Sources and counts


@pytest.mark.parametrize(
    ("source", "file", "lookback", "horizon", "counts"),
    [
        ("etth1", "ett/ETTh1.csv.gz", 96, 96, (8449, 2785, 2785)),
        ("etth1", "ett/ETTh1.csv.gz", 336, 720, (7585, 2161, 2161)),
        ("weather", "weather", 96, 96, (36696, 5175, 10444)),
        ("exchange", "exchange/exchange_rate.txt.gz", 96, 96, (5120, 665, 1422)),
        ("ili", "ili/national_illness.csv", 36, 24, (617, 74, 170)),
        ("ili", "ili", 104, 60, (513, 38, 134)),
    ],
)
def test_real_files_give_the_published_number_of_windows(
    source: Any, file: str, lookback: int, horizon: int, counts: tuple[int, int, int]
) -> None:
    if not (REAL / file).exists():
        pytest.skip(f"{file} is not here")
    module = ForecastData(source, str(REAL / file), lookback=lookback, horizon=horizon)
    module.setup("fit")
    module.setup("test")
    assert (len(module.train_set), len(module.val_set), len(module.test_set)) == counts


def test_etth1_is_scaled_as_published() -> None:
    if not (REAL / "ett/ETTh1.csv.gz").exists():
        pytest.skip("ETTh1 is not here")
    module = ForecastData("etth1", str(REAL / "ett"))
    frame = pd.read_csv(REAL / "ett/ETTh1.csv.gz").iloc[:, 1:].to_numpy(np.float64)
    scaled = (frame - frame[:8640].mean(0)) / frame[:8640].std(0)
    batch = module.test_set.__getitems__([0, 2784])
    # The test windows end at row 14400; the rest of the file is unused.
    np.testing.assert_allclose(batch["past_values"][0], scaled[11520 - 96 : 11520], atol=2e-6)
    np.testing.assert_allclose(batch["future_values"][1], scaled[14400 - 96 : 14400], atol=2e-6)


def test_the_default_is_the_embedded_series() -> None:
    module = ForecastData()
    module.setup("fit")
    assert module.source == "co2"
    assert module.channels == ("co2",)
    assert module.calendar == {"week_of_year": 53, "month_of_year": 12}
    batch = next(iter(module.train_dataloader()))
    assert batch["past_values"].shape == (32, 96, 1)
    assert not module.train_set.table.observed.all()


def test_no_window_of_any_split_is_dropped(tmp_path: Path) -> None:
    module = data(write(tmp_path), batch_size=7)
    for name in ("train", "val", "test"):
        loader = getattr(module, f"{name}_dataloader")()
        starts = torch.cat([batch["start"] for batch in loader])
        dataset = getattr(module, f"{name}_set")
        assert sorted(starts.tolist()) == dataset.__getitems__(range(len(dataset)))["start"].tolist()
    assert (len(module.train_set), len(module.val_set), len(module.test_set)) == (73, 9, 21)


def test_evaluation_stride_thins_validation_and_test_only(tmp_path: Path) -> None:
    module = data(write(tmp_path), eval_stride=4)
    assert (len(module.train_set), len(module.val_set), len(module.test_set)) == (73, 3, 6)


def test_items_of_unequal_length_are_split_each(tmp_path: Path) -> None:
    parts = []
    for item, rows in (("x", 120), ("y", 60)):
        frame = pd.read_csv(write(tmp_path, rows))
        parts.append(frame.assign(item=item))
    path = tmp_path / "long.csv"
    pd.concat(parts).to_csv(path, index=False)
    module = data(path, item_column="item")
    assert module.splits.test == [(96, 120), (48, 60)]
    batch = module.test_set.__getitems__(range(len(module.test_set)))
    assert batch["item"].tolist() == [0] * 21 + [1] * 9


def test_scaling_by_item_of_a_long_file_is_scaling_by_channel_of_a_wide_one(tmp_path: Path) -> None:
    path = write(tmp_path)
    wide = data(path)
    long_path = tmp_path / "long.csv"
    pd.read_csv(path).melt("date", var_name="item", value_name="y").to_csv(long_path, index=False)
    long = data(long_path, item_column="item", scale="item")
    expected = wide.test_set.__getitems__(range(21))["future_values"]
    found = long.test_set.__getitems__(range(63))["future_values"].view(3, 21, 4)
    torch.testing.assert_close(found.permute(1, 2, 0), expected, rtol=0, atol=0)


def test_covariates_are_standardised_on_training_rows(tmp_path: Path) -> None:
    module = data(write(tmp_path), known_covariates=["b"], past_covariates=["c"])
    batch = module.train_set.__getitems__(range(len(module.train_set)))
    assert batch["known_covariates"].shape[1:] == (12, 1)
    assert batch["past_covariates"].shape[1:] == (8, 1)
    known = pd.read_csv(tmp_path / "mine.csv").b.to_numpy()
    np.testing.assert_allclose(
        batch["known_covariates"][3, :, 0], ((known - known[:84].mean()) / known[:84].std())[3:15], atol=1e-5
    )


# Predictions


def test_the_future_window_starts_after_the_last_row(tmp_path: Path) -> None:
    module = data(write(tmp_path))
    module.setup("predict")
    [batch] = list(module.predict_dataloader())
    table = module.train_set.table
    assert torch.equal(batch["past_values"][0], table.values[-8:])
    assert not batch["future_observed"].any()
    assert batch["start"].tolist() == [112]
    time = module.window_time(0, 112)
    assert [str(stamp) for stamp in time[[7, 8, -1]]] == [
        "2024-01-05 23:00:00",
        "2024-01-06 00:00:00",
        "2024-01-06 03:00:00",
    ]
    assert batch["calendar"][0, 8:, 0].tolist() == [0, 1, 2, 3]
    assert batch["dt"][0].tolist() == [1.0] * 12


def test_the_future_takes_known_covariates_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    frame = pd.read_csv(path)
    frame.loc[116:, ["a", "c"]] = np.nan
    frame.to_csv(path, index=False)
    module = data(path, known_covariates=["b"])
    [batch] = list(module.predict_dataloader())
    expected = module.scalers.known.transform(torch.tensor(frame.b.to_numpy(np.float32))[:, None])
    torch.testing.assert_close(batch["known_covariates"][0], expected[108:], rtol=0, atol=0)
    assert str(module.window_time(0, 108)[-1]) == "2024-01-05 23:00:00"


def test_missing_known_covariates_of_the_future_are_named(tmp_path: Path) -> None:
    assert refused(data(write(tmp_path), known_covariates=["b", "c"]), "predict") == (
        "known_covariates b, c are needed for the 4 rows after 2024-01-05 23:00:00 of 'series', "
        "but the file has 0; add the rows with the channels left empty"
    )


def test_test_windows_can_be_predicted_one_after_the_other(tmp_path: Path) -> None:
    module = data(write(tmp_path), predict="test")
    module.setup("predict")
    batch = module.predict_set.__getitems__(range(len(module.predict_set)))
    assert (batch["start"] + 8).tolist() == [96, 100, 104, 108, 112, 116]
    assert batch["future_observed"].all()


def test_an_irregular_series_goes_on_in_its_median_step(tmp_path: Path) -> None:
    path = write(tmp_path)
    frame = pd.read_csv(path)
    frame["date"] = np.cumsum(np.random.default_rng(0).integers(2, 9, size=len(frame)) + 0.25)
    frame.to_csv(path, index=False)
    module = data(path)
    with pytest.warns(UserWarning, match="'series' has no regular spacing"):
        module.setup("predict")
    assert module.calendar == {}
    step = float(np.median(np.diff(frame.date)))
    np.testing.assert_allclose(np.diff(np.asarray(module.window_time(0, 112), dtype=float))[-4:], step)


# State


def test_a_new_file_is_scaled_as_the_training_data_was(tmp_path: Path) -> None:
    trained = data(write(tmp_path))
    trained.setup("fit")
    path = tmp_path / "new.csv"
    frame = pd.read_csv(tmp_path / "mine.csv")
    (frame.tail(10)[["date", "c", "a", "b"]]).to_csv(path, index=False)
    new = data(path)
    new.load_state_dict(trained.state_dict())
    new.setup("predict")
    assert new.channels == trained.channels
    assert new.calendar == trained.calendar
    before, after = (next(iter(module.predict_dataloader())) for module in (trained, new))
    for name in set(before) - {"start"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)


def test_a_new_file_without_the_channels_is_refused(tmp_path: Path) -> None:
    trained, new = data(write(tmp_path)), data(write(tmp_path, name="new.csv"), channels=["a", "c"])
    new.setup("predict")
    with pytest.raises(ValueError, match="trained on channel 'b', which this data lacks; it has a, c"):
        new.load_state_dict(trained.state_dict())


def test_further_channels_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    trained, new = data(write(tmp_path), channels=["c", "a"]), data(tmp_path / "mine.csv")
    new.load_state_dict(trained.state_dict())
    with pytest.warns(UserWarning, match="not trained on are left out: b"):
        assert new.channels == ("c", "a")


def test_another_spacing_is_said(tmp_path: Path) -> None:
    trained, new = data(write(tmp_path)), data(write(tmp_path, name="new.csv", freq="D"))
    new.load_state_dict(trained.state_dict())
    with pytest.warns(UserWarning, match="trained on rows 'h' apart; these are 'D' apart"):
        new.setup("predict")
    assert list(new.calendar) == list(trained.calendar)


def test_other_covariates_than_in_training_are_refused(tmp_path: Path) -> None:
    trained, new = data(write(tmp_path), past_covariates=["b"]), data(tmp_path / "mine.csv")
    new.load_state_dict(trained.state_dict())
    assert "past_covariates=['b']" in refused(new, "predict")


# Resuming


class Recorder(LightningModule):
    """Takes note of the windows it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(batch["start"].tolist())
        return (self.weight - batch["future_values"].mean()).square()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Write a checkpoint at a hook, at a step."""

    def __init__(self, path: Path, hook: str, step: int) -> None:
        self.path, self.hook, self.step = path, hook, step
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def train(
    module: ForecastData, folder: Path, callbacks: list[Callback], ckpt: Path | None = None
) -> Recorder:
    model = Recorder()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, default_root_dir=folder, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer.fit(model, module, ckpt_path=None if ckpt is None else str(ckpt), weights_only=True)
    return model


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", 7),
        ("on_train_batch_end", 5),
        ("on_validation_end", 5),
        ("on_train_epoch_end", 10),
    ],
)
def test_a_resumed_run_sees_the_windows_that_the_whole_run_saw(tmp_path: Path, hook: str, step: int) -> None:
    path = write(tmp_path)
    torch.manual_seed(7)
    whole = train(data(path), tmp_path, [SaveAt(tmp_path / "at.ckpt", hook, step)])
    assert len(whole.seen) == 15
    assert sorted(chain(*whole.seen[:5])) == sorted(chain(*whole.seen[5:10])) == list(range(73))
    assert whole.seen[:5] != whole.seen[5:10]
    torch.manual_seed(8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*your dataloader is not resumable")
        rest = train(data(path), tmp_path, [], tmp_path / "at.ckpt")
    assert rest.seen == whole.seen[step:]
    assert torch.equal(rest.weight, whole.weight)


def test_loaders_leave_the_global_generator_alone(tmp_path: Path) -> None:
    module = data(write(tmp_path))
    module.setup("fit")
    before = torch.random.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.predict_dataloader()):
        list(loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_global_seed_gives_the_order_unless_one_is_given(tmp_path: Path) -> None:
    path = write(tmp_path)

    def order(global_seed: int, seed: int | None) -> list[int]:
        torch.manual_seed(global_seed)
        return torch.cat([batch["start"] for batch in data(path, seed=seed).train_dataloader()]).tolist()

    assert order(1, None) == order(1, None) != order(2, None)
    assert order(1, 5) == order(2, 5)


def test_resuming_with_another_batch_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    train(data(path), tmp_path, [SaveAt(tmp_path / "at.ckpt", "on_train_batch_end", 2)])
    with pytest.raises(ValueError, match="the training data has batch_size=8 but had batch_size=16"):
        train(data(path, batch_size=8), tmp_path, [], tmp_path / "at.ckpt")


def test_two_workers_give_the_same_batches(tmp_path: Path) -> None:
    path = write(tmp_path)
    alone, two = (data(path, seed=1, num_workers=n).train_dataloader() for n in (0, 2))
    for one, other in zip(alone, two, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_checkpoint_loads_as_plain_values(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "run", filename="best")
    module = data(write(tmp_path))
    Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver], num_sanity_val_steps=0, limit_val_batches=0, default_root_dir=tmp_path,
    ).fit(Recorder(), module)  # fmt: skip
    state = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["ForecastData"]
    assert state == module.state_dict()
    assert state["channels"] == COLUMNS


# Refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"source": "mars"}, "source='mars' is unknown; choose one of co2, etth1"),
        ({"scale": "rows"}, "scale='rows' is unknown"),
        ({"regular": "yes"}, "regular='yes' is unknown"),
        ({"predict": "past"}, "predict='past' is unknown"),
        ({"lookback": 0}, "lookback=0 must be at least 1"),
        ({"horizon": 0}, "horizon=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
        ({"eval_stride": 0}, "eval_stride=0 must be at least 1"),
        ({"source": "file"}, "source='file' needs path="),
        ({"source": "co2", "path": "x.csv"}, "takes no path, but path='x.csv' was given"),
    ],
)
def test_unknown_settings_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ForecastData(**options)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, rows=11)
    assert refused(data(path)) == "'series' has 11 rows, but lookback=8 and horizon=4 need at least 12"
    assert refused(data(path, lookback=12), "predict") == (
        "'series' has 11 rows, but forecasts with lookback=12 need at least 12"
    )


def test_dates_beyond_the_file_leave_no_window(tmp_path: Path) -> None:
    told = refused(data(write(tmp_path), split=["2031-01-01", "2032-01-01"]))
    assert "the val part has 0 rows" in told


@pytest.mark.parametrize(("split", "part"), [([0.05, 0.85, 0.1], "train"), ([0.8, 0.02, 0.18], "val")])
def test_a_part_too_short_for_a_window_is_refused(tmp_path: Path, split: list[float], part: str) -> None:
    assert f"the {part} part has" in refused(data(write(tmp_path), split=split))


def test_a_short_item_is_refused_or_left_out(tmp_path: Path) -> None:
    frame = pd.read_csv(write(tmp_path))
    path = tmp_path / "long.csv"
    pd.concat([frame.assign(item="x"), frame.head(5).assign(item="y")]).to_csv(path, index=False)
    assert "'y' has 5 rows" in refused(data(path, item_column="item"))
    module = data(path, item_column="item", skip_short=True)
    module.setup("fit")
    assert [one.item for one in module.series] == ["x"]


def test_a_constant_channel_is_said_once(tmp_path: Path) -> None:
    module = data(write(tmp_path, b=4.0))
    with pytest.warns(UserWarning, match="so centred but not scaled: b"):
        module.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.setup("test")
        assert (module.train_set.table.values[:, 1] == 0).all()


def test_an_unobserved_channel_is_refused(tmp_path: Path) -> None:
    empty = np.where(np.arange(120) < 100, np.nan, 1.0)
    assert "channel 'b' has no observed value in the 84 training rows" in refused(
        data(write(tmp_path, b=empty))
    )
    assert "channel 'b' has no value in any row" in refused(data(write(tmp_path, b=np.nan)))


def test_an_unknown_channel_of_a_public_set_is_refused() -> None:
    if not (REAL / "ili").exists():
        pytest.skip("ILI is not here")
    module = ForecastData("ili", str(REAL / "ili"), channels=["flu"], lookback=36, horizon=24)
    assert "channel 'flu' is not in the file" in refused(module)


# Configurations

CONFIGS = files("mainstem") / "configs"


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "forecasting").iterdir()))
def test_a_shipped_configuration_fits_the_constructors(name: str) -> None:
    config: Any = OmegaConf.load(str(CONFIGS / "forecasting" / name))
    given = OmegaConf.to_container(config, resolve=True)
    assert isinstance(given, dict)
    options, model = given["data"]["init_args"], given["model"]["init_args"]
    if options["source"] == "file":
        options["path"] = "mine.csv"
    module = ForecastData(**options)
    assert (model["lookback"], model["horizon"]) == (module.lookback, module.horizon)
    assert {*model} <= {*inspect.signature(Forecaster.__init__).parameters}
    BackboneConfig(**model["backbone"])


def test_every_mixer_has_its_configuration() -> None:
    names = {path.name.partition(".")[0] for path in (CONFIGS / "mixers").iterdir()}
    assert names == {*MIXERS}
    for name in names:
        config = OmegaConf.load(str(CONFIGS / "mixers" / f"{name}.yaml"))
        assert config == {"model": {"init_args": {"backbone": {"mixer": name}}}}
