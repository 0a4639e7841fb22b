import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapely import Polygon  # type: ignore[import-untyped]

from mainstem.domains.pointcloud.boxes import corners_bev
from mainstem.domains.pointcloud.detections import Detections
from mainstem.domains.pointcloud.kitti_labels import (
    IMAGE_BOX,
    Calibration,
    boxes_to_camera,
    read_ignored,
    read_labels,
)
from mainstem.domains.pointcloud.metrics import KittiAP
from mainstem.domains.pointcloud.scene import Scene

CLASSES = ("Car", "Pedestrian", "Cyclist")
SIZES = {"Car": (4.0, 1.7, 1.5), "Pedestrian": (0.8, 0.6, 1.7), "Cyclist": (1.8, 0.6, 1.7)}
SIZES |= {"Van": (5.0, 1.9, 2.2), "Person_sitting": (0.8, 0.6, 1.3)}
KITTI = Path(__file__).resolve().parents[4] / "shared" / "data" / "lidar" / "kitti_object"

Array = Any


def cars(*places: float) -> Array:
    return np.array([(x, 0, -1, 4, 1.7, 1.5, 0) for x in places], np.float32).reshape(-1, 7)


def scene(name: str, boxes: Array, names: Sequence[str] | None = None, **attributes: Any) -> Scene:
    names = ["Car"] * len(boxes) if names is None else names
    given = {key: np.array(value) for key, value in attributes.items()}
    return Scene(name, np.zeros((0, 3), np.float32), (), boxes, np.array(names, np.str_), attributes=given)


def found(boxes: Array, scores: Sequence[float] | None = None, label: int = 0) -> Detections:
    scores = [0.5] * len(boxes) if scores is None else scores
    return Detections(
        torch.from_numpy(boxes), torch.tensor(scores), torch.full((len(boxes),), label, dtype=torch.int64)
    )


def evaluate(metric: KittiAP, pairs: Sequence[tuple[Detections, Scene]]) -> dict[str, float]:
    for one, frame in pairs:
        metric.update([one], [frame])
    return {name: float(value) for name, value in metric.compute().items()}


# An independent evaluation, one box at a time, after the development kit's description.


_KNOWN: dict[int, Array] = {}


def overlaps_bev(one: Detections, frame: Scene) -> Array:
    """From above and of the volumes, of labelled and found boxes: ``(G, D, 2)``."""
    if id(one) not in _KNOWN:
        boxes = one.boxes.double().numpy()
        _KNOWN[id(one)] = np.array([[overlap_bev(a, b) for b in boxes] for a in frame.boxes.astype(float)])
    return _KNOWN[id(one)]


def overlap_bev(a: Array, b: Array) -> tuple[float, float]:
    if np.hypot(*(a[:2] - b[:2])) > 8:
        return 0.0, 0.0
    one, two = (Polygon(corners_bev(torch.tensor(x[None]).double())[0].numpy()) for x in (a, b))
    area = one.intersection(two).area
    height = max(0.0, min(a[2] + a[5] / 2, b[2] + b[5] / 2) - max(a[2] - a[5] / 2, b[2] - b[5] / 2))
    volume = area * height
    return area / (one.area + two.area - area), volume / (one.area * a[5] + two.area * b[5] - volume)


def overlap_image(a: Array, b: Array) -> tuple[float, float]:
    """Intersection over union, and over the area of b."""
    width, height = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in range(2))
    shared = max(width, 0) * max(height, 0)
    one, two = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return shared / max(one + two - shared, 1e-9), shared / max(two, 1e-9)


