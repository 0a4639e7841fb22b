"""Small tables of `mainstem bench`: on the terminal, as CSV and as Markdown."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from .bench_report import console, facts, markdown_table


def publish(
    word: str,
    columns: Sequence[str],
    body: Sequence[Sequence[str]],
    header: Mapping[str, str],
    folder: Path,
    *,
    names: int,
    legend: str,
) -> None:
    """Print a table and write ``<word>.csv`` and ``<word>.md``; the first ``names`` columns are text."""
    table = Table(header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < names else "right")
    for row in body:
        table.add_row(*row)
    out = console()
    out.print(table)
    out.print(legend, style="dim", highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{word}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *body])
    text = "\n\n".join([facts(header), markdown_table(columns, body, names), legend]) + "\n"
    (folder / f"{word}.md").write_text(text, encoding="utf-8")
    out.print(f"wrote {folder / word}.csv and .md", soft_wrap=True)
