"""A simulated LiDAR on simulated streets: labelled frames without any file."""

from .dataset import Simulator
from .objects import CLASSES
from .sensor import SENSORS, Sensor

__all__ = ["CLASSES", "SENSORS", "Sensor", "Simulator"]
