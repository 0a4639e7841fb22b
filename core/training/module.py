from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import AdamW

from ..backbone import Backbone
from ..config import BackboneConfig
from .optim import Schedule, parameter_groups, warmup_schedule

MetricInfo = tuple[Literal["lower", "higher"], str]


class DomainModule(LightningModule, ABC):
    """What every domain shares: a backbone, its optimizer and schedule, checkpoints, how results are named.

    A metric is logged as ``<stage>/<metric>`` (``val/mse``, ``test/mse``), and a baseline's as
    ``<stage>/<baseline>/<metric>`` (``test/seasonal naive/mse``): the tables are made from these names.

    Args:
        backbone: the stack of token mixers.
        optimizer: given the parameter groups, makes the optimizer; norms, biases and gates do not decay.
        schedule: ``"constant"``, or ``"cosine"`` from the full learning rate to zero at the end of training.
        warmup_steps: optimizer steps over which the learning rate first rises linearly.
    """

    summary_metrics: ClassVar[dict[str, MetricInfo]] = {}
    """Metric name -> (which direction is better, unit), in the order of the tables."""
    monitor: ClassVar[str] = "val/loss"
    """The logged metric that chooses the best checkpoint."""
    untrained_margin: ClassVar[float] = 0.0
    """Share of the untrained model's score by which a trained one must be better to be chosen instead."""
    unsaved: ClassVar[tuple[str, ...]] = ("optimizer",)
    """Arguments that do not survive weights_only loading, such as callables; a run's config.yaml has them."""

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule={schedule!r} is unknown: choose one of {', '.join(get_args(Schedule))}"
            )
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
        self.save_hyperparameters(ignore=list(self.unsaved))
        self.backbone_config = as_config(backbone)
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps

    @classmethod
    def domain(cls) -> str:
        """Name of the domain, which is also the name of its folder of runs."""
        parts = cls.__module__.split(".")
        return parts[parts.index("domains") + 1] if "domains" in parts[:-1] else parts[-1]

    @classmethod
    def kind(cls) -> str:
        """Name that a checkpoint bears, which moving the class to another file does not change."""
        return f"{cls.domain()}.{cls.__name__}"

    @classmethod
    def shown(cls, name: str) -> bool:
        """Whether the tables on the terminal list a metric; files always do."""
        return True

    @classmethod
    def monitor_mode(cls) -> Literal["min", "max"]:
        """Whether the best checkpoint has the smallest or the largest monitored metric."""
        direction, _ = cls.summary_metrics.get(cls.monitor.rpartition("/")[2], ("lower", ""))
        return "max" if direction == "higher" else "min"

    def token_mixer(self) -> nn.Module:
        """What mixes the tokens: a module with a ``config`` that maps ``(B, T, D)`` to ``(B, T, D)``.

        Where there are several alike, the first.

        Raises:
            ValueError: the model has no backbone, or several.
        """
        found = [part for part in self.modules() if isinstance(part, Backbone)]
        if len(found) != 1:
            raise ValueError(f"compare exchanges the mixer of one backbone, and this model has {len(found)}")
        return found[0]

    def count_token_mixers(self, config: BackboneConfig) -> int:
        """Parameters of all that mixes tokens, were it of ``config``; makes none of them."""
        with torch.device("meta"):
            return parameters(config.build())

    @abstractmethod
    def write_predictions(
        self, outputs: list[Any], datamodule: LightningDataModule, directory: Path
    ) -> list[Path]:
        """Write what ``predict_step`` returned for each batch into ``directory``; return the files."""

    def configure_optimizers(self) -> Any:
        """Make the optimizer over the decayed and the other parameters, and its schedule if there is one."""
        optimizer = self.optimizer(parameter_groups(self.named_parameters()))
        if self.schedule == "constant" and self.warmup_steps == 0:
            return optimizer
        scheduler = warmup_schedule(
            optimizer, self.schedule, self.warmup_steps, self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the model and leave only plain values, so that the file loads with ``weights_only=True``."""
        checkpoint["model"] = self.kind()
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {name: plain(value) for name, value in hparams.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another class, in one sentence.

        Raises:
            ValueError: it holds another class.
        """
        saved = checkpoint.get("model", "model of another program")
        if saved != self.kind():
            raise ValueError(f"the checkpoint holds a {saved}, not a {self.kind()}")


def parameters(module: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def as_config(backbone: BackboneConfig | dict[str, Any]) -> BackboneConfig:
    """Accept the plain form in which a checkpoint keeps the configuration."""
    return BackboneConfig(**backbone) if isinstance(backbone, dict) else backbone


def plain(value: Any) -> Any:
    """Turn dataclasses into dictionaries, at any depth."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
