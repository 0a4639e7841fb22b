"""Finds the size at which each mixer's whole model has as many parameters as the configuration's own."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..core.config import BackboneConfig
from . import train
from .matching import Size, match
from .recorder import Sized, backbone_of, parameters


@dataclass(frozen=True)
class Reference:
    """The configuration's own model."""

    config: BackboneConfig
    parameters: int
    """Of the whole model."""

    @property
    def outside(self) -> int:
        """Parameters around the backbone."""
        return self.parameters - count_backbone(self.config)


def count_backbone(config: BackboneConfig) -> int:
    """Count the parameters of a backbone without making them."""
    with torch.device("meta"):
        return parameters(config.build())


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
            return Reference(backbone_of(sized.module).config, parameters(sized.module))
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
            count = _counter(other, outside)
            sizes[mixer] = match(count, reference.parameters, dim=dim, heads=other.heads)
    return own if isinstance(own, str) else "+".join(own), sizes


def _counter(config: BackboneConfig, outside: Callable[[int], int]) -> Callable[[int, int], int]:
    def count(dim: int, hidden: int) -> int:
        changes: dict[str, Any] = {"dim": dim, "hidden": hidden}
        return outside(dim) + count_backbone(replace(config, **changes))

    return count
