import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ..core.files import write_whole


class RunLogger(CSVLogger):
    """``metrics.csv`` in the folder of a run; a resumed run goes on in the same file.

    Args:
        directory: the folder of the run.
        steps: optimizer steps at which the run resumes; later rows are dropped, since they are trained again.
    """

    def __init__(self, directory: Path, steps: int = 0) -> None:
        super().__init__(directory.parent.parent, name=directory.parent.name, version=directory.name)
        self.steps = steps

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, made at first use."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.steps)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, steps: int) -> None:
        super().__init__(log_dir)
        self.metrics_keys = _keep_rows(Path(self.metrics_file_path), steps)

    def _check_log_dir_exists(self) -> None:
        """Lightning's would delete the rows of the interrupted part."""


def _keep_rows(path: Path, steps: int) -> list[str]:
    """Drop the rows from ``steps`` on, and what a kill left of a row; return the names of the columns."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < steps]

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)
    return names
