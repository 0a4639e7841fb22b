"""What one training of a comparison leaves behind: a JSON file that says all that the tables need."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import runs

FILE = "result.json"


@dataclass(kw_only=True)
class Result:
    """One mixer trained and tested with one seed."""

    mixer: str
    seed: int
    domain: str
    dim: int
    hidden: int | None
    parameters: int
    target_parameters: int
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    summary_metrics: dict[str, list[str]]
    """Metric -> [which direction is better, unit], in the order of the table."""
    context: int
    """Tokens in one sequence of the backbone."""
    state_bytes: int | None
    """Memory of one sequence's decode state after ``context`` tokens; None where there is no decoding."""
    train_tokens: int
    """Tokens that went through the backbone in training, without the first step, which compiles kernels."""
    train_seconds: float
    """Seconds in those training steps."""
    steps: int
    epochs: int
    peak_bytes: int
    start_bytes: int
    """Memory of the process before the first training: the interpreter, the libraries and the data."""
    inference_us: float
    """CPU or GPU microseconds a token of a forward pass over ``context`` tokens."""
    monitor: str
    curve: list[list[float]]
    """[step, monitored metric] of every validation."""
    pictures: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Training rate of the backbone."""
        return self.train_tokens / self.train_seconds

    def save(self, folder: Path) -> None:
        """Write the file whole or not at all."""
        runs.write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Result | None":
        """Read the file, or return None where the training did not finish."""
        path = folder / FILE
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content)
