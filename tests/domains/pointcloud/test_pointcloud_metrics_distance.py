"""Scores of nuScenes, Argoverse 2 and ONCE."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainstem.domains.pointcloud.detections import Detections
from mainstem.domains.pointcloud.metrics import (
    Argoverse2AP,
    BoxMetric,
    NuScenesAP,
    OnceAP,
    Range,
    by_range,
)
from mainstem.domains.pointcloud.metrics.matching import recall_thresholds
from mainstem.domains.pointcloud.scene import Scene

NAMES = ("car", "pedestrian", "barrier")
Pairs = list[tuple[Detections, Scene]]


def boxes_at(*places: float, yaw: float = 0.0) -> Any:
    return np.array([(x, 0, 0, 4, 2, 1.5, yaw) for x in places], np.float32).reshape(-1, 7)


def scene(name: str, boxes: Any, kind: str = "car", **options: Any) -> Scene:
    return Scene(
        name, np.zeros((0, 3), np.float32), (), boxes, np.array([kind] * len(boxes), np.str_), **options
    )


def found(boxes: Any, scores: Sequence[float] | None = None, velocities: Any = None) -> Detections:
    values = torch.tensor([0.5] * len(boxes) if scores is None else scores)
    speed = None if velocities is None else torch.from_numpy(velocities)
    return Detections(torch.from_numpy(boxes), values, torch.zeros(len(boxes), dtype=torch.int64), speed)


def evaluate(metric: BoxMetric, pairs: Pairs) -> dict[str, float]:
    for one, frame in pairs:
        metric.update([one], [frame])
    return {name: float(value) for name, value in metric.compute().items()}


def random_pairs(seed: int, frames: int = 12, count: int = 10) -> Pairs:
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(frames):
        place = np.column_stack([rng.uniform(-55, 55, (count, 2)), rng.normal(0, 0.3, count)])
        boxes = np.column_stack([place, rng.uniform(1, 5, (count, 3)), rng.uniform(-3.1, 3.1, count)])
        boxes = boxes.astype(np.float32)
        names = rng.choice(NAMES, count)
        speed = rng.normal(0, 1, (count, 2)).astype(np.float32)
        speed[rng.random(count) < 0.3] = np.nan
        attribute = rng.choice(["vehicle.moving", "pedestrian.moving", ""], count)
        attributes = {"points": rng.integers(0, 8, count), "attribute": attribute}
        rows = rng.integers(0, count, 2 * count)
        guesses = boxes[rows] + rng.normal(0, [1, 1, 0.2, 0.1, 0.1, 0.1, 0.3], (2 * count, 7)).astype(
            np.float32
        )
        guesses[:, 3:6] = np.abs(guesses[:, 3:6]) + 0.1
        labels = np.array([NAMES.index(name) for name in names[rows]])
        labels = np.where(rng.random(2 * count) < 0.1, rng.integers(0, 3, 2 * count), labels)
        one = Detections(
            torch.from_numpy(guesses),
            torch.from_numpy(rng.random(2 * count).astype(np.float32)),
            torch.from_numpy(labels),
            torch.from_numpy(
                np.nan_to_num(speed[rows]) + rng.normal(0, 0.2, (2 * count, 2)).astype(np.float32)
            ),
        )
        points = np.zeros((0, 3), np.float32)
        pairs.append((one, Scene(str(number), points, (), boxes, names, speed, attributes)))
    return pairs


def angle(a: float, b: float, period: float) -> float:
    return abs((a - b + period / 2) % period - period / 2)


def size_error(a: Any, b: Any) -> float:
    shared = math.prod(min(x, y) for x, y in zip(a[3:6], b[3:6]))
    return float(1 - shared / (math.prod(a[3:6]) + math.prod(b[3:6]) - shared))


# nuScenes ---------------------------------------------------------------------------------------------------


def nuscenes_oracle(pairs: Pairs, name: str, limit: float) -> dict[str, float]:
    """One class, box after box over all frames, after the development kit's description."""
    reach = {"car": 50, "pedestrian": 40, "barrier": 30}[name]
    truth, guesses = {}, []
    for number, (one, frame) in enumerate(pairs):
        for i, box in enumerate(frame.boxes.astype(float)):
            if frame.names[i] == name and frame.attributes["points"][i] > 0 and math.hypot(*box[:2]) < reach:
                truth[number, i] = box
        for j, box in enumerate(one.boxes.double().numpy()):
            if NAMES[int(one.labels[j])] == name and math.hypot(*box[:2]) < reach:
                guesses.append((float(one.scores[j]), number, j, box))
    taken, hits, scores, errors = set(), [], [], []
    for score, number, j, box in sorted(guesses, key=lambda guess: -guess[0]):
        free = [key for key in truth if key[0] == number and key not in taken]
        best = min(free, key=lambda key: math.dist(truth[key][:2], box[:2]), default=None)
        good = best is not None and math.dist(truth[best][:2], box[:2]) < limit
        hits.append(good)
        scores.append(score)
        if best is not None and good:
            taken.add(best)
            one, frame = pairs[number]
            other, assert_speed = truth[best], one.velocities
            assert assert_speed is not None
            assert frame.velocities is not None
            speed = math.dist(frame.velocities[best[1]], assert_speed[j].numpy())
            moving = math.hypot(*assert_speed[j].tolist()) > 0.2
            kind = {"car": ("vehicle.parked", "vehicle.moving"), "barrier": ("", "")}
            guess = kind.get(name, ("pedestrian.standing", "pedestrian.moving"))[moving]
            given = frame.attributes["attribute"][best[1]]
            errors.append(
                [
                    math.dist(other[:2], box[:2]),
                    size_error(other, box),
                    angle(other[6], box[6], math.pi if name == "barrier" else 2 * math.pi),
                    speed,
                    math.nan if not given else float(given != guess),
                ]
            )
    if not errors:
        return dict.fromkeys(["ate", "ase", "aoe", "ave", "aae"], 1.0) | {"ap": 0.0}
    right = np.cumsum(hits)
    recalls = np.linspace(0, 1, 101)
    precision = np.interp(recalls, right / len(truth), right / np.arange(1, len(hits) + 1), right=0)
    score_at = np.interp(recalls, right / len(truth), scores, right=0)
    result = {"ap": 100 * sum(max(p - 0.1, 0) for p in precision[11:]) / 90 / 0.9}
    reached = [i for i in range(101) if score_at[i] > 0]
    mine = np.array(scores)[np.array(hits)]
    for k, key in enumerate(["ate", "ase", "aoe", "ave", "aae"]):
        column = np.array(errors)[:, k]
        if np.isnan(column).all():
            running = np.ones(len(column))
        else:
            known = [column[: i + 1][~np.isnan(column[: i + 1])] for i in range(len(column))]
            running = np.array([values.mean() if len(values) else 0.0 for values in known])
        at = [np.interp(score_at[i], mine[::-1], running[::-1]) for i in range(11, reached[-1] + 1)]
        result[key] = float(np.mean(at)) if at else 1.0
    return result


