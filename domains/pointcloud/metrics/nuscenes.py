"""nuScenes' detection scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from ..detections import Detections
from ..scene import Scene
from .base import Boxes, BoxMetric, Floats, Frame, by_name, descending, mean_of, scale_error, turned
from .matching import match_nearest
from .ranges import Range

# Metres within which boxes of a class are looked at.
CLASS_RANGES = {
    "car": 50.0,
    "truck": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "construction_vehicle": 50.0,
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
ATTRIBUTES = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)
THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # metres between centres, seen from above
ERROR_THRESHOLD = 2.0
ERRORS = ("ate", "ase", "aoe", "ave", "aae")
UNDEFINED = {"traffic_cone": ("aoe", "ave", "aae"), "barrier": ("ave", "aae")}
MOST = 500  # boxes in a frame
RECALLS = np.linspace(0, 1, 101)
FIRST = 11  # recall and precision of 0.1 and less do not count


class NuScenesAP(BoxMetric):
    """Average precision by distance of centres, the five errors of what is right at 2 m, and NDS.

    Caesar et al., "nuScenes: A multimodal dataset for autonomous driving", CVPR 2020, and its kit.
    Named ``car/ap@0.5`` and ``car/ap`` (mean over 0.5, 1, 2 and 4 m), ``mAP``, ``NDS`` in percent;
    ``car/ate`` (m), ``car/ase``, ``car/aoe`` (radians), ``car/ave`` (m/s), ``car/aae`` and their means
    ``mATE`` … ``mAAE``. Distances are from the sensor. Means are over the classes that have labelled boxes.

    Detectors give no attribute: it follows from class and speed, moving above 0.2 m/s. Labelled boxes give
    theirs as ``attribute``; without it the error is 1, as it is for speed where velocities are missing.

    Args:
        classes: names of the labels 0 … K−1.
        ranges: see `BoxMetric`; boxes outside a range, found or labelled, are left out.
        class_ranges: metres within which boxes of each class are looked at.

    Raises:
        ValueError: a class without a range.
    """

    found_columns = ("score", "vx", "vy", "attribute")
    labelled_columns = ("vx", "vy", "attribute")

    def __init__(
        self,
        classes: Sequence[str],
        ranges: Sequence[float] = (),
        class_ranges: Mapping[str, float] = CLASS_RANGES,
        **kwargs: Any,
    ) -> None:
        super().__init__(classes, ranges, **kwargs)
        self.class_ranges = dict(class_ranges)
        unknown = [name for name in self.classes if name not in class_ranges]
        if unknown:
            raise ValueError(f"class_ranges: none for {unknown[0]}; given for {', '.join(class_ranges)}")

    def found_extra(self, detections: Detections, scene: Scene) -> dict[str, Any]:
        """Velocities, and the attribute that they suggest."""
        speed = np.full((len(detections), 2), np.nan)
        if detections.velocities is not None:
            speed = detections.velocities.double().numpy()
        moving = np.hypot(*speed.T) > 0.2
        names = [_attribute(self.classes[int(k)], bool(m)) for k, m in zip(detections.labels, moving)]
        return {"vx": speed[:, 0], "vy": speed[:, 1], "attribute": by_name(ATTRIBUTES, names)}

    def labelled_rows(self, scene: Scene) -> tuple[Any, Any, dict[str, Any]]:
        """Boxes of the classes that hold a point, where ``points`` are given."""
        labels = by_name(self.classes, scene.names)
        kept = (labels >= 0) & (np.asarray(scene.attributes.get("points", np.ones(len(labels)))) > 0)
        speed = np.full((len(labels), 2), np.nan) if scene.velocities is None else scene.velocities
        attribute = by_name(ATTRIBUTES, scene.attributes.get("attribute", [""] * len(labels)))
        columns = {"vx": speed[kept, 0], "vy": speed[kept, 1], "attribute": attribute[kept]}
        return scene.boxes[kept], labels[kept], columns

    def scores(self, frames: Sequence[Frame], within: Range) -> dict[str, float]:
        """AP and errors of each class, their means, and NDS."""
        result: dict[str, float] = {}
        for label, name in enumerate(self.classes):
            limit = Range(0, self.class_ranges[name])
            labelled = [_chosen(frame.labelled, label, within, limit) for frame in frames]
            found = [_chosen(_best(frame.found), label, within, limit) for frame in frames]
            values = {f"ap@{far:g}": _Curve(labelled, found, far).precision() for far in THRESHOLDS}
            values["ap"] = float(np.mean(list(values.values())))
            errors = _Curve(labelled, found, ERROR_THRESHOLD).errors(
                np.pi if name == "barrier" else 2 * np.pi
            )
            values |= errors | dict.fromkeys(UNDEFINED.get(name, ()), float("nan"))
            result |= {f"{name}/{key}": value for key, value in values.items()}
        means = {
            f"m{part.upper()}": mean_of(result[f"{name}/{part}"] for name in self.classes) for part in ERRORS
        }
        precision = mean_of(result[f"{name}/ap"] for name in self.classes)
        good = sum(1 - min(1.0, 1.0 if error != error else error) for error in means.values())
        return result | means | {"mAP": precision, "NDS": (5 * precision + 100 * good) / 10}


def _best(boxes: Boxes) -> Boxes:
    return _rows(boxes, descending(boxes.columns["score"])[:MOST])


def _chosen(boxes: Boxes, label: int, within: Range, limit: Range) -> Boxes:
    outside = within.outside(boxes.boxes) | limit.outside(boxes.boxes)
    return _rows(boxes, np.flatnonzero((boxes.labels == label) & ~outside))


def _rows(boxes: Boxes, rows: Any) -> Boxes:
    columns = {name: column[rows] for name, column in boxes.columns.items()}
    return Boxes(boxes.boxes[rows], boxes.labels[rows], columns)


class _Curve:
    """What is right among the boxes of one class, best first, at one distance.

    Args:
        labelled: boxes of each frame.
        found: boxes of each frame, best first.
        limit: metres.
    """

    def __init__(self, labelled: Sequence[Boxes], found: Sequence[Boxes], limit: float) -> None:
        matches = [
            match_nearest(cdist(two.boxes[:, :2], one.boxes[:, :2]), limit)
            for one, two in zip(labelled, found)
        ]
        self.count = sum(len(one.boxes) for one in labelled)
        scores = np.concatenate([np.zeros(0), *(two.columns["score"] for two in found)])
        self.order = descending(scores)
        self.scores = scores[self.order]
        self.right = np.concatenate([np.zeros(0, np.int64), *matches])[self.order] >= 0
        self._matches, self._labelled, self._found = matches, labelled, found
        hits = np.cumsum(self.right)
        self.recall = hits / max(self.count, 1)
        self.curve = hits / np.arange(1, len(hits) + 1)

    def precision(self) -> float:
        """AP in percent; NaN without labelled boxes."""
        if not self.count:
            return float("nan")
        if not self.right.any():
            return 0.0
        curve = np.interp(RECALLS, self.recall, self.curve, right=0)
        return 100 * float(np.maximum(curve[FIRST:] - 0.1, 0).mean()) / 0.9

    def errors(self, period: float) -> dict[str, float]:
        """Mean of each error over the recalls above 0.1 that are reached; 1 where there is none.

        At a recall the error is that of all right boxes with at least the score that stands for it.
        """
        if not self.count:
            return dict.fromkeys(ERRORS, float("nan"))
        score = np.interp(RECALLS, self.recall, self.scores, right=0) if len(self.scores) else np.zeros(101)
        last = int(np.flatnonzero(score)[-1]) if score.any() else 0
        if last < FIRST or not self.right.any():
            return dict.fromkeys(ERRORS, 1.0)
        pairs = [
            (_rows(one, match[match >= 0]), _rows(two, np.flatnonzero(match >= 0)))
            for one, two, match in zip(self._labelled, self._found, self._matches)
        ]
        raw = np.concatenate([_pair_errors(one, two, period) for one, two in pairs])
        # Right boxes of all frames, best first.
        rank = np.full(len(self.right), -1)
        rank[np.flatnonzero(np.concatenate(self._matches) >= 0)] = np.arange(len(raw))
        raw = raw[rank[self.order][self.right]]
        mine = self.scores[self.right]
        result = {}
        for name, column in zip(ERRORS, raw.T):
            mean = np.interp(score[::-1], mine[::-1], _running_mean(column)[::-1])[::-1]
            result[name] = float(mean[FIRST : last + 1].mean())
        return result


def _pair_errors(one: Boxes, two: Boxes, period: float) -> Floats:
    """The five errors of pairs of boxes: ``(P, 5)``, NaN where unknown."""
    a, b = one.columns, two.columns
    differs = np.where(a["attribute"] < 0, np.nan, (a["attribute"] != b["attribute"]).astype(float))
    return np.stack(
        [
            np.hypot(*(one.boxes[:, :2] - two.boxes[:, :2]).T),
            scale_error(one.boxes, two.boxes),
            turned(one.boxes[:, 6], two.boxes[:, 6], period),
            np.hypot(a["vx"] - b["vx"], a["vy"] - b["vy"]),
            differs,
        ],
        1,
    )


def _running_mean(values: Floats) -> Floats:
    """Mean of the values so far that are known, 0 before the first; ones where none is known at all."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    return np.asarray(np.nancumsum(values) / np.maximum(np.cumsum(known), 1))


def _attribute(name: str, moving: bool) -> str:
    """Most likely attribute of a class that moves or stands; empty where it has none."""
    if name in ("car", "truck", "bus", "trailer", "construction_vehicle"):
        return "vehicle.moving" if moving else "vehicle.parked"
    if name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    return ("pedestrian.moving" if moving else "pedestrian.standing") if name == "pedestrian" else ""
