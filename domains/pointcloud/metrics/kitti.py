"""KITTI's average precision, by the rules of its development kit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..detections import Detections
from ..kitti_labels import IMAGE_BOX, boxes_to_camera
from ..scene import Scene
from .base import Boxes, BoxMetric, Floats, Frame, by_name, mean_of
from .matching import Case, precision_curves
from .ranges import Range

LEVELS = ("easy", "moderate", "hard")
# Of a box that counts: at least so many pixels high, and at most so much occluded and truncated.
MIN_HEIGHT, MAX_OCCLUSION, MAX_TRUNCATION = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)
# Labelled boxes of these classes are neither missed nor wrong when found as their neighbour.
NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
# Overlap that a match must exceed, strict and loose.
OVERLAPS = {
    "car": (0.7, 0.5),
    "van": (0.7, 0.5),
    "truck": (0.7, 0.5),
    "bus": (0.7, 0.5),
    "tram": (0.7, 0.5),
    "pedestrian": (0.5, 0.25),
    "person_sitting": (0.5, 0.25),
    "cyclist": (0.5, 0.25),
}
STEPS = 40
_NEVER = len(LEVELS)
_REGION = -1


class KittiAP(BoxMetric):
    """Average precision from above (BEV), in 3D and in the image (2D), and the orientation score AOS.

    Geiger et al., "Are we ready for autonomous driving?", CVPR 2012; 40 recall positions: Simonelli et al.,
    "Disentangling Monocular 3D Object Detection", ICCV 2019. In percent, named ``car/3d@0.7/moderate`` (40
    positions) and ``car/3d@0.7/moderate/r11`` (11); ``mAP`` is the mean over classes of 3D, strict and
    moderate. A class without labelled boxes that count gives NaN, and has no part in the mean.

    A labelled box counts at the levels that its height in the image, ``occlusion`` and ``truncation`` allow;
    a scene without these attributes gives ``difficulty`` (0 easy to 3 none); one without either counts at
    all levels. Boxes that do not count, and those of a neighbouring class, may be found or missed at will; so
    may detections lower than the level asks for in the image, where the scene has a ``calibration``. 2D and
    AOS are given when all scenes have one, and there ``ignore`` regions of the image excuse false positives.
    Overlaps are taken in the LiDAR's frame, not the camera's, which is turned against it by a degree or less.

    Args:
        classes: names of the labels 0 … K−1.
        ranges: see `BoxMetric`; a labelled box may be found by one outside its range, which is never wrong.
        min_points: labelled boxes with fewer points (the attribute ``points``) do not count.
        overlaps: for a class in lower case the strict and the loose overlap.
        neighbours: for a class of labelled boxes the class it may be found as.
        devkit: also follow the kit where there are at most 40 labelled boxes: it gives each true positive one
            recall position only, so that 10 boxes, perfectly found, score 22.5.
    """

    found_columns = ("score", "alpha", *IMAGE_BOX)
    labelled_columns = ("level", "alpha", *IMAGE_BOX)

    def __init__(
        self,
        classes: Sequence[str],
        ranges: Sequence[float] = (),
        min_points: int = 0,
        overlaps: Mapping[str, tuple[float, float]] = OVERLAPS,
        neighbours: Mapping[str, str] = NEIGHBOURS,
        devkit: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(classes, ranges, **kwargs)
        unknown = [name for name in self.classes if name.lower() not in overlaps]
        if unknown:
            raise ValueError(
                f"overlaps: none for the class {unknown[0]}; they are given for {', '.join(overlaps)};"
                " metric=argoverse2 takes any class"
            )
        self.min_points, self.overlaps, self.devkit = min_points, dict(overlaps), devkit
        self.neighbours = dict(neighbours)

    def found_extra(self, detections: Detections, scene: Scene) -> dict[str, Any]:
        """The angle of observation and the box in the image; NaN without a calibration."""
        columns = {name: np.full(len(detections), np.nan) for name in ("alpha", *IMAGE_BOX)}
        calibration = scene.meta.get("calibration")
        if calibration is not None:
            boxes = detections.boxes.double().numpy()
            columns["alpha"] = _alpha(boxes, calibration)
            columns |= dict(zip(IMAGE_BOX, calibration.image_boxes(boxes)[0].T))
        return columns

    def labelled_rows(self, scene: Scene) -> tuple[Any, Any, dict[str, Any]]:
        """Boxes of the classes; those of neighbours, at no level; regions of the image, without a class."""
        labels = by_name(self.classes, scene.names)
        beside = by_name(self.classes, (self.neighbours.get(str(name), "") for name in scene.names))
        own, other = np.flatnonzero(labels >= 0), np.flatnonzero(beside >= 0)
        rows = np.concatenate([own, other])
        image, alpha = np.full((len(scene.boxes), 4), np.nan), np.full(len(scene.boxes), np.nan)
        if "calibration" in scene.meta:
            alpha = _alpha(scene.boxes, scene.meta["calibration"])
            image = scene.meta["calibration"].image_boxes(scene.boxes)[0]
        image = np.stack([scene.attributes.get(side, image[:, i]) for i, side in enumerate(IMAGE_BOX)], 1)
        alpha = np.asarray(scene.attributes.get("alpha", alpha))
        regions = np.asarray(scene.meta.get("ignore", ())).reshape(-1, 4)
        count = len(regions)
        columns = {
            "level": np.concatenate([self._level(scene)[own], np.full(len(other) + count, _NEVER)]),
            "alpha": np.concatenate([alpha[rows], np.zeros(count)]),
            **dict(zip(IMAGE_BOX, np.concatenate([image[rows], regions]).T)),
        }
        boxes = np.concatenate([scene.boxes[rows], np.zeros((count, 7))])
        return boxes, np.concatenate([labels[own], beside[other], np.full(count, _REGION)]), columns

    def _level(self, scene: Scene) -> NDArray[np.int64]:
        """First level at which each labelled box counts: ``(M,)``."""
        given = scene.attributes
        level = np.zeros(len(scene.boxes), np.int64)
        if {"occlusion", "truncation", "image_top", "image_bottom"} <= set(given):
            height = np.asarray(given["image_bottom"], np.float64) - np.asarray(
                given["image_top"], np.float64
            )
            # As written, with two digits: in float32 0.3 may lie above 0.3.
            height, truncation = height.round(3), np.asarray(given["truncation"], np.float64).round(4)
            for pixels, occlusion, share in zip(MIN_HEIGHT, MAX_OCCLUSION, MAX_TRUNCATION):
                level += ~((height > pixels) & (given["occlusion"] <= occlusion) & (truncation <= share))
        elif "difficulty" in given:
            level = np.asarray(given["difficulty"], np.int64)
        if self.min_points and len(scene.boxes):
            if "points" not in given:
                raise ValueError(
                    f"frame {scene.id}: min_points={self.min_points} needs the attribute 'points';"
                    f" its boxes have {', '.join(given) or 'none'}"
                )
            level = np.where(np.asarray(given["points"]) < self.min_points, _NEVER, level)
        return level

    def scores(self, frames: Sequence[Frame], within: Range) -> dict[str, float]:
        """AP of each class, kind, overlap and level; see the class."""
        result: dict[str, float] = {}
        for label, name in enumerate(self.classes):
            kinds = [(kind, overlap) for kind in ("bev", "3d") for overlap in self.overlaps[name.lower()]]
            if frames and all(frame.in_image for frame in frames):
                kinds.append(("2d", self.overlaps[name.lower()][0]))
            for level, level_name in enumerate(LEVELS):
                cases = [_case(frame, label, level, within) for frame in frames]
                for kind, overlap in kinds:
                    chosen = [case.of(kind, overlap) for case in cases]
                    count = sum(int((~case.truth_ignored).sum()) for case in cases)
                    repeat = count <= STEPS and not self.devkit
                    precision, orientation = precision_curves(chosen, overlap, STEPS, repeat)
                    curves = {kind: precision} | ({"aos": orientation} if kind == "2d" else {})
                    for curve_name, curve in curves.items():
                        key = f"{name.lower()}/{curve_name}@{overlap:g}/{level_name}"
                        result[key] = 100 * float(curve[1:].mean())
                        result[f"{key}/r11"] = 100 * float(curve[:: STEPS // 10].mean())
        strict = ((name.lower(), self.overlaps[name.lower()][0]) for name in self.classes)
        return result | {
            "mAP": mean_of(result[f"{name}/3d@{overlap:g}/moderate"] for name, overlap in strict)
        }


@dataclass(frozen=True)
class _Case:
    """The boxes of one frame that have a part in the score of one class at one level."""

    frame: Frame
    truth: NDArray[np.int64]
    found: NDArray[np.int64]
    truth_ignored: NDArray[np.bool_]
    found_ignored: NDArray[np.bool_]
    found_outside: NDArray[np.bool_]

    @cached_property
    def _similarity(self) -> Floats:
        truth, found = self.frame.labelled.columns["alpha"], self.frame.found.columns["alpha"]
        return (1 + np.cos(truth[self.truth, None] - found[self.found])) / 2

    @cached_property
    def _overlaps(self) -> dict[str, Floats]:
        pairs = np.ix_(self.truth, self.found)
        overlaps = {kind: np.ascontiguousarray(iou[pairs]) for kind, iou in self.frame.overlaps.items()}
        one, two = _image(self.frame.labelled)[self.truth], _image(self.frame.found)[self.found]
        shared, area = _shared(one, two), _image_area(two)
        union = _image_area(one)[:, None] + area - shared
        return overlaps | {"2d": np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)}

    def of(self, kind: str, minimum: float) -> Case:
        """For the overlap ``bev``, ``3d`` or ``2d``."""
        elsewhere = self.found_outside | self._excused(minimum) if kind == "2d" else self.found_outside
        return Case(
            self._overlaps[kind],
            self.frame.found.columns["score"][self.found],
            self.truth_ignored,
            self.found_ignored,
            elsewhere,
            self._similarity,
        )

    def _excused(self, minimum: float) -> NDArray[np.bool_]:
        """Found boxes of which more than ``minimum`` lies in one region without labels: ``(D,)``."""
        regions = _image(self.frame.labelled)[self.frame.labelled.labels == _REGION]
        boxes = _image(self.frame.found)[self.found]
        area = np.maximum(_image_area(boxes), 1e-9)
        return np.asarray((_shared(regions, boxes) / area > minimum).any(0))


def _case(frame: Frame, label: int, level: int, within: Range) -> _Case:
    labelled, found = frame.labelled, frame.found
    truth = np.flatnonzero(labelled.labels == label)
    ignored = (labelled.columns["level"] > level) | within.outside(labelled.boxes)
    # NaN, without an image, is not too low. Like the devkit: what is too low is ignored whatever its class.
    too_low = found.columns["image_bottom"] - found.columns["image_top"] < MIN_HEIGHT[level]
    kept = np.flatnonzero((found.labels == label) | too_low)
    return _Case(frame, truth, kept, ignored[truth], too_low[kept], within.outside(found.boxes)[kept])


def _image(boxes: Boxes) -> Floats:
    return np.stack([boxes.columns[side] for side in IMAGE_BOX], 1)


def _image_area(boxes: Floats) -> Floats:
    return np.asarray(np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1))


def _shared(one: Floats, two: Floats) -> Floats:
    """Area in common of image boxes (G, 4) and (D, 4): ``(G, D)`` px²."""
    edges = np.minimum(one[:, None, 2:], two[:, 2:]) - np.maximum(one[:, None, :2], two[:, :2])
    return np.asarray(np.maximum(edges, 0).prod(2))


def _alpha(boxes: Any, calibration: Any) -> Floats:
    """Angle of observation: the box's angle in the camera's frame, less the direction in which it lies."""
    camera = boxes_to_camera(np.asarray(boxes), calibration)
    return np.asarray(camera[:, 6] - np.arctan2(camera[:, 3], camera[:, 5]))