def oracle(
    pairs: Sequence[tuple[Detections, Scene]], label: int, kind: str, minimum: float, level: int
) -> dict[str, float]:
    frames = []
    for one, frame in pairs:
        calibration, given = frame.meta["calibration"], frame.attributes
        image = np.stack([given[side] for side in IMAGE_BOX], 1)
        truth = []
        for i, name in enumerate(frame.names):
            same = name == CLASSES[label]
            near = (name, CLASSES[label]) in (("Van", "Car"), ("Person_sitting", "Pedestrian"))
            hard = given["occlusion"][i] > level or given["truncation"][i] > (0.15, 0.3, 0.5)[level]
            hard = hard or image[i, 3] - image[i, 1] <= (40, 25, 25)[level]
            truth.append(0 if same and not hard else 1 if same or near else -1)
        boxes = one.boxes.numpy().astype(float)
        seen = calibration.image_boxes(boxes)[0]
        camera = boxes_to_camera(boxes, calibration)
        alpha = camera[:, 6] - np.arctan2(camera[:, 3], camera[:, 5])
        low = seen[:, 3] - seen[:, 1] < (40, 25, 25)[level]
        state = [1 if low[j] else 0 if one.labels[j] == label else -1 for j in range(len(one))]
        if kind == "2d":
            overlaps = np.array([[overlap_image(a, b)[0] for b in seen] for a in image])
        else:
            overlaps = overlaps_bev(one, frame)[..., int(kind == "3d")]
        regions = (
            [[overlap_image(r, s)[1] for s in seen] for r in frame.meta["ignore"]] if kind == "2d" else []
        )
        frames.append((truth, state, overlaps, one.scores.numpy(), given["alpha"], alpha, regions))

    def run(threshold: float | None) -> tuple[list[float], int, float]:
        hits, wrong, similarity = [], 0, 0.0
        for truth, state, overlaps, scores, alpha_truth, alpha, regions in frames:
            taken: set[int] = set()
            for i in range(len(truth)):
                if truth[i] == -1:
                    continue
                free = [j for j in range(len(state)) if state[j] != -1 and j not in taken]
                free = [j for j in free if overlaps[i, j] > minimum]
                if threshold is None:
                    chosen = max(free, key=lambda j: scores[j], default=None)
                else:
                    free = [j for j in free if scores[j] >= threshold]
                    valid = [j for j in free if state[j] == 0]
                    nearest = max(valid, key=lambda j: overlaps[i, j], default=None)
                    chosen = nearest if nearest is not None else free[0] if free else None
                if chosen is not None:
                    taken.add(chosen)
                    if truth[i] == 0 and state[chosen] == 0:
                        hits.append(float(scores[chosen]))
                        similarity += (1 + np.cos(alpha_truth[i] - alpha[chosen])) / 2
            if threshold is not None:
                excused = {j for row in regions for j, share in enumerate(row) if share > minimum}
                for j in range(len(state)):
                    wrong += state[j] == 0 and j not in taken | excused and scores[j] >= threshold
        return hits, wrong, similarity

    count = sum(state == 0 for truth, *_ in frames for state in truth)
    ordered = sorted(run(None)[0], reverse=True)
    thresholds: list[float] = []
    position = 0.0
    for i, score in enumerate(ordered):
        here = (i + 1) / count
        following = (i + 2) / count if i < len(ordered) - 1 else here
        if following - position < position - here and i < len(ordered) - 1:
            continue
        thresholds.append(score)
        position += 1 / 40
    curves = np.zeros((2, 41))
    for t, threshold in enumerate(thresholds):
        hits, wrong, similarity = run(threshold)
        curves[:, t] = np.array([len(hits), similarity]) / (len(hits) + wrong)
    curves = np.stack([[curve[t:].max() for t in range(41)] for curve in curves])
    precision, aos = 100 * curves[:, 1:].mean(1)
    return {"ap": precision, "aos": aos, "r11": 100 * float(curves[0, ::4].mean()), "count": count}


