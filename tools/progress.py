"""What a run says on the terminal besides its progress bar."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from ..core.training import DomainModule
from ..kernels import dispatch

console = Console(highlight=False, soft_wrap=True)


class Header(Callback):
    """One line when training starts: domain, mixer, backend, parameters, device, folder."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, once the data have given the model its size."""
        if trainer.is_global_zero and isinstance(pl_module, DomainModule):
            console.print(" · ".join(_header(trainer, pl_module)), "→", self.run)


def _header(trainer: Trainer, module: DomainModule) -> Iterator[str]:
    config, device = module.backbone_config, trainer.strategy.root_device
    mixer = config.mixer if isinstance(config.mixer, str) else "+".join(config.mixer)
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    yield module.domain()
    yield f"{mixer} {config.dim}×{config.depth}"
    yield f"backend {backend(config.backend, device)}"
    yield f"{parameters:,} parameters"
    yield str(device)


def backend(name: str, device: Any) -> str:
    """Name of the backend, and for ``auto`` what it comes to on ``device``."""
    if name != "auto":
        return name
    fast = "triton" if device.type == "cuda" else "cpu"
    reason = dispatch.missing(fast)
    return f"auto ({fast})" if reason is None else f"auto (chunked: {reason})"
