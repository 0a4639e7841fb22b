from math import atan2, cos, log, pi, sin, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.heads import Anchor, AnchorHead
from mainstem.domains.pointcloud.heads.matching import match_anchors, nearest_iou
from mainstem.domains.pointcloud.heads.residuals import decode_residuals, encode_residuals
from mainstem.domains.pointcloud.overlap import bev_iou, paired_iou_3d

GRID = Grid((0.0, -6.4, -3.0), (12.8, 6.4, 1.0), (0.4, 0.4, 0.25))
CLASSES = ("Car", "Pedestrian", "Cyclist")
BOXES = torch.tensor(
    [
        [3.1, 2.1, -1.0, 4.0, 1.7, 1.5, 0.3],
        [9.3, -3.9, 0.1, 0.8, 0.7, 1.7, -2.9],
        [10.1, 5.1, 0.2, 1.8, 0.6, 1.7, 1.7],
    ]
)
LABELS = torch.tensor([0, 1, 2])
SPEEDS = torch.full((3, 2), torch.nan)


def _head(**settings: object) -> AnchorHead:
    torch.manual_seed(0)
    return AnchorHead(4, CLASSES, GRID, 1, **settings)  # type: ignore[arg-type]


def _slow_upright_iou(a: list[float], b: list[float]) -> float:
    def ends(box: list[float]) -> tuple[float, float, float, float]:
        x, y, _, dx, dy, _, yaw = box
        if abs(sin(yaw)) > abs(cos(yaw)):
            dx, dy = dy, dx
        return x - dx / 2, x + dx / 2, y - dy / 2, y + dy / 2

    (l1, r1, b1, t1), (l2, r2, b2, t2) = ends(a), ends(b)
    shared = max(min(r1, r2) - max(l1, l2), 0) * max(min(t1, t2) - max(b1, b2), 0)
    return shared / ((r1 - l1) * (t1 - b1) + (r2 - l2) * (t2 - b2) - shared)


def test_anchors_stand_at_the_middles_of_cells() -> None:
    boxes = _head().anchor_boxes(torch.tensor([0, 1, 2, 6 * 33 + 5]))
    car, walker, rider = -1.78 + 0.78, -0.6 + 0.865, -0.6 + 0.865
    expected = [
        [0.2, -6.2, car, 3.9, 1.6, 1.56, 0],
        [0.2, -6.2, car, 3.9, 1.6, 1.56, pi / 2],
        [0.2, -6.2, walker, 0.8, 0.6, 1.73, 0],
        [0.6, -5.8, rider, 1.76, 0.6, 1.73, pi / 2],
    ]
    torch.testing.assert_close(boxes, torch.tensor(expected))


_sizes = st.tuples(*[st.floats(0.2, 10)] * 3)
_boxes = st.builds(
    lambda centre, size, yaw: [*centre, *size, yaw],
    st.tuples(*[st.floats(-20, 20)] * 3),
    _sizes,
    st.floats(-4, 4),
)


@given(_boxes, _boxes)
def test_residuals_are_undone_and_are_those_of_second(box: list[float], anchor: list[float]) -> None:
    a, b = (torch.tensor([one], dtype=torch.float64) for one in (anchor, box))
    residuals = encode_residuals(b, a)
    diagonal = sqrt(anchor[3] ** 2 + anchor[4] ** 2)
    expected = [
        (box[0] - anchor[0]) / diagonal,
        (box[1] - anchor[1]) / diagonal,
        (box[2] - anchor[2]) / anchor[5],
        *(log(box[i] / anchor[i]) for i in (3, 4, 5)),
        box[6] - anchor[6],
    ]
    assert residuals[0].tolist() == pytest.approx(expected)
    torch.testing.assert_close(decode_residuals(residuals, a), b)


@settings(deadline=None)
@given(st.lists(_boxes, min_size=1, max_size=3), _sizes, st.floats(-4, 4))
def test_nearest_iou_equals_a_plain_one(
    boxes: list[list[float]], size: tuple[float, float, float], yaw: float
) -> None:
    x, y = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64), torch.tensor([-1.0, 2.0], dtype=torch.float64)
    shape = torch.tensor([[0.0, *size, yaw]], dtype=torch.float64)
    fast = nearest_iou((x, y), shape, torch.tensor(boxes, dtype=torch.float64))
    assert fast.shape == (2, 3, 1, len(boxes))
    for row, column, number in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, len(boxes)))).tolist():
        anchor = [x[column].item(), y[row].item(), 0.0, *size, yaw]
        expected = _slow_upright_iou(anchor, boxes[number])
        assert fast[row, column, 0, number].item() == pytest.approx(expected, abs=1e-9)


