"""What `mainstem bench` shows and writes of its measurements: a table, CSV and Markdown."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .bench_plot import draw
from .bench_run import Row

COLUMNS = (
    "operation",
    "variant",
    "by",
    "B×T×H×D",
    "fwd\nms",
    "fwd+bwd\nms",
    "fwd\nktok/s",
    "fwd+bwd\nktok/s",
    "fwd\nrate",
    "output\nerror",
    "gradient\nerror",
    "ours is\n× fwd",
    "ours is\n× fwd+bwd",
    "exponent\nof T",
)
NAMES = 4
"""How many of the columns are text."""
ERRORS = (
    "Error: greatest deviation from the float64 reference at T = 256, relative to its greatest value; none "
    "where a peer computes something else."
)
RATIOS = (
    "Ours is ×: how many times faster ours is; on a peer's row our fastest backend than this peer, on ours "
    "this backend than the fastest peer, in this run."
)
EXPONENT = "Exponent of T: slope of log time (forward + backward where there is one) against log T."
LEGEND = f"Rate: of the recurrence itself, counted one token at a time. {ERRORS} {RATIOS} {EXPONENT}"


def console() -> Console:
    """Return a console that is wide enough for the table where the output is a file or a pipe."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, 180))


def groups(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str], list[Row]]]:
    """Put the rows of one operation, variant and implementation together."""
    return [
        (key, list(group))
        for key, group in groupby(rows, lambda row: (row.operation, row.variant, row.backend))
    ]


def add_exponents(rows: Sequence[Row]) -> None:
    """Give the last timed row of each group the slope of log time against log T."""
    for _, group in groups(rows):
        points = [(row.length, row.both_ms or row.forward_ms) for row in group]
        timed = [(math.log(length), math.log(time)) for length, time in points if time]
        same = len({(row.batch, row.heads, row.dim) for row in group if row.forward_ms}) == 1
        if same and len({length for length, _ in timed}) > 1:
            slope = float(np.polyfit([x for x, _ in timed], [y for _, y in timed], deg=1)[0])
            next(row for row in reversed(group) if row.forward_ms).exponent = slope


def number(value: float | None, style: str) -> str:
    """Format a value that may be missing."""
    return "" if value is None else format(value, style)


def three_digits(value: float | None) -> str:
    """Format a time, a rate or a ratio."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def missing(rows: Sequence[Row]) -> list[str]:
    """Say what was not run and why, one line for everything that shares the reason."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row.note:
            length = f" T={row.length}" if row.length else ""
            names = found.setdefault((row.backend, length, row.note), {}).setdefault(row.operation, [])
            names += [row.variant] if row.variant not in names else []
    lines = []
    for (backend, length, note), operations in found.items():
        what = "; ".join(f"{name} ({', '.join(variants)})" for name, variants in operations.items())
        lines.append(f"{backend}{length}, {what}: {note}")
    return lines


def cells(row: Row) -> list[str]:
    """Format a measured row for a reader."""
    return [
        row.operation,
        row.variant,
        row.backend,
        f"{row.batch}×{row.length}×{row.heads}×{row.dim}",
        three_digits(row.forward_ms),
        three_digits(row.both_ms),
        three_digits(row.forward_ktok_s),
        three_digits(row.both_ktok_s),
        "" if row.peer else f"{three_digits(row.rate)} {row.unit}",
        number(row.error, ".0e"),
        number(row.gradient_error, ".0e"),
        three_digits(row.forward_ratio),
        three_digits(row.both_ratio),
        number(row.exponent, ".2f"),
    ]


def show(console: Console, rows: Sequence[Row], header: Mapping[str, str]) -> None:
    """Print the measured rows as a table, and below it what was not run."""
    facts = (f"[bold]{name}[/bold] {value}" for name, value in header.items())
    console.print("  ".join(facts), highlight=False)
    table = Table(header_style="bold")
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < NAMES else "right", no_wrap=index < NAMES)
    for _, group in groups(rows):
        for row in group:
            if not row.note:
                table.add_row(*cells(row), style="dim" if row.peer else None)
        table.add_section()
    console.print(table)
    for line in missing(rows):
        console.print(line, markup=False, highlight=False)
    console.print(LEGEND, style="dim", highlight=False)


def write(rows: Sequence[Row], header: Mapping[str, str], folder: Path) -> list[Path]:
    """Write bench.csv, bench.md and bench.png; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench.{kind}" for kind in ("csv", "md", "png")]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    paths[1].write_text(to_markdown(rows, header), encoding="utf-8")
    draw(rows, header).savefig(paths[2], dpi=130)
    return paths


def markdown_table(columns: Iterable[str], body: Iterable[Sequence[str]], names: int = NAMES) -> str:
    """Lay out a Markdown table whose first ``names`` columns are text and the others numbers."""
    titles = [name.replace("\n", " ") for name in columns]
    rule = ["---"] * names + ["---:"] * (len(titles) - names)
    return "\n".join(f"| {' | '.join(parts)} |" for parts in [titles, rule, *body])


def facts(header: Mapping[str, str]) -> str:
    """Give the command and what it ran on, as Markdown."""
    rest = ", ".join(f"{name} {value}" for name, value in header.items() if name != "command")
    return f"`{header['command']}`\n\n{rest}."


def to_markdown(rows: Sequence[Row], header: Mapping[str, str]) -> str:
    """Return the header, a table with a column for each shape, and the list of what was not run."""
    timed = [row for row in rows if not row.note]
    shapes = list(dict.fromkeys((row.batch, row.length, row.heads, row.dim) for row in timed))
    one_kind = len({(batch, heads, dim) for batch, _, heads, dim in shapes}) == 1
    titles = [f"T = {shape[1]}" if one_kind else "×".join(map(str, shape)) for shape in shapes]
    columns = ["operation", "variant", "by", *titles, "error", "exponent"]
    body = []
    for names, group in groups(timed):
        by_shape = {(row.batch, row.length, row.heads, row.dim): row for row in group}
        times = [_summary(by_shape.get(shape)) for shape in shapes]
        errors = _pair(number(group[-1].error, ".0e"), number(group[-1].gradient_error, ".0e"))
        exponent = next((number(row.exponent, ".2f") for row in reversed(group) if row.exponent), "")
        body.append([f"`{names[0]}`", *names[1:], *times, errors, exponent])
    table = markdown_table(columns, body, 3)
    batch, _, heads, dim = shapes[0] if shapes else (0, 0, 0, 0)
    sizes = f"B = {batch}, H = {heads}, D = {dim}. " if one_kind else "Columns are B×T×H×D. "
    key = (
        f"{sizes}In each cell milliseconds, thousands of tokens a second and × ours is, forward / forward + "
    )
    legend = f"{key}backward. {ERRORS} {RATIOS} {EXPONENT}"
    absent = "\n".join(f"- {text}" for text in missing(rows))
    return "\n\n".join(part for part in (facts(header), table, legend, absent) if part) + "\n"


def _summary(row: Row | None) -> str:
    if row is None:
        return ""
    parts = [
        f"{_pair(three_digits(row.forward_ms), three_digits(row.both_ms))} ms",
        f"{_pair(three_digits(row.forward_ktok_s), three_digits(row.both_ktok_s))} ktok/s",
        f"× {_pair(three_digits(row.forward_ratio), three_digits(row.both_ratio))}"
        if row.forward_ratio
        else "",
    ]
    return "<br>".join(part for part in parts if part)


def _pair(first: str, second: str) -> str:
    return f"{first} / {second}" if first and second else first or second
