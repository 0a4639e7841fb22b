"""The backbone and its parts."""

from .backbone import Backbone
from .config import BackboneConfig
from .mixers import MIXERS, MixerName, build_mixer
from .state import BackboneState, State
from .system import System

__all__ = [
    "MIXERS",
    "Backbone",
    "BackboneConfig",
    "BackboneState",
    "MixerName",
    "State",
    "System",
    "build_mixer",
]