def test_anchors_match_by_the_published_rules() -> None:
    overlap = torch.tensor(
        [
            [0.7, 0.1],  # clear
            [0.5, 0.2],  # neither clear nor far
            [0.3, 0.2],  # the second's best, with one beside it
            [0.1, 0.2],  # the second's best too
            [0.2, 0.0],  # far
            [0.0, 0.0],  # far
        ]
    ).view(2, 3, 1, 2)
    match = match_anchors(overlap, positive=0.6, negative=0.45)
    # Of its own two objects the third overlaps the first more, which is whom it is given to.
    assert match.anchor.tolist() == [0, 1, 2, 3]
    assert match.object.tolist() == [0, 0, 0, 1]
    assert match.asked.all()
    match = match_anchors(overlap[..., :1], positive=0.6, negative=0.45)
    assert match.anchor.tolist() == [0]
    assert match.asked.flatten().tolist() == [True, False, True, True, True, True]
    none = match_anchors(overlap[..., :0], positive=0.6, negative=0.45)
    assert len(none.anchor) == 0
    assert none.asked.all()
    far = match_anchors(torch.zeros(1, 2, 1, 1), positive=0.6, negative=0.45)
    assert len(far.anchor) == 0


def test_what_says_the_boxes_is_read_as_the_boxes() -> None:
    head = _head()
    targets = head.targets(BOXES, LABELS)
    assert set(targets.label.tolist()) == {0, 1, 2}
    cells = 32 * 32 * 6
    logits = torch.full((cells, 3), -20.0)
    residuals, direction = torch.randn(cells, 7), torch.randn(cells, 2)
    logits[targets.anchor, targets.label] = 10.0
    # A half turn more is as good: the direction decides.
    anchors = head.anchor_boxes(targets.anchor)
    residuals[targets.anchor] = encode_residuals(targets.boxes, anchors) + torch.tensor([0.0] * 6 + [pi])
    beyond = torch.remainder(targets.boxes[:, 6] - pi / 4, 2 * pi) >= pi
    direction[targets.anchor] = torch.where(beyond[:, None], torch.tensor([-9.0, 9]), torch.tensor([9.0, -9]))

    def to_map(values: Tensor) -> Tensor:
        return values.view(1, 32, 32, -1).permute(0, 3, 1, 2)

    outputs = {"class": to_map(logits), "box": to_map(residuals), "direction": to_map(direction)}
    (found,) = head.detections(outputs)
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1, 2]
    torch.testing.assert_close(found.boxes[order], BOXES, atol=1e-5, rtol=1e-5)
    parts = head.loss(outputs, [BOXES], [LABELS], [SPEEDS])
    assert parts["box"] < 1e-6
    assert parts["direction"] < 1e-6
    assert parts["class"] < 1e-3


def test_losses_equal_plain_ones() -> None:
    head = _head(class_weight=1.5, box_weight=2.0, direction_weight=0.2)
    outputs = head(torch.randn(2, 4, 32, 32))
    boxes, labels = [BOXES[:1], BOXES[1:]], [LABELS[:1], LABELS[1:]]
    totals = {"class": 0.0, "box": 0.0, "direction": 0.0}
    anchors = head.anchor_boxes(torch.arange(32 * 32 * 6))
    thresholds = [(0.6, 0.45), (0.5, 0.35), (0.5, 0.35)]
    for sample in range(2):
        sums, positives = dict.fromkeys(totals, 0.0), 0
        overlaps = [
            [
                _slow_upright_iou(anchor, box.tolist()) if number // 2 % 3 == label else 0.0
                for number, anchor in enumerate(anchors.tolist())
            ]
            for box, label in zip(boxes[sample], labels[sample].tolist())
        ]
        for number in range(len(anchors)):
            y, x, place = number // 6 // 32, number // 6 % 32, number % 6
            z = outputs["class"][sample, place * 3 : place * 3 + 3, y, x]
            mine = [row[number] for row in overlaps]
            most = max(mine)
            owner = mine.index(most)
            positive, negative = thresholds[place // 2]
            best = any(row[number] > 0 and row[number] > max(row) - 1e-6 for row in overlaps)
            target = torch.zeros(3)
            if most >= positive or best:
                positives += 1
                target[place // 2] = 1
                said = outputs["box"][sample, place * 7 : place * 7 + 7, y, x]
                wanted = encode_residuals(boxes[sample][owner : owner + 1], anchors[number : number + 1])[0]
                error = torch.cat([(said - wanted)[:6], (said - wanted)[6:].sin()]).abs()
                smooth = torch.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18)
                sums["box"] += smooth.sum().item()
                yaw = boxes[sample][owner, 6].item() - pi / 4
                # In the first half turn from π/4 on the sine is not negative.
                half = torch.tensor(int(atan2(sin(yaw), cos(yaw)) < 0))
                logits = outputs["direction"][sample, place * 2 : place * 2 + 2, y, x]
                sums["direction"] += F.cross_entropy(logits[None], half[None]).item()
            elif most >= negative:
                continue
            p = z.sigmoid()
            focal = torch.where(
                target == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
            ).sum()
            sums["class"] += focal.item()
        for name in totals:
            totals[name] += sums[name] / positives / 2
    parts = head.loss(outputs, boxes, labels, [SPEEDS[:1], SPEEDS[1:]])
    assert parts["class"].item() == pytest.approx(1.5 * totals["class"], rel=1e-3)
    assert parts["box"].item() == pytest.approx(2 * totals["box"], rel=1e-3)
    assert parts["direction"].item() == pytest.approx(0.2 * totals["direction"], rel=1e-3)


def test_frames_without_boxes() -> None:
    head = _head()
    outputs = head(torch.randn(2, 4, 32, 32))
    none = (torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))
    parts = head.loss(outputs, *([of, of] for of in none))
    assert parts["class"] > 0
    assert not parts["box"]
    assert not parts["direction"]
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    # At the start all say one in a hundred.
    assert [len(found) for found in head.detections(_head()(torch.zeros(2, 4, 32, 32)))] == [0, 0]


