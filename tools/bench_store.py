"""What an interrupted `mainstem bench` has measured, so that the same command goes on from there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .bench_run import Row

NAME = "unfinished.json"


def save(folder: Path, header: Mapping[str, str], rows: Sequence[Row], done: Sequence[str]) -> None:
    """Keep the rows of the tasks ``done``."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [asdict(row) for row in rows if f"{row.operation} {row.variant} {row.backend}" in done]
    text = json.dumps({"header": dict(header), "done": list(done), "rows": kept})
    partial = folder / f"{NAME}.new"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / NAME)


def load(folder: Path, header: Mapping[str, str]) -> tuple[list[Row], list[str]]:
    """Return rows and finished tasks of a run with the same ``header`` that did not end; else nothing."""
    path = folder / NAME
    if not path.is_file():
        return [], []
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["header"] != dict(header):
        return [], []
    return [Row(**row) for row in kept["rows"]], kept["done"]


def clear(folder: Path) -> None:
    """Forget what was kept: the run has ended."""
    (folder / NAME).unlink(missing_ok=True)
