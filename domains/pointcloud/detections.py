"""The boxes that a detector finds in one frame."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """Boxes of one frame, best first where a detector made them.

    Attributes:
        boxes: ``(M, 7)`` x, y, z, dx, dy, dz (metres, centre and edges), yaw (radians).
        scores: ``(M,)`` from 0 to 1.
        labels: int64 ``(M,)``, places in the list of classes.
        velocities: ``(M, 2)`` m/s, or ``None`` where the detector gives none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    velocities: Tensor | None = None

    @staticmethod
    def none(device: torch.device | str = "cpu") -> "Detections":
        """No box at all."""
        return Detections(
            torch.zeros(0, 7, device=device),
            torch.zeros(0, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Tensor) -> "Detections":
        """The boxes chosen by ``rows``, indices or booleans."""
        velocities = None if self.velocities is None else self.velocities[rows]
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], velocities)

    def to(self, device: torch.device | str) -> "Detections":
        """The same on another device."""
        velocities = None if self.velocities is None else self.velocities.to(device)
        return replace(
            self,
            boxes=self.boxes.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
            velocities=velocities,
        )