@pytest.mark.parametrize("seed", range(4))
def test_nuscenes_scores_are_those_of_a_plain_evaluation(seed: int) -> None:
    pairs = random_pairs(seed)
    result = evaluate(NuScenesAP(NAMES), pairs)
    for name in NAMES:
        precisions = []
        for limit in (0.5, 1.0, 2.0, 4.0):
            expected = nuscenes_oracle(pairs, name, limit)
            precisions.append(expected["ap"])
            assert result[f"{name}/ap@{limit:g}"] == pytest.approx(expected["ap"], abs=1e-3)
        assert result[f"{name}/ap"] == pytest.approx(np.mean(precisions), abs=1e-3)
        expected = nuscenes_oracle(pairs, name, 2.0)
        for key in ("ate", "ase", "aoe", "ave", "aae"):
            if name == "barrier" and key in ("ave", "aae"):
                assert math.isnan(result[f"{name}/{key}"])
            else:
                assert result[f"{name}/{key}"] == pytest.approx(expected[key], abs=1e-4)


def test_nds_weighs_precision_and_the_five_errors() -> None:
    pairs = random_pairs(7)
    result = evaluate(NuScenesAP(NAMES), pairs)
    errors = [
        float(np.nanmean([result[f"{name}/{key}"] for name in NAMES]))
        for key in ("ate", "ase", "aoe", "ave", "aae")
    ]
    mean = np.mean([result[f"{name}/ap"] for name in NAMES])
    assert result["mAP"] == pytest.approx(mean, abs=1e-3)
    assert result["NDS"] == pytest.approx(
        (5 * mean + sum(100 * (1 - min(1.0, error)) for error in errors)) / 10, abs=1e-3
    )


def test_nuscenes_perfect_boxes_score_100() -> None:
    boxes, speed = boxes_at(10, 20), np.ones((2, 2), np.float32)
    attributes = {"attribute": np.array(["vehicle.moving"] * 2)}
    frame = scene("a", boxes, velocities=speed, attributes=attributes)
    result = evaluate(NuScenesAP(["car"]), [(found(boxes, velocities=speed), frame)])
    assert result["NDS"] == pytest.approx(100)
    without = evaluate(NuScenesAP(["car"]), [(found(boxes), frame)])  # speed and attribute are wrong
    assert [without["mAVE"], without["mAAE"], without["NDS"]] == pytest.approx([1, 1, 80])


