"""Callbacks with which a comparison looks into a training: sizes before it, rates and curves during it."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ..core.training import DomainModule
from .measure import current_memory, seconds_per_call


class Sized(Exception):
    """Carries a model that its data have given its size out of a training that need not go on."""

    def __init__(self, module: DomainModule) -> None:
        super().__init__()
        self.module = module


class SizeOnly(Callback):
    """End a training before its first step by raising `Sized`."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise as soon as the model is complete."""
        assert isinstance(pl_module, DomainModule)
        raise Sized(pl_module)


class Recorder(Callback):
    """Count the backbone's training tokens, time the training steps and keep the validation curve."""

    def __init__(self) -> None:
        self.tokens = self.start_bytes = 0
        self.seconds = 0.0
        self.first_step = True
        self.shape: tuple[int, int] | None = None
        self.curve: list[tuple[int, float]] = []
        self._begin = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the memory, and listen to the backbone."""
        device = trainer.strategy.root_device
        self.start_bytes = current_memory(device)
        assert isinstance(pl_module, DomainModule)
        pl_module.token_mixer().register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], _: Any) -> None:
        x: Tensor = given[0] if given else keywords["x"]
        lengths = keywords.get("lengths")
        if module.training:
            self.tokens += x.shape[0] * x.shape[1] if lengths is None else int(lengths.sum())
            cu_seqlens = keywords.get("cu_seqlens")
            length = x.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
            if self.shape is None or length > self.shape[1]:
                self.shape = (max(1, x.shape[0] * x.shape[1] // length), length)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._begin = self._now(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and start it anew after the first step, which compiles kernels."""
        self.seconds += self._now(trainer) - self._begin
        if self.first_step and trainer.estimated_stepping_batches > 1:
            self.first_step, self.tokens, self.seconds = False, 0, 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the curve."""
        if isinstance(pl_module, DomainModule) and not trainer.sanity_checking:
            value = trainer.callback_metrics.get(pl_module.monitor)
            if value is not None:
                self.curve.append((trainer.global_step, float(value)))

    @staticmethod
    def _now(trainer: Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def inference_us(backbone: nn.Module, dim: int, shape: tuple[int, int]) -> float:
    """Measure microseconds a token of a forward pass over ``shape`` = (sequences, tokens)."""
    first = next(backbone.parameters())
    x = torch.randn(*shape, dim, device=first.device, dtype=first.dtype)
    threads = torch.get_num_threads()
    backbone.eval()
    with torch.no_grad():
        seconds = seconds_per_call(lambda: backbone(x), first.device, threads=threads, limit=0.3)
    return seconds / (shape[0] * shape[1]) * 1e6
