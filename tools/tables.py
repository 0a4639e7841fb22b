from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from ..core.training import DomainModule


def split(results: Mapping[str, Any], stage: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Part logged results into the model's metrics and those of each baseline.

    ``<stage>/<metric>`` is the model's, ``<stage>/<baseline>/<metric>`` a baseline's.
    """
    model: dict[str, float] = {}
    baselines: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        name = key.removeprefix(f"{stage}/")
        baseline, _, metric = name.rpartition("/")
        target = baselines.setdefault(baseline, {}) if baseline else model
        target[metric] = float(value)
    return model, baselines


def metric_table(
    module: type[DomainModule], metrics: dict[str, float], baselines: dict[str, dict[str, float]]
) -> Table:
    """A row a metric: the model, each baseline, the better direction, the unit; the best of a row is bold."""
    columns = {"model": metrics, **baselines}
    table = Table("metric", *columns, "better", "unit", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[:-1]:
        column.no_wrap = True
    for column in table.columns[1 : 1 + len(columns)]:
        column.justify = "right"
    listed = [name for name in module.summary_metrics if any(name in column for column in columns.values())]
    others = [name for name in metrics if name not in module.summary_metrics and module.shown(name)]
    for name in listed + others:
        better, unit = module.summary_metrics.get(name, ("", ""))
        table.add_row(name, *_cells(name, list(columns.values()), better), better, unit)
    return table


def _cells(name: str, columns: list[dict[str, float]], better: str) -> list[str]:
    values = [column.get(name) for column in columns]
    given = [value for value in values if value is not None]
    best = {"lower": min, "higher": max}[better](given) if better and len(given) > 1 else None
    return [
        "" if value is None else f"[bold]{value:.4g}[/bold]" if value == best else f"{value:.4g}"
        for value in values
    ]
