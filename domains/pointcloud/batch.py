"""What the network gets: the points and labelled boxes of some frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scene import Scene


@dataclass(frozen=True)
class SceneBatch:
    """The points of B frames, laid end to end.

    Attributes:
        points: float32 ``(N, 3 + F)``.
        sample: int64 ``(N,)``: which frame a point belongs to.
        boxes: for each frame ``(M, 7)``, of the known classes only.
        labels: for each frame int64 ``(M,)``, places in the list of classes.
        velocities: for each frame ``(M, 2)``, NaN where unknown.
        scenes: the frames themselves, with all their boxes; they stay on the CPU.
    """

    points: Tensor
    sample: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    velocities: list[Tensor]
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def to(self, device: Any, non_blocking: bool = False) -> "SceneBatch":
        """The same with its tensors on ``device``."""

        def move(tensors: list[Tensor]) -> list[Tensor]:
            return [one.to(device, non_blocking=non_blocking) for one in tensors]

        points, sample = move([self.points, self.sample])
        return replace(
            self,
            points=points,
            sample=sample,
            boxes=move(self.boxes),
            labels=move(self.labels),
            velocities=move(self.velocities),
        )


def collate(scenes: Sequence[Scene], classes: Sequence[str]) -> SceneBatch:
    """Lay frames end to end; boxes of other classes than ``classes`` stay in the scenes only."""
    place = {name: label for label, name in enumerate(classes)}
    boxes, labels, velocities = [], [], []
    for scene in scenes:
        known = np.array([str(name) in place for name in scene.names], dtype=bool)
        boxes.append(torch.from_numpy(scene.boxes[known].astype(np.float32)))
        labels.append(torch.tensor([place[str(name)] for name in scene.names[known]], dtype=torch.int64))
        speed = scene.velocities
        speed = np.full((len(scene.boxes), 2), np.nan, np.float32) if speed is None else speed
        velocities.append(torch.from_numpy(speed[known].astype(np.float32)))
    points = [torch.from_numpy(np.ascontiguousarray(scene.points, np.float32)) for scene in scenes]
    sample = [torch.full((len(cloud),), row, dtype=torch.int64) for row, cloud in enumerate(points)]
    return SceneBatch(torch.cat(points), torch.cat(sample), boxes, labels, velocities, list(scenes))
