"""Windows are the naive slices, the scaler knows the training rows only, splits are the published ones."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.core.training.data import EpochSampler
from mainstem.domains.forecasting.records import Series, relative_steps
from mainstem.domains.forecasting.scaling import Scaler, Scalers, constant_channels
from mainstem.domains.forecasting.splits import split_rows
from mainstem.domains.forecasting.windows import SeriesTable, WindowDataset, window_starts

CALENDAR = ("hour_of_day", "day_of_week")


def make_series(rows: int, channels: int = 2, item: str = "a", seed: int = 0, missing: float = 0.2) -> Series:
    random = np.random.default_rng(seed)
    values = random.normal(3, 2, size=(rows, channels)).astype(np.float32)
    values[random.random(values.shape) < missing] = np.nan
    values[0] = 1.0
    steps = pd.to_timedelta(np.cumsum(random.integers(1, 4, size=rows)), unit="h")
    time = pd.DatetimeIndex(pd.Timestamp("2024-02-27") + steps)
    return Series(
        values=values,
        channels=tuple(f"c{i}" for i in range(channels)),
        time=time,
        dt=relative_steps(time),
        item=item,
        known=random.normal(size=(rows, 1)).astype(np.float32),
        known_names=("k",),
        past=random.normal(size=(rows, 2)).astype(np.float32),
        past_names=("p", "q"),
        static=np.array([seed], dtype=np.float32),
        static_names=("s",),
    )


def plain_scalers(series: Series) -> Scalers:
    return Scalers(
        values=Scaler.identity(len(series.channels)),
        known=Scaler.identity(len(series.known_names)),
        past=Scaler.identity(len(series.past_names)),
        static=Scaler.identity(len(series.static_names)),
    )


def make_dataset(
    lengths: list[int], lookback: int, horizon: int, *, begin: int = 0, stride: int = 1
) -> tuple[list[Series], WindowDataset]:
    series = [make_series(rows, item=str(i), seed=i) for i, rows in enumerate(lengths)]
    table = SeriesTable(series, plain_scalers(series[0]), calendar=CALENDAR)
    ranges = [(min(begin, rows), rows) for rows in lengths]
    return series, WindowDataset(table, ranges, lookback=lookback, horizon=horizon, stride=stride)


# Windows


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    lookback=st.integers(1, 6),
    horizon=st.integers(1, 5),
    begin=st.integers(0, 12),
    stride=st.integers(1, 4),
)
def test_every_window_is_the_naive_slice(
    lengths: list[int], lookback: int, horizon: int, begin: int, stride: int
) -> None:
    series, dataset = make_dataset(lengths, lookback, horizon, begin=begin, stride=stride)
    expected = [
        (item, start)
        for item, rows in enumerate(lengths)
        for start in range(max(min(begin, rows) - lookback, 0), rows - lookback - horizon + 1, stride)
    ]
    assert len(dataset) == len(expected)
    if not expected:
        return
    batch = dataset.__getitems__(list(range(len(dataset))))
    for row, (item, start) in enumerate(expected):
        one, middle, stop = series[item], start + lookback, start + lookback + horizon
        assert (int(batch["item"][row]), int(batch["start"][row])) == (item, start)
        for name, rows in (("past", slice(start, middle)), ("future", slice(middle, stop))):
            observed = ~np.isnan(one.values[rows])
            np.testing.assert_array_equal(batch[f"{name}_observed"][row].numpy(), observed)
            np.testing.assert_array_equal(
                batch[f"{name}_values"][row].numpy(), np.where(observed, one.values[rows], 0)
            )
        whole = slice(start, stop)
        np.testing.assert_array_equal(batch["dt"][row].numpy(), one.dt[whole])
        np.testing.assert_array_equal(batch["known_covariates"][row].numpy(), one.known[whole])
        np.testing.assert_array_equal(batch["past_covariates"][row].numpy(), one.past[start:middle])
        np.testing.assert_array_equal(batch["static"][row].numpy(), one.static)
        assert isinstance(one.time, pd.DatetimeIndex)
        np.testing.assert_array_equal(batch["calendar"][row, :, 0].numpy(), one.time.hour[whole])


def test_one_window_is_a_row_of_the_batch() -> None:
    _, dataset = make_dataset([20, 30], 4, 3)
    batch = dataset.__getitems__([5, 20, 5])
    for row, index in enumerate([5, 20, 5]):
        for name, tensor in dataset[index].items():
            assert torch.equal(tensor, batch[name][row])
    assert torch.equal(dataset[-1]["start"], dataset[len(dataset) - 1]["start"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_shapes_and_types_of_a_batch() -> None:
    _, dataset = make_dataset([30, 40], 6, 4)
    batch = dataset.__getitems__([0, 7, 40])
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
    assert shapes == {
        "past_values": ((3, 6, 2), torch.float32),
        "past_observed": ((3, 6, 2), torch.bool),
        "future_values": ((3, 4, 2), torch.float32),
        "future_observed": ((3, 4, 2), torch.bool),
        "dt": ((3, 10), torch.float32),
        "calendar": ((3, 10, 2), torch.int64),
        "past_covariates": ((3, 6, 2), torch.float32),
        "known_covariates": ((3, 10, 1), torch.float32),
        "static": ((3, 1), torch.float32),
        "item": ((3,), torch.int64),
        "start": ((3,), torch.int64),
    }


@pytest.mark.parametrize("stride", [1, 3])
def test_views_hold_the_same_windows_without_a_copy(stride: int) -> None:
    _, dataset = make_dataset([20, 5, 30], 6, 4, begin=9, stride=stride)
    views = dataset.windows_as_view()
    batch = dataset.__getitems__(range(len(dataset)))
    assert len(views) == 2
    for index, name in ((0, "values"), (1, "observed")):
        joined = torch.cat([view[index] for view in views])
        assert torch.equal(joined, torch.cat([batch[f"past_{name}"], batch[f"future_{name}"]], 1))
    storage = dataset.table.values.untyped_storage().data_ptr()
    assert all(values.untyped_storage().data_ptr() == storage for values, _ in views)


def test_two_splits_share_one_table() -> None:
    _, dataset = make_dataset([40], 6, 4)
    other = WindowDataset(dataset.table, [(20, 40)], lookback=6, horizon=4)
    assert other.table is dataset.table


@pytest.mark.parametrize("lookback", [96, 336, 720])
@pytest.mark.parametrize("horizon", [96, 192, 336, 720])
def test_ett_has_the_published_number_of_windows(lookback: int, horizon: int) -> None:
    [train, val, test] = [
        len(window_starts(span, lookback, horizon)) for span in ((0, 8640), (8640, 11520), (11520, 14400))
    ]
    assert train == 8640 - lookback - horizon + 1
    assert val == test == 2880 - horizon + 1
    if (lookback, horizon) == (96, 96):
        assert (train, val, test) == (8449, 2785, 2785)


# Splits


def test_fractions_are_cut_as_in_the_published_protocol() -> None:
    for rows, borders in ((7588, (5311, 6071)), (966, (676, 773)), (52696, (36887, 42157))):
        series = make_series(rows, channels=1)
        splits = split_rows([series], [0.7, 0.1, 0.2])
        assert (splits.train, splits.val, splits.test) == (
            [(0, borders[0])],
            [borders],
            [(borders[1], rows)],
        )


def test_official_borders_rows_and_dates_agree() -> None:
    time = pd.date_range("2016-07-01", periods=17420, freq="h")
    values = np.zeros((17420, 1), dtype=np.float32)
    series = Series(values=values, channels=("x",), time=time, dt=relative_steps(time))
    official = split_rows([series], "ett-hour")
    assert official.test == [(11520, 14400)]
    assert split_rows([series], [8640, 11520, 14400]) == official
    assert split_rows([series], [str(time[8640]), str(time[11520]), str(time[14400])]) == official
    assert split_rows([series], [8640, 11520]).test == [(11520, 17420)]


def test_ett_minute_borders_are_four_times_as_far() -> None:
    time = pd.date_range("2016-07-01", periods=69680, freq="15min")
    series = Series(
        values=np.zeros((69680, 1), dtype=np.float32), channels=("x",), time=time, dt=relative_steps(time)
    )
    assert split_rows([series], "ett-minute").test == [(46080, 57600)]


def test_fractions_go_by_the_length_of_each_series() -> None:
    splits = split_rows([make_series(100), make_series(50)], [0.6, 0.2, 0.2])
    assert splits.val == [(60, 80), (30, 40)]


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ([0.5, 0.1, 0.2], "must sum to 1, not 0.8"),
        ([0.5, 0.5], "is not understood"),
        ([5], "is not understood"),
        ("half", "'ett-hour', 'ett-minute'"),
        ("ett-hour", "needs 14400 rows, but 'a' has 100"),
        ([80, 60], "do not rise within its 100 rows"),
        ([60, 80, 120], "do not rise within its 100 rows"),
        (["2024-03-02", "2024-03-01"], "do not rise within its 100 rows"),
        (["soon", "later"], "is not understood"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: list[float] | list[str] | str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        split_rows([make_series(100)], split)
    assert "\n" not in str(error.value)


def test_dates_on_a_numeric_time_are_refused() -> None:
    time = np.arange(10, dtype=np.float64)
    values = np.zeros((10, 1), dtype=np.float32)
    series = Series(values=values, channels=("x",), time=time, dt=relative_steps(time))
    with pytest.raises(ValueError, match="has plain numbers as time"):
        split_rows([series], ["2024-01-01", "2024-02-01"])


# Scaler


def test_the_scaler_is_the_standard_scaler_of_the_observed_training_rows() -> None:
    series = make_series(200, channels=3)
    scaler = Scaler.fit([series.values[:120]], names=series.channels)
    rows = series.values[:120].astype(np.float64)
    np.testing.assert_allclose(scaler.mean[0].numpy(), np.nanmean(rows, axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaler.scale[0].numpy(), np.nanstd(rows, axis=0, ddof=0), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(border=st.integers(5, 45), seed=st.integers(0, 1000), by=st.sampled_from(["channel", "item"]))
def test_rows_after_the_border_change_nothing(border: int, seed: int, by: str) -> None:
    series = [make_series(50, item=item, seed=seed + i) for i, item in enumerate("ab")]
    before = Scalers.fit(series, [(0, border)] * 2, by)  # type: ignore[arg-type]
    for one in series:
        one.values[border:] = 1e9
        one.known[border:] = -1e9
        one.past[border:] = np.nan
    after = Scalers.fit(series, [(0, border)] * 2, by)  # type: ignore[arg-type]
    assert after.state_dict() == before.state_dict()


@pytest.mark.parametrize("by", ["channel", "item", "none"])
def test_scaling_is_undone_and_survives_plain_values(by: str) -> None:
    parts = [make_series(60, seed=i, missing=0).values * (3**i) for i in range(3)]
    fitted = Scaler.fit(parts, by=by, items="xyz", names=("c0", "c1"))  # type: ignore[arg-type]
    scaler = Scaler.from_state_dict(fitted.state_dict())
    item = torch.tensor([2, 0, 1])
    values = torch.stack([torch.tensor(parts[int(i)]) for i in item])
    scaled = scaler.transform(values, item)
    torch.testing.assert_close(scaler.inverse(scaled, item), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaler.transform(values[0], 2), scaled[0], rtol=0, atol=0)
    differences = scaler.inverse_scale(scaled[:, 1:] - scaled[:, :-1], item)
    torch.testing.assert_close(differences, values[:, 1:] - values[:, :-1], rtol=1e-4, atol=1e-4)
    if by == "item":
        torch.testing.assert_close(scaled.mean(1), torch.zeros(3, 2), rtol=0, atol=1e-5)
    if by == "none":
        assert torch.equal(scaled, values)


def test_values_far_from_zero_keep_their_precision() -> None:
    values = (2.0**20 + np.arange(64) / 8).astype(np.float32)[:, None]
    scaled = Scaler.fit([values]).transform(torch.tensor(values))
    exact = (values.astype(np.float64) - values.mean(dtype=np.float64)) / values.std(dtype=np.float64)
    np.testing.assert_allclose(scaled.numpy(), exact, rtol=1e-6, atol=1e-6)


def test_a_constant_channel_has_scale_one() -> None:
    values = np.array([[0.1, 1.0], [0.1, 2.0], [np.nan, 3.0]], dtype=np.float32)
    scaler = Scaler.fit([values], names=("flat", "rising"))
    assert scaler.scale[0, 0] == 1
    assert constant_channels([values], ("flat", "rising")) == ["flat"]
    assert scaler.transform(torch.tensor(values))[0, 0] == 0


def test_a_channel_unseen_in_training_is_refused() -> None:
    values = np.full((10, 2), np.nan, dtype=np.float32)
    values[:, 0] = 1
    with pytest.raises(ValueError, match="channel 'y' has no observed value in the 10 training rows"):
        Scaler.fit([values], names=("x", "y"))
    with pytest.raises(ValueError, match="channel 'y' of item 'b' has no observed"):
        Scaler.fit([values[:, :1].repeat(2, 1), values], by="item", items="ab", names=("x", "y"))


def test_items_are_found_by_name_and_unknown_ones_refused() -> None:
    parts = [make_series(30, seed=i).values for i in range(3)]
    scaler = Scaler.fit(parts, by="item", items="abc")
    turned = scaler.for_items(["c", "a"])
    assert torch.equal(turned.mean, scaler.mean[[2, 0]])
    with pytest.raises(ValueError, match="item 'd' is not in the training data"):
        scaler.for_items(["a", "d"])


# Order of training


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first, second = EpochSampler(50, seed=3), EpochSampler(50, seed=3)
    list(second)
    torch.manual_seed(99)
    for sampler in (first, second):
        sampler.set_epoch(4)
    assert list(first) == list(second)
    assert sorted(first) == list(range(50))
    second.set_epoch(5)
    assert list(first) != list(second)
    assert list(EpochSampler(50, seed=4, epoch=4)) != list(first)


def test_a_skip_holds_for_its_epoch_only() -> None:
    sampler = EpochSampler(20, seed=0, epoch=2)
    whole = list(sampler)
    sampler.skip(8, epoch=2)
    assert list(sampler) == whole[8:]
    sampler.set_epoch(3)
    assert len(list(sampler)) == 20
