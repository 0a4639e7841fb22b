"""What the readers share: a list of frames that are read when asked for, and checks of folders and names."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from ..boxes import points_in_boxes
from ..scene import Array, Scene, SceneSource


class Source(SceneSource):
    """Frames on disk, named by `keys`.

    Attributes:
        keys: one for each frame, whatever `read` understands.
    """

    keys: Sequence[Any]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Scene:
        return self.read(self.keys[index])

    @abstractmethod
    def read(self, key: Any) -> Scene:
        """Read the frame called ``key``."""


def folder(root: str | Path, *parts: str, what: str) -> Path:
    """The folder ``root/parts``; a missing one is a `FileNotFoundError` that says ``what`` belongs there."""
    path = Path(root).expanduser().joinpath(*parts)
    if not path.is_dir():
        raise FileNotFoundError(f"{what}: folder '{path}' does not exist")
    return path


def listed(path: Path, what: str) -> list[str]:
    """Names in a text file, one a line; a missing one is a `FileNotFoundError` that names those beside it."""
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(
            f"{what}: the list of its frames, '{path}', does not exist; lists there: {others}"
        )
    return path.read_text(encoding="utf-8").split()


def one_of(given: str, accepted: Sequence[str] | Mapping[str, object], what: str) -> str:
    """``given``, if it is one of ``accepted``."""
    if given not in accepted:
        raise ValueError(f"{what}='{given}' is unknown: give one of {', '.join(accepted)}")
    return given


def known_classes(given: Sequence[str], accepted: Sequence[str], what: str) -> tuple[str, ...]:
    """``given``, if all of it is among ``accepted``."""
    for name in given:
        if name not in accepted:
            raise ValueError(f"{what} has no class '{name}': its classes are {', '.join(accepted)}")
    return tuple(given)


def count_points(points: Array, boxes: Array) -> Array:
    """Points inside each of ``boxes`` (M, 7): int64 ``(M,)``."""
    inside = points_in_boxes(torch.from_numpy(points[:, :3]), torch.from_numpy(boxes))
    return np.asarray(inside.sum(0).numpy(), np.int64)


def pose(quaternion: Sequence[float] | Array, translation: Sequence[float] | Array) -> Array:
    """The ``(4, 4)`` transform of a quaternion w, x, y, z and a translation in metres."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_quat(np.asarray(quaternion, np.float64), scalar_first=True).as_matrix()
    matrix[:3, 3] = translation
    return matrix


def moved(matrix: Array, points: Array) -> Array:
    """``points`` (N, 3) by the transform ``matrix`` (4, 4): float64 ``(N, 3)``."""
    return np.asarray(points.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3])
