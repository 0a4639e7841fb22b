"""Tables from disk: CSV and Parquet, compressed or not."""

import gzip
from pathlib import Path

import pandas as pd

_PARQUET = (".parquet", ".pq")
_TEXT = (".csv", ".txt", ".tsv")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def read_table(path: str | Path, *, header: bool = True) -> pd.DataFrame:
    """Read a CSV (separator , ; or tab) or a Parquet file as it is.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"path='{path}' does not exist")
    if path.is_dir():
        raise ValueError(f"path='{path}' is a folder; give a .csv, .txt or .parquet file")
    if path.suffix.lower() in _PARQUET:
        return _read_parquet(path)
    plain = Path(path.stem) if path.suffix.lower() in _COMPRESSED else path
    if plain.suffix.lower() not in _TEXT:
        raise ValueError(
            f"path='{path}' has the ending '{path.suffix}'; "
            f"accepted are .csv, .txt, .tsv (also .gz) and .parquet"
        )
    return _read_text(path, header)


def first_line(path: str | Path) -> str:
    """First line of a text file, compressed or not."""
    path = Path(path)
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        return str(file.readline())


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except Exception as error:
        raise ValueError(f"path='{path}' cannot be read as Parquet: {_one_line(error)}") from error
    named = isinstance(frame.index, pd.DatetimeIndex) or frame.index.name is not None
    frame = frame.reset_index() if named else frame
    return _checked(frame.rename(columns=str), path)


def _read_text(path: Path, header: bool) -> pd.DataFrame:
    try:
        separator = _separator(first_line(path)) if path.suffix not in _COMPRESSED[1:] else ","
        options = {"sep": separator, "header": "infer" if header else None, "skipinitialspace": True}
        try:
            frame = pd.read_csv(path, **options)  # type: ignore[call-overload]
        except UnicodeDecodeError:
            frame = pd.read_csv(path, encoding="latin-1", **options)  # type: ignore[call-overload]
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"path='{path}' is empty") from error
    except (pd.errors.ParserError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"path='{path}' cannot be read as CSV: {_one_line(error)}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"path='{path}' has rows with more fields than its header has names")
    return _checked(frame.rename(columns=str), path)


def _checked(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    if frame.empty:
        raise ValueError(f"path='{path}' has no rows")
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise ValueError(f"path='{path}' has two columns named '{repeated[0]}'")
    return frame


def _separator(line: str) -> str:
    return max(",;\t", key=line.count)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
