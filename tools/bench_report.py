"""What `mainstem bench` shows and writes: a table, CSV, Markdown and the curve of time against length."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from .bench_run import Row

COLUMNS = (
    "operation",
    "variant",
    "backend",
    "B×T×H×D",
    "fwd\nms",
    "fwd+bwd\nms",
    "fwd\nktok/s",
    "fwd+bwd\nktok/s",
    "fwd\nrate",
    "output\nerror",
    "gradient\nerror",
    "fwd\n×SDPA",
    "fwd+bwd\n×SDPA",
    "exponent\nof T",
)
NAMES = 4
"""How many of the columns are text."""
LEGEND = (
    "Rate: of the recurrence itself, counted one token at a time. Error: greatest deviation from the float64 "
    "reference, relative to its greatest value. ×SDPA: how many times faster than PyTorch's causal attention "
    "in this run. Exponent of T: slope of log time (forward + backward where there is one) against log T."
)


def console() -> Console:
    """Return a console that is wide enough for the table where the output is a file or a pipe."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, 180))


def groups(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str], list[Row]]]:
    """Put the rows of one operation, variant and backend together."""
    return [
        (key, list(group))
        for key, group in groupby(rows, lambda row: (row.operation, row.variant, row.backend))
    ]


def add_exponents(rows: Sequence[Row]) -> None:
    """Give the last timed row of each group the slope of log time against log T."""
    for _, group in groups(rows):
        points = [(row.length, row.both_ms or row.forward_ms) for row in group]
        timed = [(math.log(length), math.log(time)) for length, time in points if time]
        if len({length for length, _ in timed}) > 1:
            slope = float(np.polyfit([x for x, _ in timed], [y for _, y in timed], deg=1)[0])
            next(row for row in reversed(group) if row.forward_ms).exponent = slope


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def missing(rows: Sequence[Row]) -> list[str]:
    """Say what was not run and why, one line for all variants that share the reason."""
    variants: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row.note:
            length = f" T={row.length}" if row.length else ""
            variants.setdefault((row.operation, row.backend, length, row.note), []).append(row.variant)
    return [
        f"{operation} ({', '.join(names)}) {backend}{length}: {note}"
        for (operation, backend, length, note), names in variants.items()
    ]


def cells(row: Row) -> list[str]:
    """Format a measured row for a reader."""
    return [
        row.operation,
        row.variant,
        row.backend,
        f"{row.batch}×{row.length}×{row.heads}×{row.dim}",
        _time(row.forward_ms),
        _time(row.both_ms),
        _time(row.forward_ktok_s),
        _time(row.both_ktok_s),
        f"{_time(row.rate)} {row.unit}",
        _number(row.error, ".0e"),
        _number(row.gradient_error, ".0e"),
        _time(row.forward_ratio),
        _time(row.both_ratio),
        _number(row.exponent, ".2f"),
    ]


def show(console: Console, rows: Sequence[Row], header: Mapping[str, str]) -> None:
    """Print the measured rows as a table, and below it what was not run."""
    facts = (f"[bold]{name}[/bold] {value}" for name, value in header.items())
    console.print("  ".join(facts), highlight=False)
    table = Table(header_style="bold")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < NAMES else "right", no_wrap=number < NAMES)
    for _, group in groups(rows):
        for row in group:
            if not row.note:
                table.add_row(*cells(row))
        table.add_section()
    console.print(table)
    for line in missing(rows):
        console.print(line, markup=False, highlight=False)
    console.print(LEGEND, style="dim", highlight=False)


def write(rows: Sequence[Row], header: Mapping[str, str], folder: Path, markdown: Path | None) -> list[Path]:
    """Write bench.csv, bench.png and, where asked for, the Markdown; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.csv", folder / "bench.png"]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    draw(rows, header).savefig(paths[1], dpi=130)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(to_markdown(rows, header), encoding="utf-8")
        paths.append(markdown)
    return paths


def to_markdown(rows: Sequence[Row], header: Mapping[str, str]) -> str:
    """Return the header, the table of measured rows and the list of what was not run."""

    def line(parts: Iterable[str]) -> str:
        return f"| {' | '.join(parts)} |"

    versions = ", ".join(f"{name} {value}" for name, value in header.items() if name != "command")
    rule = ["---"] * NAMES + ["---:"] * (len(COLUMNS) - NAMES)
    measured = [line(cells(row)) for row in rows if not row.note]
    table = [line(name.replace("\n", " ") for name in COLUMNS), line(rule), *measured]
    parts = [f"`{header['command']}`", f"{versions}.", "\n".join(table), LEGEND]
    absent = "\n".join(f"- {text}" for text in missing(rows))
    return "\n\n".join([*parts, absent] if absent else parts) + "\n"


def draw(rows: Sequence[Row], header: Mapping[str, str]) -> Figure:
    """Draw time against T, both logarithmic, one panel an operation, with PyTorch's attention in each."""
    timed = [group for group in groups(rows) if any(row.forward_ms for row in group[1])]
    names = list(dict.fromkeys(key[0] for key, _ in timed if key[2] != "torch SDPA")) or ["attention"]
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(4.6 * across, 3.8 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, name in zip(panels, names):
        _draw_panel(panel, name, timed)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"{header['device']}, {header['threads']} thread(s): forward + backward", fontsize=10)
    return figure


BACKEND_STYLES = {"reference": ":", "chunked": "--", "cpu": "-", "triton": "-", "torch SDPA": "-."}


def _draw_panel(panel: Axes, name: str, timed: Sequence[tuple[tuple[str, str, str], list[Row]]]) -> None:
    variants = list(dict.fromkeys(key[1] for key, _ in timed if key[0] == name))
    both = any(row.both_ms for key, group in timed if key[0] == name for row in group)
    note = "" if both else " (forward only)"
    for (operation, variant, backend), group in timed:
        peer = backend == "torch SDPA"
        if operation != name and not peer:
            continue
        points = [(row.length, row.both_ms if both else row.forward_ms) for row in group if row.forward_ms]
        panel.plot(
            *zip(*points),
            BACKEND_STYLES[backend],
            marker="o",
            markersize=3,
            color="0.35" if peer else f"C{variants.index(variant)}",
            label=backend if peer else f"{variant}, {backend}",
        )
    panel.set(xscale="log", yscale="log", title=f"{name}{note}", xlabel="tokens T", ylabel="ms")
    lengths = sorted({row.length for _, group in timed for row in group})
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    panel.grid(alpha=0.3)
    if panel.has_data():
        panel.legend(fontsize=7, handlelength=3.2, numpoints=2)