def random_pairs(seed: int, frames: int, boxes: int) -> list[tuple[Detections, Scene]]:
    rng = np.random.default_rng(seed)
    calibration = Calibration.default()
    result = []
    for number in range(frames):
        names = rng.choice(list(SIZES), boxes, p=[0.5, 0.2, 0.1, 0.15, 0.05])
        size = np.array([SIZES[str(name)] for name in names])
        place = np.column_stack([rng.uniform(6, 60, boxes), rng.uniform(-8, 8, boxes), np.full(boxes, -0.9)])
        labelled = np.column_stack([place, size, rng.uniform(-3, 3, boxes)]).astype(np.float32)
        camera = boxes_to_camera(labelled, calibration)
        image, cut = calibration.image_boxes(labelled)
        attributes: dict[str, Array] = {
            side: image[:, i].astype(np.float32) for i, side in enumerate(IMAGE_BOX)
        }
        attributes["occlusion"] = rng.integers(0, 4, boxes)
        attributes["truncation"] = cut.astype(np.float32)
        attributes["alpha"] = camera[:, 6] - np.arctan2(camera[:, 3], camera[:, 5])
        corner = rng.uniform([0, 100], [1000, 200], (2, 2))
        meta = {
            "calibration": calibration,
            "ignore": np.hstack([corner, corner + rng.uniform(30, 200, (2, 2))]),
        }
        points = np.zeros((0, 3), np.float32)
        frame = Scene(str(number), points, (), labelled, names, attributes=attributes, meta=meta)
        rows = rng.integers(0, boxes, 2 * boxes)  # some twice, some not at all
        guesses = labelled[rows] + rng.normal(0, 0.12, (2 * boxes, 7)).astype(np.float32)
        guesses[:3, :2] += 3  # out of place
        wanted = [
            CLASSES.index({"Van": "Car"}.get(n, n)) if n in (*CLASSES, "Van") else 1 for n in names[rows]
        ]
        labels = np.where(rng.random(2 * boxes) < 0.1, rng.integers(0, 3, 2 * boxes), wanted)
        scores = torch.from_numpy(rng.random(2 * boxes).astype(np.float32))
        result.append((Detections(torch.from_numpy(guesses), scores, torch.from_numpy(labels)), frame))
    return result


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_a_plain_evaluation(seed: int) -> None:
    _KNOWN.clear()
    pairs = random_pairs(seed, 6, 12)
    result = evaluate(KittiAP(CLASSES, devkit=True), pairs)
    for label, (name, strict, loose) in enumerate([("car", 0.7, 0.5), ("pedestrian", 0.5, 0.25)]):
        for level, level_name in enumerate(["easy", "moderate", "hard"]):
            for kind, overlap in [("bev", strict), ("bev", loose), ("3d", loose), ("2d", strict)]:
                expected = oracle(pairs, label, kind, overlap, level)
                key = f"{name}/{kind}@{overlap:g}/{level_name}"
                if not expected["count"]:
                    assert np.isnan(result[key])
                    continue
                assert result[key] == pytest.approx(expected["ap"], abs=1e-4)
                assert result[f"{key}/r11"] == pytest.approx(expected["r11"], abs=1e-4)
                if kind == "2d":
                    assert result[f"{name}/aos@{overlap:g}/{level_name}"] == pytest.approx(
                        expected["aos"], abs=1e-3
                    )


def test_half_of_the_boxes_found_is_half_of_the_recalls() -> None:
    pairs = [(found(cars(*([10.0] if i < 50 else []))), scene(str(i), cars(10))) for i in range(100)]
    result = evaluate(KittiAP(["Car"]), pairs)
    assert result["car/3d@0.7/easy"] == pytest.approx(50)
    assert result["car/3d@0.7/easy/r11"] == pytest.approx(600 / 11)
    assert result["mAP"] == pytest.approx(50)


def test_few_boxes_reach_100_and_in_the_devkit_do_not() -> None:
    pairs = [(found(cars(10)), scene(str(i), cars(10))) for i in range(10)]
    assert evaluate(KittiAP(["Car"]), pairs)["mAP"] == 100
    assert evaluate(KittiAP(["Car"], devkit=True), pairs)["mAP"] == pytest.approx(22.5)


@pytest.mark.parametrize("count", [41, 60, 100])
def test_with_many_boxes_there_is_one_rule(count: int) -> None:
    rng = np.random.default_rng(count)
    scores, where = rng.random(count), rng.random(count) < 0.7
    pairs = [
        (found(cars(10 if where[i] else 20), [float(scores[i])]), scene(str(i), cars(10)))
        for i in range(count)
    ]
    assert evaluate(KittiAP(["Car"]), pairs) == evaluate(KittiAP(["Car"], devkit=True), pairs)


def test_a_better_scored_false_positive_halves_the_precision() -> None:
    pairs = [(found(cars(10, 30), [0.5, 0.9]), scene("one", cars(10)))]
    assert evaluate(KittiAP(["Car"]), pairs)["car/bev@0.5/hard"] == pytest.approx(50)
    pairs = [(found(cars(10, 30), [0.9, 0.5]), scene("one", cars(10)))]
    assert evaluate(KittiAP(["Car"]), pairs)["car/bev@0.5/hard"] == pytest.approx(100)


