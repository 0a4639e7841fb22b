"""What the metrics of boxes share: they gather all boxes of all frames, and score them at the end."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..detections import Detections
from ..overlap import bev_intersection
from ..scene import Scene
from .ranges import Range, ranges_between

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """Boxes of one frame: ``boxes`` (M, 7), ``labels`` (M,), further columns (M,) by name."""

    boxes: Floats
    labels: NDArray[np.int64]
    columns: Mapping[str, Floats]


@dataclass(frozen=True)
class Frame:
    """What was found and what is labelled in one frame, and whether it has a camera's calibration."""

    found: Boxes
    labelled: Boxes
    in_image: bool = False

    @cached_property
    def overlaps(self) -> dict[str, Floats]:
        """IoU of labelled and found boxes, ``(G, D)``: ``bev`` from above, ``3d`` of the volumes."""
        one, two = self.labelled.boxes, self.found.boxes
        area = bev_intersection(torch.from_numpy(one), torch.from_numpy(two)).numpy()
        top = np.minimum((one[:, 2] + one[:, 5] / 2)[:, None], two[:, 2] + two[:, 5] / 2)
        bottom = np.maximum((one[:, 2] - one[:, 5] / 2)[:, None], two[:, 2] - two[:, 5] / 2)
        volume = area * np.maximum(top - bottom, 0)
        size_one, size_two = one[:, 3] * one[:, 4], two[:, 3] * two[:, 4]
        height_one, height_two = one[:, 5], two[:, 5]
        return {
            "bev": _ratio(area, size_one[:, None] + size_two),
            "3d": _ratio(volume, (size_one * height_one)[:, None] + size_two * height_two),
        }


