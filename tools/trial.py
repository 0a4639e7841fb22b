"""The process that trains one mixer of a comparison: ``python -m mainstem.tools.trial TRIAL.json``."""

import inspect
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule

from ..core import Backbone
from ..core.training.module import parameters
from . import errors, train
from .measure import machine, peak_memory
from .recorder import Recorder, inference_us
from .results import Result


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One mixer, its size and its seeds."""

    arguments: list[str]
    """Configurations and overrides as `mainstem fit` takes them."""
    mixer: str
    options: bool
    """Whether the configuration's mixer options are meant for this mixer."""
    dim: int
    hidden: int | None
    """SwiGLU width; None leaves the configuration's."""
    target: int
    seeds: list[int]
    folder: str

    def run_folder(self, seed: int) -> Path:
        """Folder of one run, which is also a run that `mainstem test` and `predict` take."""
        return Path(self.folder) / f"seed{seed}"

    def fit_arguments(self, seed: int) -> list[str]:
        """Return the command line of one training."""
        width = [] if self.hidden is None else [f"--model.backbone.hidden={self.hidden}"]
        own = [] if self.options else ["--model.backbone.options={}"]
        return [
            "fit",
            *self.arguments,
            f"--model.backbone.mixer={self.mixer}",
            f"--model.backbone.dim={self.dim}",
            *width,
            *own,
            f"--seed_everything={seed}",
            "--trainer.enable_progress_bar=false",
            "--trainer.callbacks+=mainstem.tools.recorder.Recorder",
            f"--output={self.run_folder(seed)}",
        ]

    def save(self, path: Path) -> None:
        """Write the request."""
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def train_and_test(trial: Trial, seed: int, *, picture: bool) -> Result:
    """Train, test the best checkpoint and, with ``picture``, let the domain draw its predictions."""
    folder = trial.run_folder(seed)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted comparison left of this run
    fitted = train.run(trial.fit_arguments(seed))
    recorder = next(part for part in _callbacks(fitted) if isinstance(part, Recorder))
    device = fitted.trainer.strategy.root_device
    module = fitted.model
    backbone: Any = module.token_mixer()
    if recorder.shape is None:
        raise errors.UserError("the configuration trains for no step, so there is nothing to compare")
    result = Result(
        mixer=trial.mixer,
        seed=seed,
        domain=module.domain(),
        dim=trial.dim,
        hidden=backbone.config.width if backbone.config.channel_mixer == "swiglu" else None,
        parameters=parameters(module),
        target_parameters=trial.target,
        metrics={},
        baselines={},
        summary_metrics={name: list(info) for name, info in module.summary_metrics.items()},
        context=recorder.shape[1],
        state_bytes=state_bytes(backbone, recorder.shape[1]),
        train_tokens=recorder.tokens,
        train_seconds=recorder.seconds,
        steps=fitted.trainer.global_step,
        epochs=fitted.trainer.current_epoch,
        peak_bytes=peak_memory(device),
        start_bytes=recorder.start_bytes,
        inference_us=inference_us(backbone, trial.dim, recorder.shape),
        monitor=module.monitor,
        curve=[list(point) for point in recorder.curve],
        machine=machine(device),
    )
    tested = train.run(["test", f"--run={folder}", "--trainer.enable_progress_bar=false"])
    result.metrics, result.baselines = tested.metrics, tested.baselines
    if picture:
        result.pictures = _pictures(folder, fitted.datamodule)
    result.save(folder)
    return result


def state_bytes(backbone: Any, length: int) -> int | None:
    """Memory of a sequence's decode state after ``length`` tokens, where there is one."""
    if not isinstance(backbone, Backbone) or backbone.config.bidirectional:
        return None
    return backbone.state_bytes(1, length)


def _callbacks(cli: train.MainstemCLI) -> list[Callback]:
    found: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return found


def _pictures(folder: Path, data: LightningDataModule) -> list[str]:
    """Let the domain write its predictions; returns the pictures among the files."""
    target = folder / "predictions"
    # A domain that can also predict what nobody knows yet is asked for what can be held against the truth.
    known = ["--data.predict=test"] if "predict" in inspect.signature(type(data)).parameters else []
    quiet = "--trainer.enable_progress_bar=false"
    done = train.run(["predict", f"--run={folder}", f"--output={target}", *known, quiet])
    return [str(path.relative_to(folder)) for path in done.predictions if path.suffix == ".png"]


def main(argv: list[str]) -> int:
    """Run the seeds that have no result yet; status 2 for a user's mistake, told in one sentence."""
    trial = Trial(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        for seed in trial.seeds:
            if Result.load(trial.run_folder(seed)) is None:
                train_and_test(trial, seed, picture=seed == trial.seeds[0])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not errors.is_user_error(error):
            raise
        print(errors.sentence(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