def test_nuscenes_cones_have_no_direction_and_barriers_two() -> None:
    boxes = boxes_at(10)
    for kind in ("traffic_cone", "barrier"):
        result = evaluate(NuScenesAP([kind]), [(found(boxes_at(10, yaw=3.0)), scene("a", boxes, kind))])
        assert math.isnan(result[f"{kind}/ave"])
        assert math.isnan(result[f"{kind}/aae"])
        if kind == "barrier":
            assert result["barrier/aoe"] == pytest.approx(math.pi - 3, abs=1e-5)
        else:
            assert math.isnan(result["traffic_cone/aoe"])


def test_nuscenes_looks_at_500_boxes_of_a_frame() -> None:
    boxes = np.repeat(boxes_at(10), 501, 0)
    boxes[:500, 0] = 40
    result = evaluate(NuScenesAP(["car"]), [(found(boxes, [0.9] * 500 + [0.1]), scene("a", boxes_at(10)))])
    assert result["car/ate"] == 1  # the right one was the 501st
    boxes[499] = boxes[500]
    result = evaluate(NuScenesAP(["car"]), [(found(boxes, [0.9] * 500 + [0.1]), scene("a", boxes_at(10)))])
    assert result["car/ate"] == 0


def test_nuscenes_boxes_beyond_the_range_of_their_class_are_left_out() -> None:
    result = evaluate(
        NuScenesAP(["pedestrian"]), [(found(boxes_at(10, 45)), scene("a", boxes_at(10, 41), "pedestrian"))]
    )
    assert result["mAP"] == pytest.approx(100)


# Argoverse 2 ------------------------------------------------------------------------------------------------


def argoverse_oracle(pairs: Pairs, name: str) -> dict[str, float]:
    """One class, box after box, after the description of the official evaluation."""
    rows, count = [], 0
    for one, frame in pairs:
        kept = [
            i for i in range(len(frame.boxes)) if frame.names[i] == name and frame.attributes["points"][i] > 0
        ]
        truth = frame.boxes[kept].astype(float)
        count += len(truth)
        mine = [j for j in range(len(one)) if NAMES[int(one.labels[j])] == name]
        seen = set()
        for j in sorted(mine, key=lambda j: -float(one.scores[j])):
            box = one.boxes[j].double().numpy()
            far = [math.dist(other[:3], box[:3]) for other in truth]
            nearest = int(np.argmin(far)) if far else -1
            first = nearest >= 0 and nearest not in seen
            seen.add(nearest)
            other = truth[nearest] if far else box
            errors = (
                far[nearest] if far else 0,
                size_error(other, box),
                angle(other[6], box[6], 2 * math.pi),
            )
            rows.append((float(one.scores[j]), far[nearest] if first else math.inf, errors))
    rows.sort(key=lambda row: -row[0])
    precisions = []
    for limit in (0.5, 1.0, 2.0, 4.0):
        hits = np.cumsum([row[1] < limit for row in rows])
        curve = hits / np.arange(1, len(rows) + 1)
        curve = np.array([curve[i:].max() for i in range(len(curve))])
        precisions.append(np.interp(np.linspace(0, 1, 100), hits / count, curve, right=0).mean())
    errors = np.mean([row[2] for row in rows if row[1] < 2], 0)
    ap = float(np.mean(precisions))
    cds = ap * float(np.mean(1 - errors / np.array([2, 1, math.pi])))
    return {"ap": 100 * ap, "cds": 100 * cds, "ate": errors[0], "ase": errors[1], "aoe": errors[2]}


@pytest.mark.parametrize("seed", range(4))
def test_argoverse_scores_are_those_of_a_plain_evaluation(seed: int) -> None:
    pairs = random_pairs(seed)
    result = evaluate(Argoverse2AP(NAMES), pairs)
    expected = {name: argoverse_oracle(pairs, name) for name in NAMES}
    for name, scores in expected.items():
        for key, value in scores.items():
            assert result[f"{name}/{key}"] == pytest.approx(value, abs=1e-3)
    assert result["CDS"] == pytest.approx(np.mean([scores["cds"] for scores in expected.values()]), abs=1e-3)


def test_argoverse_of_perfect_boxes_of_none_and_of_far_ones() -> None:
    boxes = boxes_at(10, 20, 160)
    result = evaluate(Argoverse2AP(["car"]), [(found(boxes_at(10, 20, 155)), scene("a", boxes))])
    assert [result["mAP"], result["CDS"]] == pytest.approx([100, 100])
    nothing = evaluate(Argoverse2AP(["car"]), [(Detections.none(), scene("a", boxes))])
    assert [nothing[key] for key in ("mAP", "mATE", "mASE", "mAOE", "CDS")] == pytest.approx(
        [0, 2, 1, math.pi, 0]
    )


