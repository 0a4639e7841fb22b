"""The table, compare.csv and the self-contained report.html of a comparison."""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from . import figures
from .matching import TOLERANCE
from .progress import console
from .results import Result
from .summary import Row, Summary, format_bytes, summarise, write_csv

if TYPE_CHECKING:
    from .comparison import Comparison

NOISE = (
    "A mixer is called best, and set in bold, only where its mean is ahead of every other mixer's by more "
    "than the seed spread √(s₁² + s₂²) and it is ahead with every single seed; s is the standard deviation "
    "over seeds."
)


def columns(summary: Summary) -> list[tuple[str, str]]:
    """Name the columns of the table, each with what to know about it."""
    metrics = [(name, f"{better} is better") for name, (better, _) in summary.metrics.items()]
    return [
        ("mixer", ""),
        *metrics,
        ("parameters", "vs reference"),
        ("decode state", f"after {summary.rows[0].size.context} tokens"),
        ("training", "ktok/s"),
        ("inference", "µs/token"),
        ("peak memory", "of the process"),
        ("time", "training steps"),
    ]


def cells(row: Row, summary: Summary) -> list[str]:
    """Format one mixer's row."""
    size = row.size
    mark = "" if abs(row.deviation) <= TOLERANCE else ", not matched"
    return [
        row.mixer,
        *(str(row.metric(metric)) for metric in summary.metrics),
        f"{size.parameters:,} ({row.deviation:+.1%}{mark})",
        format_bytes(size.state_bytes),
        f"{row.tokens_per_second / 1e3:.3g}",
        f"{row.inference_us:.3g}",
        format_bytes(row.peak_bytes),
        f"{row.seconds:.1f} s",
    ]


def baseline_cells(name: str, summary: Summary) -> list[str]:
    """Format one baseline's row."""
    found = summary.baselines[name]
    metrics = [str(found[metric]) if metric in found else "" for metric in summary.metrics]
    return [name, *metrics, *[""] * (len(columns(summary)) - 1 - len(metrics))]


def tables(summary: Summary) -> list[Table]:
    """Return two tables for the terminal: how good the mixers are, and what they cost."""
    heads, metrics = columns(summary), len(summary.metrics)
    quality, cost = Table(header_style="bold"), Table(header_style="bold")
    for number, (name, note) in enumerate(heads):
        for part in (quality, cost) if number == 0 else (quality,) if number <= metrics else (cost,):
            part.add_column(f"{name}\n{note}" if note else name, justify="right" if number else "left")
    for row in summary.rows:
        line = cells(row, summary)
        for number, metric in enumerate(summary.metrics, start=1):
            if summary.wins(row.mixer, metric):
                line[number] = f"[bold]{line[number]}[/bold]"
        quality.add_row(*line[: 1 + metrics])
        cost.add_row(line[0], *line[1 + metrics :])
    quality.add_section()
    for name in summary.baselines:
        quality.add_row(*baseline_cells(name, summary)[: 1 + metrics], style="dim")
    return [quality, cost]


def write(summary: Summary, comparison: "Comparison", command: str) -> list[Path]:
    """Write compare.csv and report.html; returns their paths."""
    paths = [comparison.folder / "compare.csv", comparison.folder / "report.html"]
    write_csv(summary, paths[0])
    paths[1].write_text(html(summary, comparison, command), encoding="utf-8")
    return paths


