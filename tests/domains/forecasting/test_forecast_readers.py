"""Files in their layouts, what is guessed, what is repaired and said, and what is refused."""

import gzip
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mainstem.domains.forecasting.calendar import CALENDAR_SIZES, calendar_names, calendar_positions
from mainstem.domains.forecasting.columns import Columns
from mainstem.domains.forecasting.files import read_table
from mainstem.domains.forecasting.readers import read_series
from mainstem.domains.forecasting.sources import PUBLIC, embedded_co2, read_public
from mainstem.domains.forecasting.timestamps import continue_time, find_frequency, full_grid

REAL = Path(__file__).parents[4] / "shared" / "data" / "forecasting"


def table(rows: int = 40, channels: int = 2, freq: str = "h", start: str = "2024-01-01") -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(rows, channels)).round(3)
    frame = pd.DataFrame(values, columns=[f"c{i}" for i in range(channels)])
    frame.insert(0, "date", pd.date_range(start, periods=rows, freq=freq).astype(str))
    return frame


def refused(frame: pd.DataFrame, columns: Columns | None = None, **options: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (each test looks at the sentence)
        read_series(frame, columns, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Files


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "txt", "tsv", "parquet"])
def test_every_file_format_gives_the_same_series(tmp_path: Path, ending: str) -> None:
    frame = table()
    path = tmp_path / f"mine.{ending}"
    if ending == "parquet":
        frame.assign(date=pd.to_datetime(frame.date)).set_index("date").to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ";" if ending == "txt" else ",")
    [series] = read_series(read_table(path))
    np.testing.assert_array_equal(series.values, frame[["c0", "c1"]].to_numpy(np.float32))
    assert series.frequency == "h"
    assert series.channels == ("c0", "c1")


