"""Argoverse 2's detection scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from ..scene import Scene
from .base import BoxMetric, Floats, Frame, by_name, descending, mean_of, scale_error, turned
from .matching import envelope
from .ranges import Range

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # metres between centres
ERROR_THRESHOLD = 2.0
WORST = (2.0, 1.0, np.pi)  # of the errors, and what they are divided by
RECALLS = np.linspace(0, 1, 100)
MOST = 100  # boxes of a class in a frame


class Argoverse2AP(BoxMetric):
    """Average precision by distance of centres, errors of translation, scale and orientation, and CDS.

    Wilson et al., "Argoverse 2: Next Generation Datasets for Self-Driving Perception and Forecasting",
    NeurIPS Datasets 2021, and its evaluation. Each box found goes to the labelled box nearest to it; of
    those at one labelled box the best scored is right if it is near enough. ``bus/ap`` is the mean over
    0.5, 1, 2 and 4 m and ``bus/cds`` is AP · mean(1 − error / worst), in percent; ``bus/ate`` (m),
    ``bus/ase`` and ``bus/aoe`` (radians) are means over what is right at 2 m. ``mAP``, ``mATE``, ``mASE``,
    ``mAOE`` and ``CDS`` are means over the classes that have labelled boxes. The map's region of interest is
    not looked at.

    Args:
        classes: names of the labels 0 … K−1.
        ranges: see `BoxMetric`; boxes outside a range, found or labelled, are left out.
        max_range: metres; boxes whose centre is further away are left out, as are labelled ones that hold
            no point (the attribute ``points``, where there is one).
    """

    def __init__(
        self, classes: Sequence[str], ranges: Sequence[float] = (), max_range: float = 150.0, **kwargs: Any
    ) -> None:
        super().__init__(classes, ranges, **kwargs)
        self.max_range = max_range

    def labelled_rows(self, scene: Scene) -> tuple[Any, Any, dict[str, Any]]:
        """Boxes of the classes that hold a point."""
        labels = by_name(self.classes, scene.names)
        kept = (labels >= 0) & (np.asarray(scene.attributes.get("points", np.ones(len(labels)))) > 0)
        return scene.boxes[kept], labels[kept], {}

    def scores(self, frames: Sequence[Frame], within: Range) -> dict[str, float]:
        """AP, errors and CDS of each class, and their means."""
        result: dict[str, float] = {}
        for label, name in enumerate(self.classes):
            pairs = [self._pairs(frame, label, within) for frame in frames]
            result |= {f"{name.lower()}/{key}": value for key, value in _class_scores(pairs).items()}
        means = {"ap": "mAP", "ate": "mATE", "ase": "mASE", "aoe": "mAOE", "cds": "CDS"}
        keys = [name.lower() for name in self.classes]
        return result | {
            mean: mean_of(result[f"{key}/{part}"] for key in keys) for part, mean in means.items()
        }

    def _pairs(self, frame: Frame, label: int, within: Range) -> "_Pairs":
        """The boxes of one class of one frame, each found one with the labelled one that it may stand for."""
        one, two = (boxes.boxes[boxes.labels == label] for boxes in (frame.labelled, frame.found))
        scores = frame.found.columns["score"][frame.found.labels == label]
        order = descending(scores)
        one, two, scores = one[self._looked_at(one, within)], two[order], scores[order]
        kept = np.flatnonzero(self._looked_at(two, within))[:MOST]
        two, scores = two[kept], scores[kept]
        distance, errors = np.full(len(two), np.inf), np.zeros((len(two), 3))
        if len(one) and len(two):
            apart = cdist(two[:, :3], one[:, :3])
            nearest, first = np.unique(apart.argmin(1), return_index=True)
            mine, other = one[nearest], two[first]
            distance[first] = apart[first, nearest]
            errors[first] = np.stack(
                [distance[first], scale_error(mine, other), turned(mine[:, 6], other[:, 6])], 1
            )
        return _Pairs(scores, distance, errors, len(one))

    def _looked_at(self, boxes: Floats, within: Range) -> Any:
        return (np.linalg.norm(boxes[:, :3], axis=1) < self.max_range) & ~within.outside(boxes)


@dataclass(frozen=True)
class _Pairs:
    """Found boxes (D,): score, metres to the labelled box (infinite without one), errors (D, 3)."""

    scores: Floats
    distance: Floats
    errors: Floats
    labelled: int


def _class_scores(pairs: Sequence[_Pairs]) -> dict[str, float]:
    count = sum(one.labelled for one in pairs)
    if not count:
        return dict.fromkeys(("ap", "ate", "ase", "aoe", "cds"), float("nan"))
    order = descending(np.concatenate([one.scores for one in pairs]))
    distance = np.concatenate([one.distance for one in pairs])[order]
    precision = float(np.mean([_average_precision(distance < limit, count) for limit in THRESHOLDS]))
    errors = np.concatenate([one.errors for one in pairs])[order][distance < ERROR_THRESHOLD]
    mean = errors.mean(0) if len(errors) else np.array(WORST)
    ate, ase, aoe = (float(value) for value in mean)
    score = precision * float(np.mean(1 - mean / WORST))
    return {"ap": 100 * precision, "ate": ate, "ase": ase, "aoe": aoe, "cds": 100 * score}


def _average_precision(right: Any, count: int) -> float:
    if not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = envelope(hits / np.arange(1, len(right) + 1))
    return float(np.interp(RECALLS, hits / count, precision, right=0).mean())