def test_shifts_fail_the_overlap_they_exceed() -> None:
    boxes = cars(10)
    along, up = boxes.copy(), boxes.copy()
    along[:, 0] += 1  # (4 − 1) / (4 + 1) = 0.6
    up[:, 2] += 0.6  # 0.9 / 2.1 = 0.43
    result = evaluate(KittiAP(["Car"]), [(found(along), scene("a", boxes))])
    assert [result[f"car/{key}/easy"] for key in ("bev@0.7", "bev@0.5", "3d@0.7", "3d@0.5")] == [
        0,
        100,
        0,
        100,
    ]
    result = evaluate(KittiAP(["Car"]), [(found(up), scene("a", boxes))])
    assert [result[f"car/{key}/easy"] for key in ("bev@0.7", "bev@0.5", "3d@0.7", "3d@0.5")] == [
        100,
        100,
        0,
        0,
    ]


def test_a_van_found_as_a_car_is_neither_right_nor_wrong() -> None:
    boxes = cars(10, 20)
    pairs = [(found(boxes, [0.5, 0.9]), scene("a", boxes, ["Car", "Van"]))]
    assert evaluate(KittiAP(["Car"]), pairs)["mAP"] == 100
    assert evaluate(KittiAP(["Car"], neighbours={}), pairs)["mAP"] == pytest.approx(50)
    assert evaluate(KittiAP(["Car"]), [(found(cars(10)), scene("a", boxes, ["Car", "Van"]))])["mAP"] == 100


def test_difficulty_decides_which_boxes_count() -> None:
    boxes = cars(10, 20, 30, 40)
    frame = scene("a", boxes, difficulty=[0, 1, 2, 3], points=[9, 9, 9, 9])
    result = evaluate(KittiAP(["Car"]), [(found(boxes[:1]), frame)])
    levels = [result[f"car/3d@0.7/{level}"] for level in ("easy", "moderate", "hard")]
    assert levels == pytest.approx([100, 50, 100 * 13 / 40])  # one of three reaches 13 of the 40 recalls
    result = evaluate(KittiAP(["Car"]), [(found(boxes[3:]), frame)])
    assert result["car/3d@0.7/hard"] == 0


def test_boxes_with_few_points_may_be_missed_or_found() -> None:
    frame = scene("a", cars(10, 20), points=[5, 4])
    for boxes in (cars(10), cars(10, 20)):
        assert evaluate(KittiAP(["Car"], min_points=5), [(found(boxes), frame)])["mAP"] == 100
    assert evaluate(KittiAP(["Car"]), [(found(cars(10)), frame)])["mAP"] == pytest.approx(50)


def test_a_class_without_boxes_is_nan_and_left_out_of_the_mean() -> None:
    result = evaluate(KittiAP(["Car", "Cyclist"]), [(found(cars(10)), scene("a", cars(10)))])
    assert np.isnan(result["cyclist/3d@0.5/easy"])
    assert result["mAP"] == 100
    assert np.isnan(evaluate(KittiAP(["Car"]), [(found(cars(10)), scene("a", cars()))])["mAP"])
    assert evaluate(KittiAP(["Car"]), [(Detections.none(), scene("a", cars(10)))])["mAP"] == 0


def test_ranges_score_the_boxes_within_them() -> None:
    metric = KittiAP(["Car"], ranges=(0, 30, 60))
    result = evaluate(metric, [(found(cars(10, 45, 50), [0.5, 0.9, 0.8]), scene("a", cars(10, 50)))])
    assert result["0-30m/mAP"] == 100  # the false positive is further away
    assert result["30-60m/mAP"] == pytest.approx(50)


def test_a_box_at_the_edge_of_a_range_may_be_found_beyond_it() -> None:
    pairs = [(found(cars(30.2)), scene("a", cars(29.8))), (found(cars(29.8)), scene("b", cars(30.2)))]
    result = evaluate(KittiAP(["Car"], ranges=(0, 30, 60)), pairs)
    assert [result["0-30m/mAP"], result["30-60m/mAP"]] == [100, 100]


def test_processes_add_up_and_frames_count_once() -> None:
    pairs = random_pairs(5, 5, 8)
    whole, one, two = (KittiAP(CLASSES) for _ in range(3))
    expected = evaluate(whole, pairs)
    for metric, part in ((one, pairs[:3]), (two, pairs[2:])):  # the middle frame is given to both
        metric.update(*zip(*part))
    for name in ("frames", "found", "labelled"):
        setattr(one, name, [torch.cat(getattr(one, name)), torch.cat(getattr(two, name))])
    merged = {name: float(value) for name, value in one.compute().items()}
    assert merged == pytest.approx(expected, nan_ok=True)


