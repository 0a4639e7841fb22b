"""One frame of three objects, of three classes, on which the heads that find centres are tested."""

import torch

from mainstem.domains.pointcloud.grid import Grid

GRID = Grid((0.0, -6.4, -3.0), (12.8, 6.4, 1.0), (0.4, 0.4, 0.25))
CLASSES = ("Car", "Pedestrian", "Cyclist")
BOXES = torch.tensor(
    [
        [3.1, 2.1, -1.0, 4.0, 1.7, 1.5, 0.3],
        [9.3, -3.9, -0.9, 0.8, 0.7, 1.7, -2.9],
        [10.1, 5.1, -0.8, 1.8, 0.6, 1.7, 1.7],
    ]
)
LABELS = torch.tensor([0, 1, 2])
SPEEDS = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [0.0, -3.0]])
NONE = (torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))
