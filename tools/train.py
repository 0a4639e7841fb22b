"""`mainstem fit|validate|test|predict`: LightningCLI over the folders of runs."""

import logging
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from omegaconf.errors import InterpolationKeyError

from ..core.files import write_whole
from ..core.training import DomainModule, EpochSeed, RunCheckpoint, UntrainedCandidate, read_checkpoint
from . import runs
from .arguments import Request, expand
from .errors import Interrupted, UserError, is_user_error, unwrapped
from .logger import RunLogger
from .parser import Parser
from .progress import Header, console
from .tables import metric_table, split


class SaveRunConfig(SaveConfigCallback):
    """Write config.yaml when training starts; other commands leave it as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file whole or not at all, without the checkpoint that this start resumed from."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        assert trainer.logger is not None
        target = runs.config(Path(str(trainer.loggers[0].log_dir)))
        config = self.config.clone()
        config["ckpt_path"] = None
        write_whole(target, lambda path: self.parser.save(config, path, skip_unset=False, overwrite=True))


class MainstemCLI(LightningCLI):
    """LightningCLI with run folders, default callbacks, and results told at the end.

    Attributes:
        run_dir: the folder of the run, or ``None`` for a bare checkpoint.
        metrics: the model's metrics of the last validate or test.
        baselines: the same of each baseline.
        predictions: the files that predict wrote.
    """

    def __init__(self, request: Request, execute: bool = True) -> None:
        self.request = request
        self.execute = execute
        self.run_dir = request.run
        self.checkpoint: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}
        self.baselines: dict[str, dict[str, float]] = {}
        self.predictions: list[Path] = []
        super().__init__(
            DomainModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "mainstem"},
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            trainer_defaults={
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10,
            },
            args=request.argv,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with a missing interpolation told as any other error of a configuration."""
        try:
            self.config = parser.parse_args(args)
        except InterpolationKeyError as error:
            key = re.sub(r"^fit\.|^validate\.|^test\.|^predict\.", "", str(error.full_key))
            name = str(error).partition("\n")[0].partition("'")[2].partition("'")[0].lstrip(".")
            raise UserError(f"{key} = ${{{name}}}: the configuration has no {name}") from error

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters in the checkpoint override the command line.
        pass

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; the error of a constructor comes through as it was raised."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            raise unwrapped(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, and for `fit` the folder that it writes to."""
        self.checkpoint = self._read_checkpoint()
        given = self._get(self.config_init, "trainer")
        overrides: dict[str, Any] = {"logger": False}
        if self.subcommand == "fit":
            self.run_dir = self._folder(given.get("default_root_dir"))
            overrides["logger"] = self._loggers(given.get("logger"))
            overrides["callbacks"] = [*_as_list(given.get("callbacks")), *self._callbacks(given)]
        return super().instantiate_trainer(**overrides, **kwargs)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        path = self._get(self.config_init, "ckpt_path")
        if path is None:
            return None
        checkpoint = read_checkpoint(Path(path))
        try:
            self.model.on_load_checkpoint(checkpoint)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return checkpoint

    def restore(self) -> None:
        """Load the checkpoint into the model and the data, outside a trainer."""
        assert self.checkpoint is not None
        state = self.checkpoint.get(type(self.datamodule).__qualname__)
        if state is not None:
            self.datamodule.load_state_dict(state)
        with self._explained():
            self.model.load_state_dict(self.checkpoint["state_dict"])

    def _folder(self, root: str | None) -> Path:
        if self.request.run is not None:
            return self.request.run
        domain: str = self.model.domain()
        if getattr(rank_zero_only, "rank", 0) != 0:
            return runs.ROOT / domain / "0"  # Lightning takes the folder of the first process
        if self.request.output is not None:
            return runs.named(self.request.output)
        return runs.new(domain, Path(root) if root is not None else runs.ROOT)

    def _loggers(self, given: Any) -> list[Logger]:
        assert self.run_dir is not None
        others = [] if isinstance(given, bool) else _as_list(given)
        steps = self.checkpoint["global_step"] if self.checkpoint is not None else 0
        return [RunLogger(self.run_dir, steps), *others]

    def _callbacks(self, given: Any) -> list[Callback]:
        assert self.run_dir is not None
        callbacks: list[Callback] = [Header(self.run_dir), UntrainedCandidate()]
        seed = self._get(self.config, "seed_everything")
        if seed is not False:
            callbacks.append(EpochSeed(seed))
        if given.get("enable_checkpointing") is not False:
            model = self.model
            callbacks.append(
                RunCheckpoint("best", model.monitor, model.monitor_mode(), model.untrained_margin)
            )
            callbacks.append(RunCheckpoint("last"))
        return callbacks

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.execute:
            return
        with self._explained():
            super()._run_subcommand(subcommand)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what Lightning and PyTorch raise for Ctrl-C and for other weights into a sentence."""
        try:
            yield
        except SystemExit as error:
            if not self.trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves Ctrl-C switched off
            raise Interrupted(self._how_to_resume()) from error
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            path = self._get(self.config_init, "ckpt_path")
            raise UserError(f"checkpoint {path} does not fit the model of the config: {error}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        # Set on the trainer, the model's setup sees that a checkpoint is going to be loaded.
        self.trainer.ckpt_path = arguments.pop("ckpt_path", None)
        return arguments

    def _how_to_resume(self) -> str:
        if self.subcommand != "fit" or self.run_dir is None:
            return "interrupted"
        return (
            f"interrupted: the run lies in {self.run_dir}, `mainstem fit --run {self.run_dir}` continues it"
        )

    def fit(self, **kwargs: Any) -> None:
        """Train, and leave no folder behind if the data or the model refuse before the first checkpoint."""
        try:
            self.trainer.fit(**kwargs)
        except Exception as error:
            fresh = self.request.run is None and self.trainer.is_global_zero
            if is_user_error(error) and fresh and self.run_dir is not None:
                runs.discard(self.run_dir)
            raise

    @rank_zero_only
    def after_fit(self) -> None:
        """Say how good the best checkpoint is, where it lies and what to type next."""
        best = next(iter(self._checkpoints("best")), None)
        if best is not None and best.best_model_score is not None:
            step = read_checkpoint(Path(best.best_model_path))["global_step"]
            when = f"step {step}" if step else "step 0, before training"
            console.print(f"best {best.monitor} {best.best_model_score:.4g} ({when})")
        console.print(f"run  {self.run_dir}\nnext mainstem test --run {self.run_dir}")

    def _checkpoints(self, name: str) -> list[RunCheckpoint]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, RunCheckpoint)]
        return [callback for callback in found if callback.filename == name and callback.best_model_path]

    def validate(self, **kwargs: Any) -> None:
        """Print the validation metrics."""
        self._evaluate("val", self.trainer.validate(**{**kwargs, "verbose": False}))

    def test(self, **kwargs: Any) -> None:
        """Print the test metrics and write metrics.json into the folder of the run."""
        self._evaluate("test", self.trainer.test(**{**kwargs, "verbose": False}))
        if self.run_dir is None or not self.trainer.is_global_zero:
            return
        content = {
            "checkpoint": str(self._get(self.config_init, "ckpt_path")),
            "metrics": self.metrics,
            "baselines": self.baselines,
        }
        runs.write_json(self.run_dir / "metrics.json", content)
        console.print(f"wrote {self.run_dir / 'metrics.json'}")

    def _evaluate(self, stage: str, results: Any) -> None:
        logged = {name: value for result in results for name, value in result.items()}
        self.metrics, self.baselines = split(logged, stage)
        if self.trainer.is_global_zero:
            console.print(metric_table(type(self.model), self.metrics, self.baselines))

    def predict(self, **kwargs: Any) -> None:
        """Write the predictions and say where."""
        outputs = self.trainer.predict(**{**kwargs, "return_predictions": True})
        directory = self.request.output or (self.run_dir or Path()) / "predictions"
        with runs.staging(directory) as stage:
            written = self.model.write_predictions(outputs, self.datamodule, stage)
        self.predictions = [directory / path.relative_to(stage) for path in written]
        for path in self.predictions:
            console.print(f"wrote {path}")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def quiet() -> None:
    """Silence what Lightning tells about itself; its warnings about the run stay, a line each."""
    warnings.formatwarning = _one_line
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers",
        r".*is smaller than the logging interval",
        r"Checkpoint directory .* exists and is not empty",
        r"Be aware that when using `ckpt_path`, callbacks",
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"mainstem: warning: {message}\n"


def run(argv: list[str]) -> MainstemCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` as from the command line.

    Raises:
        UserError: a mistake in the command or the configuration, in one sentence.
        Interrupted: Ctrl-C.
    """
    quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return MainstemCLI(expand(argv))


def load(argv: list[str]) -> MainstemCLI:
    """Make the model, the data and the trainer of a command, load its checkpoint, and run nothing.

    Raises:
        UserError: as `run`.
    """
    quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    cli = MainstemCLI(expand(argv), execute=False)
    cli.restore()
    return cli


def main(argv: list[str]) -> int:
    """Entry point of the four commands."""
    run(argv)
    return 0