def html(summary: Summary, comparison: "Comparison", command: str) -> str:
    """Render the page, with everything that it shows inside it."""
    template = (files(__package__) / "templates" / "report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    first = summary.rows[0].size
    seeds = len(comparison.seeds)
    return page.render(
        title=f"{first.domain.capitalize()}: {', '.join(row.mixer for row in summary.rows)}",
        lead=f"{', '.join(comparison.configs)} · {seeds} seed{'s' if seeds > 1 else ''} a mixer · "
        f"{first.parameters:,} parameters ± {TOLERANCE:.0%} · {first.machine.get('device', '')}",
        statements=summary.statements,
        noise=NOISE,
        tables=_html_tables(summary),
        notes=notes(summary),
        figures=[{"svg": svg, "caption": caption} for svg, caption in figures.draw(summary)],
        pictures=list(_pictures(summary, comparison.folder)),
        domain=first.domain,
        command=command,
        facts=_facts(summary, comparison),
        configs=[{"name": name, "text": text} for name, text in comparison.configs.items()],
    )


def notes(summary: Summary) -> list[str]:
    """Explain what the columns mean, and which mixers could not be matched."""
    found = [
        "Parameters: trainable ones of the whole model; the width of the channel mixer makes them equal. "
        "Training: tokens through the backbone over seconds in training steps, without the first one, which "
        "compiles kernels. Inference: one forward pass of the backbone. Peak memory: of the process with "
        "Python and its libraries; on a CUDA device, of the tensors."
    ]
    for row in summary.rows:
        if abs(row.deviation) > TOLERANCE:
            found.append(
                f"{row.mixer} could not be matched within {TOLERANCE:.0%}: it has {row.deviation:+.1%} "
                "parameters, so its row is not a like-for-like comparison."
            )
        if row.size.dim != summary.rows[0].size.dim:
            found.append(
                f"{row.mixer} has dim {row.size.dim}: the width of the channel mixer alone was not enough."
            )
    return found


def _html_tables(summary: Summary) -> list[dict[str, Any]]:
    """Return the two tables of the page: how good the mixers are, with the baselines, and what they cost."""
    split = 1 + len(summary.metrics)
    heads = [{"name": name, "note": note} for name, note in columns(summary)]
    colour = figures.colours([row.mixer for row in summary.rows])
    quality, cost = [], []
    for row in summary.rows:
        texts = cells(row, summary)
        best = [False, *(summary.wins(row.mixer, metric) for metric in summary.metrics)]
        values = [{"text": text, "best": wins} for text, wins in zip(texts, best)]
        quality.append({"kind": "", "colour": colour[row.mixer], "cells": values})
        values = [{"text": text, "best": False} for text in (texts[0], *texts[split:])]
        cost.append({"kind": "", "colour": colour[row.mixer], "cells": values})
    for number, name in enumerate(summary.baselines):
        values = [{"text": text, "best": False} for text in baseline_cells(name, summary)[:split]]
        quality.append({"kind": "baseline" if number else "baseline first", "colour": "", "cells": values})
    return [
        {"heads": heads[:split], "rows": quality},
        {"heads": [heads[0], *heads[split:]], "rows": cost},
    ]


def _pictures(summary: Summary, folder: Path) -> Sequence[Mapping[str, str]]:
    """Embed the first picture of each mixer."""
    found = []
    for row in summary.rows:
        result = next((result for result in row.results if result.pictures), None)
        path = folder / row.mixer / f"seed{result.seed}" / result.pictures[0] if result else None
        if result is not None and path is not None and path.is_file():
            found.append(
                {
                    "data": base64.b64encode(path.read_bytes()).decode(),
                    "alt": f"{path.stem} by {row.mixer}",
                    "caption": f"{row.mixer}, seed {result.seed}",
                }
            )
    return found


def _facts(summary: Summary, comparison: "Comparison") -> dict[str, str]:
    def span(values: Sequence[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

    results = [result for row in summary.rows for result in row.results]
    sizes = [
        f"{row.mixer} dim {row.size.dim}" + (f", hidden {row.size.hidden}" if row.size.hidden else "")
        for row in summary.rows
    ]
    facts = {
        "seeds": ", ".join(map(str, comparison.seeds)),
        "training steps": span([result.steps for result in results]),
        "epochs": span([result.epochs for result in results]),
        "best checkpoint": f"chosen by {results[0].monitor}",
        "overrides": " ".join(comparison.overrides) or "none",
        "sizes": "; ".join(sizes),
    }
    return facts | results[0].machine


def show(results: Mapping[str, Sequence[Result]]) -> Summary:
    """Print the table and what can be said; returns the summary."""
    summary = summarise(results)
    wide = console if console.is_terminal else Console(width=140)
    for table in tables(summary):
        wide.print(table)
    for statement in summary.statements:
        console.print(statement, markup=False)
    for note in notes(summary)[1:]:
        console.print(note, markup=False)
    return summary
