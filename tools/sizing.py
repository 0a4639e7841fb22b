"""Finds the size at which each mixer's whole model has as many parameters as the configuration's own."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..core.config import BackboneConfig
from ..core.training.module import DomainModule, parameters
from . import train
from .matching import Size, match
from .recorder import Sized


@dataclass(frozen=True)
class Reference:
    """The configuration's own model."""

    module: DomainModule

    @property
    def config(self) -> BackboneConfig:
        """Of the backbone."""
        return self.module.backbone_config

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameters(self.module)

    @property
    def outside(self) -> int:
        """Parameters around what mixes the tokens."""
        return self.parameters - self.module.count_token_mixers(self.config)


def build(arguments: Sequence[str]) -> Reference:
    """Make the model of a configuration, with the data that give it its size."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            "--trainer.enable_progress_bar=false",
            "--trainer.callbacks+=mainstem.tools.recorder.SizeOnly",
        ]
        try:
            train.run(["fit", *arguments, *quiet, f"--output={Path(folder) / 'run'}"])
        except Sized as sized:
            return Reference(sized.module)
    raise RuntimeError("the training ended before it began")


def find_sizes(arguments: Sequence[str], mixers: Sequence[str]) -> tuple[str, dict[str, Size]]:
    """Match every mixer to the configuration's own model; returns the latter's mixer and the sizes."""
    reference = build(arguments)
    own, dim = reference.config.mixer, reference.config.dim

    @cache
    def outside(width: int) -> int:
        if width == dim:
            return reference.outside
        return build([*arguments, f"--model.backbone.dim={width}"]).outside

    sizes: dict[str, Size] = {}
    for mixer in mixers:
        if mixer == own:
            total = reference.parameters
            sizes[mixer] = Size(dim=dim, hidden=reference.config.hidden, parameters=total, target=total)
        else:
            changes: dict[str, Any] = {"mixer": mixer, "options": {}}
            other = replace(reference.config, **changes)
            count = _counter(reference.module, other, outside)
            sizes[mixer] = match(count, reference.parameters, dim=dim, heads=other.heads)
    return own if isinstance(own, str) else "+".join(own), sizes


def _counter(
    module: DomainModule, config: BackboneConfig, outside: Callable[[int], int]
) -> Callable[[int, int], int]:
    def count(dim: int, hidden: int) -> int:
        changes: dict[str, Any] = {"dim": dim, "hidden": hidden}
        return outside(dim) + module.count_token_mixers(replace(config, **changes))

    return count