def _ratio(shared: Floats, both: Floats) -> Floats:
    """Shared over united, 0 for boxes without size."""
    union = both - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class BoxMetric(Metric):
    """Gathers boxes; a subclass says what is kept of each and how they are scored.

    A frame given twice, as by samplers that fill up the last batch of several processes, counts once: frames
    are told apart by their name and their labelled boxes.

    Args:
        classes: names of the labels 0 … K−1 of the detections.
        ranges: distances in metres, such as ``(0, 30, 50, inf)``: each score is also given for the boxes
            between neighbouring distances, seen from above, its name preceded by ``0-30m/``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    frames: list[Tensor]
    found: list[Tensor]
    labelled: list[Tensor]
    found_columns: tuple[str, ...] = ("score",)
    labelled_columns: tuple[str, ...] = ()

    def __init__(self, classes: Sequence[str], ranges: Sequence[float] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = tuple(classes)
        self.ranges = ranges_between(ranges)
        for name in ("frames", "found", "labelled"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @abstractmethod
    def scores(self, frames: Sequence[Frame], within: Range) -> dict[str, float]:
        """All scores of what lies within a range; NaN for a class that has no labelled box."""

    @abstractmethod
    def labelled_rows(self, scene: Scene) -> tuple[Any, Any, dict[str, Any]]:
        """Boxes ``(M, 7)`` that are kept, their labels ``(M,)``, and their further columns."""

    def found_extra(self, detections: Detections, scene: Scene) -> dict[str, Any]:
        """Columns of the detections beside their score."""
        return {}

    def update(self, detections: Sequence[Detections], scenes: Sequence[Scene]) -> None:
        """Add frames: what was found in each, in the order of ``scenes``.

        Raises:
            ValueError: numbers of frames that differ, labels without a class, boxes that are not finite.
        """
        if len(detections) != len(scenes):
            raise ValueError(f"detections of {len(detections)} frames were given for {len(scenes)} scenes")
        frames, found, labelled = [], [], []
        for one, scene in zip(detections, scenes):
            one = one.to("cpu")
            self._check(one, scene)
            columns = {"score": one.scores.numpy(), **self.found_extra(one, scene)}
            found.append(_rows(one.boxes.numpy(), one.labels.numpy(), columns, self.found_columns))
            labelled.append(_rows(*self.labelled_rows(scene), self.labelled_columns))
            digest = blake2b(scene.id.encode() + labelled[-1].tobytes(), digest_size=8).digest()
            number = int.from_bytes(digest, "little", signed=True)
            frames.append((number, len(found[-1]), len(labelled[-1]), int("calibration" in scene.meta)))
        if frames:
            self.frames.append(torch.tensor(frames, device=self.device))
            self.found.append(torch.from_numpy(np.concatenate(found)).to(self.device))
            self.labelled.append(torch.from_numpy(np.concatenate(labelled)).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """All scores by name, from 0 to 100 unless the name says an error."""
        frames = self._gathered()
        result = self.scores(frames, Range())
        for part in self.ranges:
            result |= {f"{part.name}/{name}": value for name, value in self.scores(frames, part).items()}
        return {name: torch.tensor(value, device=self.device) for name, value in result.items()}

    def _check(self, detections: Detections, scene: Scene) -> None:
        if len(detections) and not (
            0 <= int(detections.labels.min()) <= int(detections.labels.max()) < len(self.classes)
        ):
            raise ValueError(
                f"frame {scene.id}: labels of detections must be 0 to {len(self.classes) - 1} for the classes"
                f" {', '.join(self.classes)}, got {sorted(set(detections.labels.tolist()))}"
            )
        if not (detections.boxes.isfinite().all() and detections.scores.isfinite().all()):
            raise ValueError(f"frame {scene.id}: boxes and scores of detections must be finite")

    def _gathered(self) -> list[Frame]:
        """The frames so far, each once."""
        if not len(self.frames):
            return []
        frames = dim_zero_cat(self.frames).cpu().numpy()
        found, labelled = (dim_zero_cat(rows).cpu().double().numpy() for rows in (self.found, self.labelled))
        ends = np.cumsum(frames[:, 1:3], 0)
        _, first = np.unique(frames[:, 0], return_index=True)
        return [
            Frame(
                _boxes(found[ends[i, 0] - frames[i, 1] : ends[i, 0]], self.found_columns),
                _boxes(labelled[ends[i, 1] - frames[i, 2] : ends[i, 1]], self.labelled_columns),
                bool(frames[i, 3]),
            )
            for i in sorted(first)
        ]


def _rows(boxes: Any, labels: Any, columns: Mapping[str, Any], names: Iterable[str]) -> Any:
    """One row a box, float32: the form in which processes exchange them."""
    return np.column_stack([boxes, labels, *(columns[name] for name in names)]).astype(np.float32)


def _boxes(rows: Floats, names: Sequence[str]) -> Boxes:
    columns = {name: rows[:, 8 + place] for place, name in enumerate(names)}
    return Boxes(rows[:, :7], rows[:, 7].astype(np.int64), columns)


def by_name(classes: Sequence[str], names: Iterable[Any]) -> NDArray[np.int64]:
    """Place of each name in ``classes``, −1 where it is not one of them: ``(M,)``."""
    place = {name: label for label, name in enumerate(classes)}
    return np.array([place.get(str(name), -1) for name in names], dtype=np.int64)


def mean_of(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where there is none."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


def turned(one: Any, two: Any, period: float = 2 * np.pi) -> Floats:
    """Angle between the directions ``one`` and ``two``, 0 to half the ``period``, radians."""
    difference = np.abs(one - two) % period
    return np.asarray(np.minimum(difference, period - difference))


def scale_error(one: Floats, two: Floats) -> Floats:
    """1 − IoU of boxes ``(P, 7)`` moved onto each other: ``(P,)``."""
    shared = np.minimum(one[:, 3:6], two[:, 3:6]).prod(1)
    return np.asarray(1 - shared / (one[:, 3:6].prod(1) + two[:, 3:6].prod(1) - shared))


def descending(scores: Floats) -> NDArray[np.int64]:
    """Order of falling scores; of equal ones the first stays first."""
    return np.argsort(-scores, kind="stable")
