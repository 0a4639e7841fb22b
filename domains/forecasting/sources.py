"""The embedded series and the public benchmark files."""

import gzip
import hashlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from .columns import Columns
from .files import first_line, read_table
from .readers import read_series
from .records import Series

Source = Literal[
    "co2", "etth1", "etth2", "ettm1", "ettm2", "weather", "ecl", "traffic", "exchange", "solar", "ili", "file"
]
SOURCES: tuple[str, ...] = get_args(Source)

_ETT = "https://github.com/zhouhaoyi/ETDataset (folder ETT-small)"
_TSLIB = "https://huggingface.co/datasets/thuml/Time-Series-Library"
_LAI = "https://github.com/laiguokun/multivariate-time-series-data"


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A benchmark file: its names, size, home, and the time of its rows if it gives none."""

    files: tuple[str, ...]
    rows: int
    channels: int
    home: str
    split: str | tuple[float, ...] = (0.7, 0.1, 0.2)
    start: str = ""
    step: str = ""
    md5: str = ""


PUBLIC: dict[str, PublicSet] = {
    "etth1": PublicSet(files=("ETTh1.csv",), rows=17420, channels=7, home=_ETT, split="ett-hour",
                       md5="8381763947c85f4be6ac456c508460d6"),
    "etth2": PublicSet(files=("ETTh2.csv",), rows=17420, channels=7, home=_ETT, split="ett-hour",
                       md5="51a229a3fc13579dd939364fefe9c7ab"),
    "ettm1": PublicSet(files=("ETTm1.csv",), rows=69680, channels=7, home=_ETT, split="ett-minute"),
    "ettm2": PublicSet(files=("ETTm2.csv",), rows=69680, channels=7, home=_ETT, split="ett-minute"),
    "weather": PublicSet(files=("weather.csv",), rows=52696, channels=21, home=_TSLIB, step="10min"),
    "ecl": PublicSet(files=("electricity.csv", "electricity.txt"), rows=26304, channels=321,
                     home=f"{_TSLIB} or {_LAI}", start="2012-01-01", step="h"),
    "traffic": PublicSet(files=("traffic.csv", "traffic.txt"), rows=17544, channels=862,
                         home=f"{_TSLIB} or {_LAI}", start="2015-01-01", step="h"),
    "exchange": PublicSet(files=("exchange_rate.csv", "exchange_rate.txt"), rows=7588, channels=8,
                          home=f"{_TSLIB} or {_LAI}", start="1990-01-01", step="D"),
    "solar": PublicSet(files=("solar_AL.csv", "solar_AL.txt"), rows=52560, channels=137, home=_LAI,
                       start="2006-01-01", step="10min"),
    "ili": PublicSet(files=("national_illness.csv",), rows=966, channels=7, home=_TSLIB),
}  # fmt: skip


def embedded_co2() -> list[Series]:
    """Weekly CO2 at Mauna Loa 1958-2001 with its missing weeks, as statsmodels ships it."""
    from statsmodels.datasets import co2

    frame = co2.load_pandas().data.rename_axis("date").reset_index()
    return read_series(frame, Columns(time="date", channels=["co2"]), name="co2")


def read_public(name: str, path: str | Path | None) -> list[Series]:
    """A public set from its file, with a header and a date column or as bare columns of numbers.

    `path` is the file or its folder. Rows are taken as the file has them, as the published protocol does.

    Raises:
        FileNotFoundError: saying which file is expected and where it is to be had.
    """
    public = PUBLIC[name]
    file = _find(name, public, path)
    _compare_checksum(name, public, file)
    if _is_number(first_line(file).replace("\t", ",").split(",")[0]):
        frame = read_table(file, header=False)
        frame.insert(
            0,
            "date",
            pd.date_range(public.start or "2000-01-01", periods=len(frame), freq=public.step or "h"),
        )
    else:
        frame = read_table(file)
    series = read_series(frame, Columns(time="date" if "date" in frame else None), as_is=True, name=name)
    _compare_shape(name, public, series[0])
    # weather.csv has a gap and a repeated stamp, but its rows are meant to be 10 minutes apart.
    return [replace(one, frequency=public.step) for one in series] if public.step else series


def _find(name: str, public: PublicSet, path: str | Path | None) -> Path:
    expected = " or ".join(public.files)
    hint = f"source='{name}' reads {expected} (or .gz), to be had from {public.home}"
    if path is None:
        raise FileNotFoundError(f"{hint}; give path=... of the file or its folder")
    path = Path(path).expanduser()
    if path.is_dir():
        candidates = [path / (file + ending) for file in public.files for ending in ("", ".gz")]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise FileNotFoundError(f"{hint}; the folder path='{path}' has none of them")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{hint}; path='{path}' does not exist")
    return path


def _compare_checksum(name: str, public: PublicSet, file: Path) -> None:
    if not public.md5:
        return
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as stream:
        found = hashlib.md5(stream.read(), usedforsecurity=False).hexdigest()
    if found != public.md5:
        warnings.warn(
            f"path='{file}' is not the published {public.files[0]} (md5 {found}, published {public.md5}); "
            f"results for source='{name}' will not compare with published ones",
            stacklevel=2,
        )


def _compare_shape(name: str, public: PublicSet, series: Series) -> None:
    rows, channels = series.values.shape
    if (rows, channels) != (public.rows, public.channels):
        warnings.warn(
            f"source='{name}' is published with {public.rows} rows of {public.channels} channels, "
            f"but this file has {rows} of {channels}",
            stacklevel=2,
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
