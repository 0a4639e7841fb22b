"""One frame of a LiDAR: its points and, where labelled, its boxes; what every reader and simulator gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

Array = NDArray[Any]


@dataclass(frozen=True)
class Scene:
    """One frame.

    Coordinates are metres in the sensor's frame: x forward, y to the left, z up. A box is
    ``(x, y, z, dx, dy, dz, yaw)``: its centre, its length, width and height, and the angle of its length,
    in radians, counter-clockwise seen from above, 0 along x.

    Attributes:
        id: name of the frame, unique in its dataset; files of predictions bear it.
        points: ``(N, 3 + F)`` float32: x, y, z and the features.
        features: names of the F features, as in ``("intensity",)``; intensity is 0 to 1.
        boxes: ``(M, 7)`` float32.
        names: ``(M,)`` class of each box, a string.
        velocities: ``(M, 2)`` float32 m/s, NaN where unknown, or ``None``.
        attributes: further ``(M,)`` arrays by name, such as ``occlusion`` or ``track``.
        meta: what belongs to the frame as a whole, such as a calibration.

    Raises:
        ValueError: arrays whose shapes do not belong together.
    """

    id: str
    points: Array
    features: tuple[str, ...] = ()
    boxes: Array = field(default_factory=lambda: np.zeros((0, 7), np.float32))
    names: Array = field(default_factory=lambda: np.zeros(0, np.str_))
    velocities: Array | None = None
    attributes: Mapping[str, Array] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = 3 + len(self.features)
        if self.points.ndim != 2 or self.points.shape[1] != columns:
            raise ValueError(
                f"frame {self.id}: points must be (N, {columns}) for x, y, z"
                f" and {len(self.features)} features, got {self.points.shape}"
            )
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 7:
            raise ValueError(f"frame {self.id}: boxes must be (M, 7), got {self.boxes.shape}")
        count = len(self.boxes)
        beside = {"names": self.names, **self.attributes}
        if self.velocities is not None:
            beside["velocities"] = self.velocities
        for name, array in beside.items():
            if len(array) != count:
                raise ValueError(f"frame {self.id}: {name} has {len(array)} entries for {count} boxes")


class SceneSource(Dataset[Scene], ABC):
    """Frames by number: what a reader or simulator is.

    Attributes:
        classes: names of the boxes that can be learnt; a frame may hold boxes of others too.
        features: names of the points' features.
    """

    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ("intensity",)

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def __getitem__(self, index: int) -> Scene:
        """Frame ``index``, from 0."""