def test_boxes_outside_the_range_or_without_extent_are_ignored() -> None:
    head = _head()
    outputs = head(torch.randn(1, 4, 32, 32))
    outside = BOXES.clone()
    outside[0, 0], outside[1, 1], outside[2, 4] = 12.8, -6.5, 0.0
    alone = head.loss(outputs, [BOXES], [LABELS], [SPEEDS])
    both, labels = torch.cat([outside, BOXES]), torch.cat([LABELS] * 2)
    assert alone == head.loss(outputs, [both], [labels], [torch.cat([SPEEDS] * 2)])


def test_one_frame_is_learnt_by_heart() -> None:
    head = _head()
    torch.manual_seed(1)
    bev = torch.randn(1, 256, 32, 32)
    head = AnchorHead(256, CLASSES, GRID, 1)
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 150)
        optimizer.zero_grad()
        parts = head.loss(head(bev), [BOXES], [LABELS], [SPEEDS])
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    (found,) = head.detections(head(bev))
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1, 2]
    assert (paired_iou_3d(found.boxes[order], BOXES) > 0.7).all()
    assert ((found.boxes[order, 6] - BOXES[:, 6]).cos() > 0.95).all()


def test_a_number_of_thresholds_lets_classes_stand_together() -> None:
    assert bev_iou(BOXES[:1], BOXES[:1]).item() == pytest.approx(1)
    targets = torch.cat([BOXES[1:2], BOXES[1:2]]), torch.tensor([1, 2])

    def kept(nms: float | tuple[float, ...]) -> list[int]:
        head = _head(nms=nms, max_boxes=2)
        matched = head.targets(*targets)
        logits, residuals = torch.full((32 * 32 * 6, 3), -20.0), torch.zeros(32 * 32 * 6, 7)
        logits[matched.anchor, matched.label] = 9.0
        residuals[matched.anchor] = encode_residuals(matched.boxes, head.anchor_boxes(matched.anchor))
        flat = {"class": logits, "box": residuals, "direction": torch.zeros(32 * 32 * 6, 2)}
        outputs = {name: of.view(1, 32, 32, -1).permute(0, 3, 1, 2) for name, of in flat.items()}
        return sorted(head.detections(outputs)[0].labels.tolist())

    assert len(kept(0.01)) == 1
    assert kept((0.01, 0.01, 0.01)) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ("Car", "Tram")}, "anchors has none for Tram: it has Car, Pedestrian, Cyclist"),
        ({"rotations": (0.0, 0.7)}, "rotations=.* must be one or more multiples of π/2"),
        ({"rotations": ()}, "rotations=.* must be one or more multiples of π/2"),
        ({"nms": -0.1}, "nms=-0.1 must be one number from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorHead(**({"channels": 4, "classes": CLASSES, "grid": GRID, "stride": 1} | arguments))  # type: ignore[arg-type]


def test_anchors_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a length, width and height above 0"):
        Anchor(size=(1.0, 0.0, 1.0), bottom=0.0, positive=0.6, negative=0.4)
    with pytest.raises(ValueError, match=r"negative=0\.7 and positive=0.6 must satisfy"):
        Anchor(size=(1.0, 1.0, 1.0), bottom=0.0, positive=0.6, negative=0.7)
