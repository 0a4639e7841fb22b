"""Mainstem: one linear-RNN backbone with fast scans, and the domains that flow into it."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Backbone", "BackboneConfig", "__version__"]

if TYPE_CHECKING:
    from .core import Backbone, BackboneConfig


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `mainstem --help` must not pay for it.
    if name in ("Backbone", "BackboneConfig"):
        from . import core

        return getattr(core, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
