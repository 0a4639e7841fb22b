"""Sums a comparison up: mean and spread over seeds, and which differences are more than seed noise."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from .results import Result


@dataclass(frozen=True)
class Values:
    """A metric over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.std is None:
            return format_number(self.mean)
        # Two digits of the spread say how many digits of the mean mean anything.
        decimals = min(6, max(0, 1 - math.floor(math.log10(self.std)))) if self.std > 0 else 4
        return f"{self.mean:.{decimals}f} ± {self.std:.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Row:
    """One mixer of the table."""

    mixer: str
    results: tuple[Result, ...]

    @property
    def size(self) -> Result:
        """The result that stands for what all seeds share."""
        return self.results[0]

    @property
    def deviation(self) -> float:
        """Relative difference of the number of parameters from the reference."""
        return self.size.parameters / self.size.target_parameters - 1

    def metric(self, name: str) -> Values:
        """Return a test metric over the seeds."""
        return Values(tuple(result.metrics[name] for result in self.results))

    @property
    def tokens_per_second(self) -> float:
        """Training rate, mean over the seeds."""
        return mean(result.tokens_per_second for result in self.results)

    @property
    def inference_us(self) -> float:
        """Least microseconds a token over the seeds."""
        return min(result.inference_us for result in self.results)

    @property
    def seconds(self) -> float:
        """Seconds in training steps, mean over the seeds."""
        return mean(result.train_seconds for result in self.results)

    @property
    def peak_bytes(self) -> int:
        """The most memory that the mixer's process took."""
        return max(result.peak_bytes for result in self.results)

    @property
    def training_bytes(self) -> int:
        """What training added to the memory of the process."""
        return max(result.peak_bytes - result.start_bytes for result in self.results)


@dataclass(frozen=True)
class Verdict:
    """What may be said of one metric."""

    metric: str
    winner: str | None
    text: str


@dataclass(frozen=True)
class Summary:
    """The whole comparison."""

    rows: tuple[Row, ...]
    metrics: dict[str, tuple[str, str]]
    baselines: dict[str, dict[str, Values]]
    verdicts: tuple[Verdict, ...]

    @property
    def statements(self) -> list[str]:
        """What may be said: of the first metric in full, of the others where there is a winner."""
        told = [verdict for number, verdict in enumerate(self.verdicts) if number == 0 or verdict.winner]
        rest = [verdict.metric for verdict in self.verdicts if verdict not in told]
        texts = [verdict.text for verdict in told]
        if rest and len(self.rows) > 1:
            texts.append(f"No mixer is best beyond seed noise in {', '.join(rest)}.")
        return texts

    def wins(self, mixer: str, metric: str) -> bool:
        """Whether ``mixer`` is best in ``metric`` by more than seed noise."""
        return any(verdict.winner == mixer and verdict.metric == metric for verdict in self.verdicts)


def summarise(results: Mapping[str, Sequence[Result]]) -> Summary:
    """Sum up the results of every mixer, given in the order of the table."""
    rows = tuple(Row(mixer, tuple(found)) for mixer, found in results.items())
    everything = [result for row in rows for result in row.results]
    metrics = {
        name: (direction, unit)
        for name, (direction, unit) in everything[0].summary_metrics.items()
        if all(name in result.metrics for result in everything)
    }
    names = dict.fromkeys(name for result in everything for name in result.baselines)
    baselines = {name: _baseline(name, everything, list(metrics)) for name in names}
    verdicts = tuple(_verdict(name, metrics[name][0], rows, baselines) for name in metrics)
    return Summary(rows, metrics, baselines, verdicts)


def _baseline(name: str, results: Sequence[Result], metrics: Sequence[str]) -> dict[str, Values]:
    """Collect a baseline; where it does not depend on the mixer or the seed it is one value."""
    found: dict[str, Values] = {}
    for metric in metrics:
        values = [r.baselines[name][metric] for r in results if metric in r.baselines.get(name, {})]
        if values:
            same = max(values) - min(values) <= 1e-6 * max(abs(value) for value in values)
            found[metric] = Values((values[0],) if same else tuple(values))
    return found


def better(direction: str, first: float, second: float) -> bool:
    """Whether ``first`` is better than ``second``."""
    return first < second if direction == "lower" else first > second


