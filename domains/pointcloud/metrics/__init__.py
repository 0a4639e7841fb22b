"""The field's official scores of boxes, as torchmetrics `Metric`s."""

from .argoverse2 import Argoverse2AP as Argoverse2AP
from .base import BoxMetric as BoxMetric
from .kitti import KittiAP as KittiAP
from .nuscenes import NuScenesAP as NuScenesAP
from .once import OnceAP as OnceAP
from .ranges import Range as Range
from .ranges import by_range as by_range