def _process(rank: int, file: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = KittiAP(CLASSES)
    metric.update(*zip(*random_pairs(5, 5, 8)[3 * rank : 3 + 2 * rank]))
    results.put({name: float(value) for name, value in metric.compute().items()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_process, args=(r, str(tmp_path / "store"), results)) for r in range(2)
    ]
    for process in processes:
        process.start()
    given = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    expected = evaluate(KittiAP(CLASSES), random_pairs(5, 5, 8))
    for result in given:
        assert result == pytest.approx(expected, nan_ok=True)


@pytest.mark.skipif(not KITTI.is_dir(), reason="needs the KITTI frames in ../shared")
def test_real_labels_found_as_they_are_score_100() -> None:
    frames, raised = [], []
    for file in sorted((KITTI / "label_2").glob("*.txt")):
        calibration = Calibration.read(KITTI / "calib" / file.name)
        boxes, names, attributes = read_labels(file, calibration)
        points = np.zeros((0, 3), np.float32)
        frames.append(Scene(file.stem, points, (), boxes, names, attributes=attributes))
        known = np.isin(names, CLASSES)
        labels = torch.tensor([CLASSES.index(name) for name in names[known]], dtype=torch.int64)
        here = torch.from_numpy(boxes[known])
        raised.append(Detections(here, torch.rand(len(here)), labels))
    perfect = evaluate(KittiAP(CLASSES), list(zip(raised, frames)))
    assert set(perfect.values()) == {100.0}
    for one in raised:
        one.boxes[:, 2] += 0.4 * one.boxes[:, 5]  # overlap of heights 0.6 / 1.4 = 0.43
    result = evaluate(KittiAP(CLASSES), list(zip(raised, frames)))
    assert {result[f"{name}/bev@{at}/hard"] for name, at in [("car", 0.7), ("pedestrian", 0.5)]} == {100.0}
    assert {result["car/3d@0.5/hard"], result["pedestrian/3d@0.5/hard"], result["mAP"]} == {0.0}
    assert result["cyclist/3d@0.25/moderate"] == 100


@pytest.mark.skipif(not KITTI.is_dir(), reason="needs the KITTI frames in ../shared")
def test_real_labels_in_the_image() -> None:
    pairs = []
    for file in sorted((KITTI / "label_2").glob("*.txt"))[:20]:
        calibration = Calibration.read(KITTI / "calib" / file.name)
        boxes, names, attributes = read_labels(file, calibration)
        meta = {"calibration": calibration, "ignore": read_ignored(file)}
        frame = Scene(
            file.stem, np.zeros((0, 3), np.float32), (), boxes, names, attributes=attributes, meta=meta
        )
        pairs.append((found(boxes[names == "Car"]), frame))
    result = evaluate(KittiAP(["Car"]), pairs)
    assert result["car/2d@0.7/moderate"] > 90  # boxes drawn in the image are not quite those projected
    assert result["car/aos@0.7/moderate"] == pytest.approx(result["car/2d@0.7/moderate"], abs=0.1)


def test_a_hundred_frames_take_less_than_two_seconds() -> None:
    pairs = random_pairs(0, 100, 15)
    evaluate(KittiAP(CLASSES), pairs[:1])  # compiles
    start = time.process_time()
    evaluate(KittiAP(CLASSES), pairs)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (["Car", "Dog"], {}, "overlaps: none for the class Dog; .*metric=argoverse2 takes any class"),
        (["Car"], {"ranges": (30, 10)}, "ranges"),
        (["Car"], {"ranges": (30,)}, "ranges"),
    ],
)
def test_wrong_settings_are_refused(classes: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KittiAP(classes, **options)


def test_wrong_input_is_refused() -> None:
    frame = scene("a", cars(10))
    with pytest.raises(ValueError, match="'points'"):
        KittiAP(["Car"], min_points=5).update([found(cars(10))], [frame])
    with pytest.raises(ValueError, match="2 frames were given for 1"):
        KittiAP(["Car"]).update([found(cars(10))] * 2, [frame])
    with pytest.raises(ValueError, match=r"labels of detections must be 0 to 0 .* got \[1\]"):
        KittiAP(["Car"]).update([found(cars(10), label=1)], [frame])
    with pytest.raises(ValueError, match="finite"):
        KittiAP(["Car"]).update([found(cars(np.nan))], [frame])
