"""3D object detection in LiDAR point clouds: LION, a backbone of linear group RNNs over sparse voxels."""

from .data import PointCloudData
from .scene import Scene
from .simulator import Simulator
from .task import PointCloudDetector

__all__ = ["PointCloudData", "PointCloudDetector", "Scene", "Simulator"]
