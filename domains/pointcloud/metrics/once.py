"""ONCE's average precision."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import numpy as np

from ..scene import Scene
from .base import BoxMetric, Frame, by_name, mean_of, turned
from .matching import Case, precision_curves
from .ranges import Range

# Overlap that a match must exceed.
OVERLAPS = {"vehicle": 0.7, "car": 0.7, "bus": 0.7, "truck": 0.7, "pedestrian": 0.3, "cyclist": 0.5}
MERGED = {"Car": "Vehicle", "Bus": "Vehicle", "Truck": "Vehicle"}
STEPS = 50


class OnceAP(BoxMetric):
    """Average precision at 50 recalls of boxes that overlap in 3D and face within 90° of the labelled ones.

    Mao et al., "One Million Scenes for Autonomous Driving: ONCE Dataset", NeurIPS Datasets 2021. In percent,
    named ``vehicle`` and, by distance, ``0-30m/vehicle``; ``mAP`` and ``0-30m/mAP`` are means over classes.
    Boxes outside a range of distances, found or labelled, are neither right nor wrong there.

    Args:
        classes: names of the labels 0 … K−1.
        ranges: see `BoxMetric`.
        merged: classes that are scored as one.
        overlaps: for a class in lower case the overlap that a match must exceed.

    Raises:
        ValueError: a class without an overlap.
    """

    def __init__(
        self,
        classes: Sequence[str],
        ranges: Sequence[float] = (0, 30, 50, inf),
        merged: Mapping[str, str] = MERGED,
        overlaps: Mapping[str, float] = OVERLAPS,
        **kwargs: Any,
    ) -> None:
        super().__init__(classes, ranges, **kwargs)
        self.merged, self.overlaps = dict(merged), dict(overlaps)
        self.scored = tuple(dict.fromkeys(self.merged.get(name, name) for name in self.classes))
        unknown = [name for name in self.scored if name.lower() not in overlaps]
        if unknown:
            raise ValueError(
                f"overlaps: none for {unknown[0]}; they are given for {', '.join(overlaps)};"
                " metric=argoverse2 takes any class"
            )

    def labelled_rows(self, scene: Scene) -> tuple[Any, Any, dict[str, Any]]:
        """Boxes of the scored classes."""
        labels = by_name(self.scored, (self.merged.get(str(name), str(name)) for name in scene.names))
        return scene.boxes[labels >= 0], labels[labels >= 0], {}

    def scores(self, frames: Sequence[Frame], within: Range) -> dict[str, float]:
        """AP of each scored class, and their mean."""
        place = by_name(self.scored, (self.merged.get(name, name) for name in self.classes))
        result = {}
        for label, name in enumerate(self.scored):
            cases = [_case(frame, label, place, within) for frame in frames]
            curve = precision_curves(cases, self.overlaps[name.lower()], STEPS, repeat=True)[0]
            result[name.lower()] = 100 * float(curve[1:].mean())
        return result | {"mAP": mean_of(result.values())}


def _case(frame: Frame, label: int, place: Any, within: Range) -> Case:
    truth = np.flatnonzero(frame.labelled.labels == label)
    found = np.flatnonzero(place[frame.found.labels] == label)
    one, two = frame.labelled.boxes[truth], frame.found.boxes[found]
    facing = turned(one[:, None, 6], two[:, 6]) <= np.pi / 2
    overlap = np.where(facing, frame.overlaps["3d"][np.ix_(truth, found)], 0)
    scores = frame.found.columns["score"][found]
    none = np.zeros(len(found), bool)
    return Case(overlap, scores, within.outside(one), within.outside(two), none, np.zeros_like(overlap))
