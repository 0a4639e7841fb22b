"""The trainings of a comparison: their sizes, a process a mixer, and going on after an interruption."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from .. import __version__
from ..core.mixers import MIXERS
from . import configs, runs
from .errors import Interrupted, UserError
from .matching import Size
from .progress import console
from .results import Result
from .sizing import find_sizes
from .trial import Trial

Results = dict[str, list[Result]]


@dataclass
class Comparison:
    """What is compared, and the folder where it is kept."""

    arguments: list[str]
    configs: dict[str, str]
    overrides: list[str]
    mixers: list[str]
    seeds: list[int]
    folder: Path
    sizes: dict[str, Size] = field(default_factory=dict)
    own: str = ""
    """The configuration's own mixer, whose size is the reference."""

    @classmethod
    def prepare(
        cls,
        names: Sequence[str],
        overrides: Sequence[str],
        mixers: Sequence[str],
        seeds: int,
        output: Path | None,
    ) -> "Comparison":
        """Check the arguments and find the folder.

        Raises:
            UserError: an unknown mixer or configuration, no seed, or a folder that holds another comparison.
        """
        for mixer in mixers:
            if mixer not in MIXERS:
                raise UserError(f"--mixers: {mixer!r} is unknown, choose from {', '.join(MIXERS)}")
        if not mixers:
            raise UserError(f"--mixers names none: choose from {', '.join(MIXERS)}")
        if seeds < 1:
            raise UserError(f"--seeds must be at least 1, got {seeds}")
        paths = [configs.find(name) for name in names]
        arguments = [word for path in paths for word in ("-c", str(path.resolve()))]
        texts = {name: path.read_text(encoding="utf-8") for name, path in zip(names, paths)}
        comparison = cls(
            [*arguments, *overrides], texts, list(overrides), list(mixers), list(range(seeds)), Path()
        )
        comparison.folder = comparison._folder(output, paths[0].stem)
        return comparison

    def request(self) -> dict[str, Any]:
        """Return what may not change between calls that share a folder; mixers and seeds may be added."""
        return {"configs": list(self.configs.values()), "overrides": self.overrides, "version": __version__}

    def _folder(self, output: Path | None, name: str) -> Path:
        if output is not None:
            if not self._fits(output):
                raise UserError(
                    f"--output {output} holds a comparison with another configuration, other overrides or "
                    f"another version; name another folder, or remove this one"
                )
            return output
        number = 1
        while True:
            folder = Path("compare") / (name if number == 1 else f"{name}-{number}")
            if self._fits(folder):
                return folder
            number += 1

    def _fits(self, folder: Path) -> bool:
        file = folder / "request.json"
        if not file.is_file():
            if folder.is_dir() and any(folder.iterdir()):
                return False
            return not folder.is_file()
        known = json.loads(file.read_text(encoding="utf-8"))
        return all(known.get(key) == value for key, value in self.request().items())

    def run(self) -> Results:
        """Do the trainings that have no result yet, mixer by mixer, each in a process of its own.

        Raises:
            UserError: a training refused its configuration.
            Interrupted: Ctrl-C; the finished trainings stay.
        """
        self._size_up()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("compare", total=len(self.mixers) * len(self.seeds))
            for mixer in self.mixers:
                progress.update(task, description=f"{mixer} ({self.sizes[mixer].parameters:,} parameters)")
                self._train(mixer, lambda done: progress.update(task, advance=done))
        return {mixer: self._results(mixer) for mixer in self.mixers}

    def _results(self, mixer: str) -> list[Result]:
        found = [Result.load(self.folder / mixer / f"seed{seed}") for seed in self.seeds]
        return [result for result in found if result is not None]

    def _size_up(self) -> None:
        """Find the size of every mixer, unless an earlier call did."""
        file = self.folder / "request.json"
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            self.own = known["own"]
            self.sizes = {mixer: Size(**size) for mixer, size in known["sizes"].items()}
        missing = [mixer for mixer in self.mixers if mixer not in self.sizes]
        if not missing:
            return
        with console.status("finding sizes with the same number of parameters"):
            self.own, found = find_sizes(self.arguments, missing)
        self.sizes |= found
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {mixer: asdict(size) for mixer, size in self.sizes.items()}
        runs.write_json(file, {**self.request(), "own": self.own, "sizes": sizes})

    def _train(self, mixer: str, advance: Callable[[int], None]) -> None:
        """Start the process of a mixer and wait for it, telling of every finished training."""
        advance(len(self._results(mixer)))
        if len(self._results(mixer)) == len(self.seeds):
            return
        folder = self.folder / mixer
        folder.mkdir(parents=True, exist_ok=True)
        size = self.sizes[mixer]
        trial = Trial(
            arguments=self.arguments,
            mixer=mixer,
            options=mixer == self.own,
            dim=size.dim,
            hidden=size.hidden,
            target=size.target,
            seeds=self.seeds,
            folder=str(folder),
        )
        trial.save(folder / "trial.json")
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            command = [sys.executable, "-m", f"{__package__}.trial", str(folder / "trial.json")]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                self._watch(process, mixer, advance)
            except KeyboardInterrupt as error:
                _stop(process)
                raise Interrupted(
                    f"interrupted: finished trainings lie in {self.folder}, the same command goes on"
                ) from error
        self._check(process.returncode, mixer, folder / "log.txt")

    def _watch(self, process: "subprocess.Popen[bytes]", mixer: str, advance: Callable[[int], None]) -> None:
        told = len(self._results(mixer))
        ended = False
        while not ended:
            ended = process.poll() is not None
            found = self._results(mixer)
            for result in found[told:]:
                metrics = "  ".join(f"{name} {result.metrics[name]:.4g}" for name in _shown(result))
                console.print(f"{mixer:16} seed {result.seed}  {metrics}  {result.train_seconds:.1f} s")
            advance(len(found) - told)
            told = len(found)
            time.sleep(0.0 if ended else 0.2)

    def _check(self, code: int, mixer: str, log: Path) -> None:
        if code == 0:
            return
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["(no output)"]
        if code == 2:
            raise UserError(f"mixer {mixer}: {lines[-1]}")
        raise RuntimeError(
            f"the training of {mixer} ended with status {code}: {lines[-1]}; {log} has the rest"
        )


def _shown(result: Result) -> list[str]:
    return [name for name in result.summary_metrics if name in result.metrics][:2]


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Let a process that got the same Ctrl-C end by itself, and end it if it does not."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