def beyond_noise(best: Values, other: Values) -> bool:
    """Whether two mixers differ by more than the seeds do.

    They do if the means differ by more than √(s₁² + s₂²) and the same one is ahead with every seed.
    """
    if best.std is None or other.std is None:
        return False
    differences = [a - b for a, b in zip(best.values, other.values, strict=True)]
    one_sided = min(differences) > 0 or max(differences) < 0
    return one_sided and abs(best.mean - other.mean) > math.hypot(best.std, other.std)


def _verdict(
    metric: str, direction: str, rows: Sequence[Row], baselines: Mapping[str, Mapping[str, Values]]
) -> Verdict:
    values = {row.mixer: row.metric(metric) for row in rows}
    ranked = sorted(values, key=lambda mixer: values[mixer].mean, reverse=direction == "higher")
    best, others = ranked[0], ranked[1:]
    winner = None
    if not others:
        text = f"{metric}: {best} {values[best]}."
    elif values[best].std is None:
        text = f"{metric}: one seed shows no spread, so no mixer is called best; {best} has {values[best]}."
    else:
        near = [mixer for mixer in others if not beyond_noise(values[best], values[mixer])]
        winner = None if near else best
        text = _ranking(metric, best, near, values)
    return Verdict(metric, winner, f"{text}{_against_baselines(metric, direction, values[best], baselines)}")


def _ranking(metric: str, best: str, near: Sequence[str], values: Mapping[str, Values]) -> str:
    if not near:
        return f"{metric}: {best} is best ({values[best]}), beyond seed noise from every other mixer."
    if all(values[mixer].mean == values[best].mean for mixer in near):
        return f"{metric}: {best} and {', '.join(near)} are the same ({values[best]})."
    gaps = [
        f"{mixer} by {abs(values[mixer].mean - values[best].mean):.2g} "
        f"(seed spread {math.hypot(values[mixer].std or 0, values[best].std or 0):.2g})"
        for mixer in near
    ]
    return (
        f"{metric}: {best} has the best mean ({values[best]}), but this is within seed noise; "
        f"it leads {', '.join(gaps)}."
    )


def _against_baselines(
    metric: str, direction: str, best: Values, baselines: Mapping[str, Mapping[str, Values]]
) -> str:
    """Say how the best mixer stands to the best baseline."""
    found = {name: values[metric].mean for name, values in baselines.items() if metric in values}
    if not found:
        return ""
    name = (min if direction == "lower" else max)(found, key=lambda name: found[name])
    gap, spread = abs(found[name] - best.mean), best.std or 0.0
    if gap <= spread:
        return f" The baseline {name} ({format_number(found[name])}) is within its seed spread."
    order = "better" if better(direction, found[name], best.mean) else "worse"
    return f" The best baseline, {name} ({format_number(found[name])}), is {order} by {gap:.2g}."


def format_number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}".replace("-", "−")


def format_bytes(count: float | None) -> str:
    """Bytes in the unit that a reader would choose."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def write_csv(summary: Summary, path: Path) -> None:
    """Write one line a mixer and one a baseline."""
    lines = [*(_mixer_line(row, summary) for row in summary.rows)]
    for name, values in summary.baselines.items():
        lines.append({"kind": "baseline", "name": name, **_metric_columns(values)})
    fields = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(lines)


def _metric_columns(values: Mapping[str, Values]) -> dict[str, object]:
    columns: dict[str, object] = {}
    for metric, found in values.items():
        columns |= {f"{metric}_mean": found.mean, f"{metric}_std": found.std}
    return columns


def _mixer_line(row: Row, summary: Summary) -> dict[str, object]:
    size = row.size
    return {
        "kind": "mixer",
        "name": row.mixer,
        **_metric_columns({metric: row.metric(metric) for metric in summary.metrics}),
        "seeds": len(row.results),
        "parameters": size.parameters,
        "parameters_vs_reference": row.deviation,
        "dim": size.dim,
        "hidden": size.hidden,
        "state_bytes": size.state_bytes,
        "context_tokens": size.context,
        "train_tokens_per_s": row.tokens_per_second,
        "train_seconds": row.seconds,
        "peak_bytes": row.peak_bytes,
        "training_bytes": row.training_bytes,
        "inference_us_per_token": row.inference_us,
    }
