"""Token mixers by short name. Most are rows of a family: see `linear.ROWS` and `delta.ROWS`.

>>> import torch
>>> build_mixer("gla", dim=16, heads=2)(torch.zeros(1, 5, 16)).shape
torch.Size([1, 5, 16])
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from . import delta, linear
from .aaren import AarenMixer
from .attention import AttentionMixer
from .base import Mixer
from .delta import DeltaMixer, DeltaRow
from .hyena import HyenaMixer
from .linear import LinearMixer, LinearRow
from .lssl import LSSLMixer
from .lti import LRUMixer
from .mamba import MambaMixer
from .rnn import RNNMixer, SLSTMMixer
from .rwkv6 import RWKV6Mixer
from .rwkv7 import RWKV7Mixer
from .s4d import S4DMixer
from .ttt import TTTMixer

MixerName = Literal[
    "attention",
    "linear_attention",
    "retnet",
    "gla",
    "hgrn2",
    "mamba2",
    "mlstm",
    "lightnet",
    "aaren",
    "deltanet",
    "gated_deltanet",
    "deltaproduct",
    "kda",
    "lru",
    "s4d",
    "lssl",
    "hyena",
    "mamba",
    "lstm",
    "gru",
    "slstm",
    "elman",
    "rwkv6",
    "rwkv7",
    "ttt",
]


@dataclass(frozen=True)
class Entry:
    """A short name's class, its row of choices if the class has rows, and fixed keywords."""

    mixer: type[Mixer]
    row: LinearRow | DeltaRow | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Settings with their defaults: the row's fields, or the class's keyword-only arguments."""
        if self.row is not None:
            return {f.name: getattr(self.row, f.name) for f in fields(self.row)}
        parameters = inspect.signature(self.mixer).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


MIXERS: dict[str, Entry] = {
    "attention": Entry(AttentionMixer),
    **{name: Entry(LinearMixer, row) for name, row in linear.ROWS.items()},
    "aaren": Entry(AarenMixer),
    **{name: Entry(DeltaMixer, row) for name, row in delta.ROWS.items()},
    "lru": Entry(LRUMixer),
    "s4d": Entry(S4DMixer),
    "lssl": Entry(LSSLMixer),
    "hyena": Entry(HyenaMixer),
    "mamba": Entry(MambaMixer),
    "lstm": Entry(RNNMixer, preset={"cell": "lstm"}),
    "gru": Entry(RNNMixer, preset={"cell": "gru"}),
    "slstm": Entry(SLSTMMixer),
    "elman": Entry(RNNMixer, preset={"cell": "elman"}),
    "rwkv6": Entry(RWKV6Mixer),
    "rwkv7": Entry(RWKV7Mixer),
    "ttt": Entry(TTTMixer),
}


def check_mixer(name: Any) -> None:
    """Raise ``ValueError`` unless ``name`` is one of `MIXERS`."""
    if name not in MIXERS:
        raise ValueError(f"backbone.mixer = {name!r}: choose one of {', '.join(MIXERS)}")


def build_mixer(
    name: str,
    dim: int,
    heads: int,
    *,
    backend: str = "auto",
    causal: bool = True,
    layer: int = 0,
    depth: int = 1,
    **options: Any,
) -> Mixer:
    """Build the mixer ``name``.

    Args:
        name: one of `MIXERS`.
        dim: D, width of the tokens.
        heads: H.
        backend: of the kernels.
        causal: for attention; every other mixer is causal in the direction that it runs.
        layer: place in the stack, from 0, for gates that differ from layer to layer.
        depth: height of the stack.
        options: the mixer's own settings; ``MIXERS[name].options()`` lists them with their defaults.

    Raises:
        ValueError: an unknown name, option or choice, or sizes that do not fit.
    """
    check_mixer(name)
    entry = MIXERS[name]
    accepted = entry.options()
    for option in options:
        if option not in accepted:
            names = ", ".join(accepted) or "none"
            raise ValueError(f"backbone.options: mixer {name!r} has no option {option!r}; it accepts {names}")
    keywords: dict[str, Any] = {"backend": backend, **entry.preset}
    if entry.row is not None:
        keywords["row"] = replace(entry.row, **options)
    else:
        keywords |= options
    if "depth" in inspect.signature(entry.mixer).parameters:
        keywords |= {"layer": layer, "depth": depth}
    if entry.mixer is AttentionMixer:
        keywords["causal"] = causal
    return entry.mixer(dim, heads, **keywords)


__all__ = ["MIXERS", "Entry", "Mixer", "MixerName", "build_mixer", "check_mixer"]