def test_argoverse_gives_a_box_to_the_nearest_label_even_if_that_is_taken() -> None:
    # The second box is nearer to the first label, which is taken; nuScenes gives it the other one.
    pairs = [(found(boxes_at(10, 11), [0.9, 0.5]), scene("a", boxes_at(10.2, 12.5)))]
    assert evaluate(NuScenesAP(["car"]), pairs)["car/ap@2"] == pytest.approx(100)
    assert evaluate(Argoverse2AP(["car"]), pairs)["car/ap"] == pytest.approx(50, abs=1)


# ONCE -------------------------------------------------------------------------------------------------------


def test_once_wants_boxes_to_face_the_right_way() -> None:
    labels = scene("a", boxes_at(10), "Car")
    for yaw, expected in [(0.0, 100), (math.pi, 0), (-math.pi, 0), (2 * math.pi, 100)]:
        assert evaluate(OnceAP(["Car"]), [(found(boxes_at(10, yaw=yaw)), labels)])["vehicle"] == expected


def test_once_takes_cars_buses_and_trucks_as_vehicles() -> None:
    labels = scene("a", boxes_at(10, 20), "Bus")
    result = evaluate(OnceAP(["Car", "Bus", "Pedestrian"]), [(found(boxes_at(10, 20)), labels)])
    assert result["vehicle"] == 100
    assert math.isnan(result["pedestrian"])
    assert result["mAP"] == 100
    assert "car" not in result
    apart = evaluate(OnceAP(["Car", "Bus"], merged={}), [(found(boxes_at(10, 20)), labels)])
    assert apart["bus"] == 0


def test_once_by_distance() -> None:
    labels = scene("a", boxes_at(10, 35, 45, 70), "Car")
    result = evaluate(OnceAP(["Car"]), [(found(boxes_at(10, 35, 60), [0.5, 0.5, 0.9]), labels)])
    assert result["0-30m/vehicle"] == 100
    assert result["30-50m/vehicle"] == pytest.approx(50)
    assert result["50-infm/vehicle"] == 0
    # Behind a false positive two of four are found: precision 2/3 up to half of the recalls.
    assert result["vehicle"] == pytest.approx(100 / 3)


def test_once_precision_falls_with_recall() -> None:
    # Right, wrong, right: precision 1 up to recall 1/2, then 2/3.
    labels = scene("a", boxes_at(10, 20), "Car")
    result = evaluate(OnceAP(["Car"]), [(found(boxes_at(10, 30, 20), [0.9, 0.8, 0.7]), labels)])
    # The score nearest to a recall stands for it, so the change is half a box later.
    assert result["vehicle"] == pytest.approx(100 * (37 + 13 * 2 / 3) / 50)


# Ranges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NuScenesAP, Argoverse2AP])
def test_scores_by_range(kind: type[BoxMetric]) -> None:
    metric = kind(["car"], ranges=(0, 15, 30))
    result = evaluate(metric, [(found(boxes_at(10)), scene("a", boxes_at(10, 20)))])
    assert by_range(result, "mAP") == {Range(0, 15): pytest.approx(100), Range(15, 30): 0}
    assert by_range(result, "car/ap@7") == {}


def test_scores_do_not_depend_on_batches() -> None:
    pairs = random_pairs(3)
    for kind in (NuScenesAP, Argoverse2AP):
        whole = kind(NAMES)
        whole.update([one for one, _ in pairs], [frame for _, frame in pairs])
        result = {name: float(value) for name, value in whole.compute().items()}
        assert result == pytest.approx(evaluate(kind(NAMES), pairs), nan_ok=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=120), st.integers(0, 60), st.sampled_from([40, 50]))
def test_thresholds_come_nearest_to_each_recall(scores: list[float], missed: int, steps: int) -> None:
    count = len(scores) + missed
    ordered = sorted(scores, reverse=True)
    recalls = np.arange(1, len(scores) + 1) / count
    thresholds = recall_thresholds(np.array(scores), count, steps, repeat=True)
    # As far as the recall goes, to within half a box.
    assert abs(len(thresholds) - 1 - min(steps, steps * recalls[-1])) <= 1 + steps / count
    for k, threshold in enumerate(thresholds[:-1]):
        nearest = np.abs(recalls - k / steps).min()
        chosen = [i for i in range(len(ordered)) if ordered[i] == threshold]
        assert min(abs(recalls[i] - k / steps) for i in chosen) == pytest.approx(nearest, abs=1e-6)
    once = recall_thresholds(np.array(scores), count, steps, repeat=False)
    assert len(once) <= min(len(scores), steps + 1)


def test_classes_without_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="class_ranges: none for dog"):
        NuScenesAP(["dog"])
    with pytest.raises(ValueError, match=r"overlaps: none for Dog; .*metric=argoverse2 takes any class"):
        OnceAP(["Dog"])