def test_latin_1_headers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weather.csv"
    path.write_bytes(table().rename(columns={"c0": "SWDR (W/m²)"}).to_csv(index=False).encode("latin-1"))
    assert read_series(read_table(path))[0].channels == ("SWDR (W/m²)", "c1")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.csv", None, "does not exist"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"date,x\n", "has no rows"),
        ("wide.csv", b"date,x\n2024-01-01,1,2\n2024-01-02,1,2\n", "more fields than its header"),
        ("odd.csv", b"date,x\n2024-01-01,1\n2024-01-02,1,2\n", "cannot be read as CSV"),
        ("data.xlsx", b"x", "accepted are .csv, .txt, .tsv (also .gz) and .parquet"),
        ("bad.parquet", b"x", "cannot be read as Parquet"),
        ("bad.csv.gz", b"x", "cannot be read as CSV"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"path='{path}'") as error:
        read_table(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# Columns


def test_long_and_wide_give_the_same_values() -> None:
    wide = table(channels=3)
    long = wide.melt("date", var_name="sensor", value_name="load").sample(frac=1, random_state=0)
    [one] = read_series(wide)
    with pytest.warns(UserWarning, match="the rows of 3 items were not in time order"):
        many = sorted(read_series(long, Columns(item="sensor")), key=lambda series: series.item)
    for channel, series in enumerate(many):
        assert (series.item, series.channels) == (f"c{channel}", ("load",))
        np.testing.assert_array_equal(series.values[:, 0], one.values[:, channel])
        np.testing.assert_array_equal(series.dt, one.dt)


def test_time_column_is_found_by_name_then_by_content() -> None:
    frame = table()
    assert read_series(frame.rename(columns={"date": "Timestamp"}))[0].has_dates
    assert read_series(frame.rename(columns={"date": "wann"})[["c0", "wann", "c1"]])[0].channels == (
        "c0",
        "c1",
    )
    numbered = read_series(frame[["c0"]], Columns(time="row"))[0]
    assert not numbered.has_dates
    assert numbered.frequency == 1.0


def test_eight_digit_numbers_are_dates_and_other_numbers_are_not() -> None:
    frame = table(freq="D", start="2024-01-20")
    days = frame.assign(date=pd.to_datetime(frame.date).dt.strftime("%Y%m%d").astype(int))
    assert read_series(days)[0].frequency == "D"
    [series] = read_series(frame.assign(date=np.arange(40) * 0.5))
    assert series.frequency == 0.5
    assert not series.has_dates


def test_covariates_are_taken_out_of_the_channels() -> None:
    frame = table(channels=4).assign(site=3.0)
    columns = Columns(known=["c1"], past=["c2"], static=["site"])
    [series] = read_series(frame, columns)
    assert (series.channels, series.known_names, series.past_names) == (("c0", "c3"), ("c1",), ("c2",))
    np.testing.assert_array_equal(series.static, [3.0])
    np.testing.assert_array_equal(series.known[:, 0], frame.c1.to_numpy(np.float32))


def test_rows_with_known_covariates_after_the_last_target_are_the_future() -> None:
    frame = table(channels=2)
    frame.loc[30:, "c0"] = np.nan
    [series] = read_series(frame, Columns(known=["c1"]))
    assert len(series) == 30
    assert series.future_time is not None
    assert str(series.future_time[0]) == "2024-01-02 06:00:00"
    np.testing.assert_array_equal(series.future_known[:, 0], frame.c1[30:].to_numpy(np.float32))


# Missing values, gaps, order


def test_empty_cells_are_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    path.write_text("date,a,b\n2024-01-01,1,\n2024-01-02,NaN,5\n2024-01-03, ,6\n2024-01-04,4,7\n")
    [series] = read_series(read_table(path))
    np.testing.assert_array_equal(np.isnan(series.values), [[0, 1], [1, 0], [1, 0], [0, 0]])


def test_rows_missing_from_a_grid_become_missing_values() -> None:
    frame = table().drop(index=[5, 6, 20])
    with pytest.warns(UserWarning, match="3 rows are missing from the regular grid") as said:
        [series] = read_series(frame)
    assert len(said) == 1
    assert len(series) == 40
    assert set(np.flatnonzero(np.isnan(series.values).all(axis=1))) == {5, 6, 20}
    np.testing.assert_array_equal(series.dt, np.ones(40))


def test_rows_missing_from_a_grid_stay_away_when_asked() -> None:
    [series] = read_series(table().drop(index=[5, 6, 20]), regular="never")
    assert len(series) == 37
    assert series.dt[5] == 3
    assert series.dt[18] == 2
    assert series.dt.sum() == 40


def test_irregular_times_keep_their_distances() -> None:
    seconds = np.cumsum([0, 7.3, 1.9, 30.0, 2.2, 11.1])
    frame = table(6).assign(date=pd.Timestamp("2024-01-01") + pd.to_timedelta(seconds, unit="s"))
    [series] = read_series(frame)
    assert series.frequency is None
    np.testing.assert_allclose(series.dt[1:], np.diff(seconds) / 7.3, rtol=1e-6)


def test_unsorted_rows_are_sorted_and_that_is_said_once() -> None:
    frame = table()
    with pytest.warns(
        UserWarning, match="the rows of the file were not in time order and were sorted"
    ) as said:
        [series] = read_series(frame.iloc[::-1])
    assert len(said) == 1
    np.testing.assert_array_equal(series.values, read_series(frame)[0].values)


# Time zones


def local_hours(count: int = 60, freq: str = "h") -> pd.DataFrame:
    time = pd.date_range("2024-10-26", periods=count, freq=freq, tz="Europe/Berlin")
    return pd.DataFrame({"date": time.tz_localize(None).astype(str), "x": np.arange(count, dtype=float)})


@pytest.mark.parametrize("freq", ["h", "30min"])
def test_clock_times_with_a_zone_have_even_steps_over_the_change(freq: str) -> None:
    [series] = read_series(local_hours(freq=freq), timezone="Europe/Berlin")
    np.testing.assert_array_equal(series.dt, np.ones(60))
    assert series.frequency == freq


def test_the_hour_of_the_day_is_the_clocks() -> None:
    [series] = read_series(local_hours(), timezone="Europe/Berlin")
    hours = calendar_positions(series.time, ("hour_of_day",))[:, 0]
    assert list(hours[25:29]) == [1, 2, 2, 3]


def test_the_repeated_hour_of_autumn_without_a_zone_is_refused_with_the_remedy() -> None:
    assert "timezone='Area/City'" in refused(local_hours())


def test_mixed_offsets_are_read_as_utc_or_in_the_zone_asked_for() -> None:
    time = pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")
    frame = pd.DataFrame({"date": [str(stamp) for stamp in time], "x": 1.0})
    with pytest.warns(UserWarning, match="mixes UTC offsets"):
        [utc] = read_series(frame)
    [local] = read_series(frame, timezone="Europe/Berlin")
    assert str(utc.time[0]) == "2024-03-29 23:00:00+00:00"
    assert list(local.time) == list(time)
    np.testing.assert_array_equal(local.dt, np.ones(60))


def test_a_clock_time_that_does_not_exist_is_refused() -> None:
    assert "do not fit timezone='Europe/Berlin'" in refused(
        table(freq="h", start="2024-03-31"), timezone="Europe/Berlin"
    )


# Refusals


def test_an_empty_time_cell_is_refused() -> None:
    frame = table()
    frame.loc[[3, 9], "date"] = None
    assert refused(frame) == (
        "time column 'date' is empty in data row 4 and in 1 more; every row needs a time stamp"
    )


def test_an_unreadable_time_is_refused() -> None:
    frame = table()
    frame.loc[3, "date"] = "yesterday"
    assert "holds 'yesterday' in data row 4, which cannot be read as a time stamp" in refused(frame)
    assert "time_format='%d.%m.%Y'" in refused(frame, time_format="%d.%m.%Y")


def test_times_without_a_common_format_are_refused_and_read_with_one() -> None:
    hours = table().assign(date=[f"{i // 60:02}h{i % 60:02}" for i in range(40)])
    assert "holds '00h00' in data row 1, which cannot be read" in refused(hours)
    assert read_series(hours, time_format="%Hh%M")[0].frequency == "min"


def test_a_repeated_time_stamp_is_refused() -> None:
    frame = table()
    frame.loc[7, "date"] = frame.date[6]
    told = refused(frame)
    assert told.startswith("time stamp 2024-01-01 06:00:00 occurs twice (data rows 7 and 8); ")
    assert "item_column" in told


def test_a_repeated_time_stamp_names_its_item() -> None:
    long = table(channels=2).melt("date", var_name="sensor", value_name="load")
    long.loc[45, "date"] = long.date[44]
    assert "of item 'c1' occurs twice (data rows 45 and 46)" in refused(long, Columns(item="sensor"))


def test_a_text_column_is_refused() -> None:
    frame = table().astype({"c1": object})
    frame.loc[4, "c1"] = "broken"
    assert refused(frame).startswith("column 'c1' is not numeric: data row 5 holds 'broken'; ")
    assert read_series(frame, Columns(channels=["c0"]))[0].channels == ("c0",)


def test_an_infinite_value_is_refused() -> None:
    frame = table()
    frame.loc[4, "c1"] = -np.inf
    assert "column 'c1' is infinite in data row 5" in refused(frame)


def test_a_channel_without_values_is_refused() -> None:
    assert "channel 'c1' has no value in any row" in refused(table().assign(c1=np.nan))


@pytest.mark.parametrize(
    "columns",
    [Columns(time="when"), Columns(channels=["when"]), Columns(item="when"), Columns(known=["when"])],
)
def test_an_unknown_column_is_refused_with_those_that_are_there(columns: Columns) -> None:
    assert refused(table(), columns) == "column 'when' is not in the file, which has 'date', 'c0', 'c1'"


def test_a_file_without_a_time_column_is_refused() -> None:
    assert "time_column='row'" in refused(table()[["c0", "c1"]])


def test_a_column_with_two_roles_is_refused() -> None:
    assert "column 'c0' is given two roles" in refused(table(), Columns(channels=["c0"], known=["c0"]))


def test_a_file_of_covariates_only_is_refused() -> None:
    assert "no column is left for channels" in refused(table(), Columns(known=["c0", "c1"]))


def test_covariates_with_gaps_are_refused() -> None:
    frame = table()
    frame.loc[4, "c1"] = np.nan
    assert "known_covariates column 'c1'" in refused(frame, Columns(known=["c1"]))
    assert "past_covariates column 'c1'" in refused(frame, Columns(past=["c1"]))
    assert "static_covariates column 'c1' changes" in refused(table(), Columns(static=["c1"]))


def test_an_empty_item_is_refused() -> None:
    long = table(channels=2).melt("date", var_name="sensor", value_name="load")
    long.loc[3, "sensor"] = None
    assert "item column 'sensor' is empty in data row 4" in refused(long, Columns(item="sensor"))


def test_a_zone_on_plain_numbers_is_refused() -> None:
    assert "needs dates" in refused(table().assign(date=np.arange(40)), timezone="Europe/Berlin")


# Frequencies


@pytest.mark.parametrize(
    ("freq", "start"),
    [("10min", "2024-01-01"), ("h", "2024-01-01"), ("D", "2024-01-01"), ("B", "2024-01-01"),
     ("W-TUE", "2024-01-02"),
     ("MS", "2024-01-01"), ("ME", "2024-01-31"), ("QE-DEC", "2024-03-31"), ("YS-JAN", "2000-01-01")],
)  # fmt: skip
@pytest.mark.parametrize("holes", [False, True])
def test_the_future_goes_on_in_the_series_own_calendar(freq: str, start: str, holes: bool) -> None:
    time = pd.date_range(start, periods=50, freq=freq)
    kept = time[:40].delete([7, 8, 21]) if holes else time[:40]
    frequency = find_frequency(kept)
    assert frequency is not None
    following = continue_time(kept, frequency, 10)
    assert list(following) == list(time[40:])
    grid = full_grid(kept, frequency)
    assert grid is not None
    assert list(grid) == list(time[:40])


def test_the_same_day_of_every_month_goes_on_in_months() -> None:
    time = pd.DatetimeIndex([pd.Timestamp("2024-01-15") + pd.DateOffset(months=i) for i in range(14)])
    assert list(continue_time(time[:12], find_frequency(time[:12]), 2)) == list(time[12:])


@pytest.mark.parametrize(("freq", "start"), [("h", "2024-03-30 12:00"), ("D", "2024-03-20")])
def test_the_future_crosses_the_change_of_the_clock(freq: str, start: str) -> None:
    time = pd.date_range(start, periods=40, freq=freq, tz="Europe/Berlin")
    assert list(continue_time(time[:8], find_frequency(time[:8]), 32)) == list(time[8:])


def test_numbers_go_on_in_their_step() -> None:
    time = np.array([0.0, 0.5, 1.0, 2.0, 2.5])
    assert find_frequency(time) == 0.5
    np.testing.assert_array_equal(continue_time(time, 0.5, 2), [3.0, 3.5])
    assert find_frequency(np.array([0.0, 0.5, 1.1, 2.0])) is None


@pytest.mark.parametrize(
    ("freq", "names"),
    [("10min", "minute_of_hour hour_of_day day_of_week month_of_year"),
     ("h", "hour_of_day day_of_week day_of_month month_of_year"),
     ("D", "day_of_week day_of_month month_of_year"),
     ("W-SAT", "week_of_year month_of_year"), ("MS", "month_of_year"), ("YS", "")],
)  # fmt: skip
def test_calendar_positions_fit_their_sizes(freq: str, names: str) -> None:
    time = (
        pd.date_range("2020-01-01", periods=900, freq=freq)[:900]
        if freq != "YS"
        else pd.date_range("1900", periods=9, freq="YS")
    )
    assert calendar_names(time) == tuple(names.split())
    positions = calendar_positions(time, calendar_names(time))
    sizes = [CALENDAR_SIZES[name] for name in calendar_names(time)]
    assert positions.shape == (len(time), len(sizes))
    assert (positions >= 0).all()
    assert (positions < np.array(sizes, dtype=np.int64)).all()


# Public sets


def public_file(folder: Path, name: str, layout: str, rows: int = 60) -> Path:
    channels = 3
    values = np.random.default_rng(1).normal(size=(rows, channels)).round(4)
    stem = PUBLIC[name].files[0].partition(".")[0]
    if layout == "csv":
        frame = pd.DataFrame(values, columns=["a", "b", "OT"])
        frame.insert(0, "date", pd.date_range("2016-07-01", periods=rows, freq="h").astype(str))
        text, path = frame.to_csv(index=False), folder / f"{stem}.csv"
    else:
        text, path = pd.DataFrame(values).to_csv(index=False, header=False), folder / f"{stem}.txt.gz"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("layout", ["csv", "txt"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_public_layouts_are_read(tmp_path: Path, layout: str, given: str) -> None:
    path = public_file(tmp_path, "exchange", layout)
    with pytest.warns(UserWarning, match="published with 7588 rows of 8 channels, but this file has 60 of 3"):
        [series] = read_public("exchange", path if given == "file" else tmp_path)
    assert series.values.shape == (60, 3)
    assert series.has_dates
    if layout == "txt":
        assert str(series.time[0]) == "1990-01-01 00:00:00"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_missing_public_file_says_where_it_is_to_be_had(tmp_path: Path, name: str) -> None:
    for path in (None, tmp_path, tmp_path / "nowhere.csv"):
        with pytest.raises(
            FileNotFoundError, match=f"source='{name}' reads {PUBLIC[name].files[0]}"
        ) as error:
            read_public(name, path)
        assert "https://" in str(error.value)


def test_another_etth1_is_told_by_its_checksum(tmp_path: Path) -> None:
    path = public_file(tmp_path, "etth1", "csv")
    with pytest.warns(UserWarning, match=r"is not the published|is published with") as said:
        read_public("etth1", path)
    assert "is not the published ETTh1.csv" in str(said[0].message)
    assert "this file has 60 of 3" in str(said[1].message)


def test_co2_has_its_missing_weeks() -> None:
    [series] = embedded_co2()
    assert series.values.shape == (2284, 1)
    assert np.isnan(series.values).sum() == 59
    assert series.frequency == "W-SAT"


@pytest.mark.parametrize(
    ("name", "file"),
    [("etth1", "ett/ETTh1.csv.gz"), ("weather", "weather/weather.csv.gz"),
     ("ili", "ili/national_illness.csv"),
     ("exchange", "exchange/exchange_rate.csv.gz"), ("exchange", "exchange/exchange_rate.txt.gz")],
)  # fmt: skip
def test_the_real_public_files_are_the_published_ones(name: str, file: str) -> None:
    if not (REAL / file).exists():
        pytest.skip(f"{file} is not here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [series] = read_public(name, REAL / file)
    assert series.values.shape == (PUBLIC[name].rows, PUBLIC[name].channels)
    assert not np.isnan(series.values).any()
