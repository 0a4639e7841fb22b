from itertools import product
from math import exp, log, pi, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from three_objects import BOXES, CLASSES, GRID, LABELS, NONE, SPEEDS
from torch import Tensor

from mainstem.domains.pointcloud.heads import CenterHead
from mainstem.domains.pointcloud.heads.heatmap import draw_heatmap, gaussian_radius
from mainstem.domains.pointcloud.heads.losses import heatmap_focal, sigmoid_focal
from mainstem.domains.pointcloud.overlap import bev_iou, paired_iou_3d


def _head(**settings: object) -> CenterHead:
    torch.manual_seed(0)
    return CenterHead(4, CLASSES, GRID, 1, width=8, **settings)  # type: ignore[arg-type]


def _perfect(head: CenterHead, boxes: Tensor, labels: Tensor, speeds: Tensor) -> dict[str, Tensor]:
    """Outputs of one frame that say exactly what its boxes are, and nothing sensible elsewhere."""
    outputs = {name: torch.randn(1, size, head.height, head.width) for name, size in head.sizes.items()}
    outputs["heatmap"] = torch.full((1, len(head.classes), head.height, head.width), -30.0)
    cells = head.objects([boxes], [labels], [speeds]).cells
    codes = head.encode(boxes, cells) | {"velocity": speeds, "iou": torch.ones(len(boxes), 1)}
    for row, (x, y) in enumerate(cells.tolist()):
        outputs["heatmap"][0, labels[row], y, x] = 10.0 - row
        for name in head.sizes:
            outputs[name][0, :, y, x] = codes[name][row]
    return outputs


@pytest.mark.parametrize("nms", [0.2, (0.7, 0.2, 0.2)], ids=["any-class", "each-class"])
def test_what_says_the_boxes_is_read_as_the_boxes(nms: float | tuple[float, ...]) -> None:
    head = _head(velocity=True, nms=nms)
    outputs = _perfect(head, BOXES, LABELS, SPEEDS)
    (found,) = head.detections(outputs)
    torch.testing.assert_close(found.boxes, BOXES, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.velocities, SPEEDS, equal_nan=True)
    assert found.labels.tolist() == [0, 1, 2]
    power = head.iou_power[LABELS]
    torch.testing.assert_close(found.scores, torch.tensor([10.0, 9.0, 8.0]).sigmoid() ** (1 - power))
    parts = head.loss(outputs, [BOXES], [LABELS], [SPEEDS])
    assert parts["box"] < 1e-5
    assert parts["velocity"] < 1e-5
    assert parts["iou"] < 1e-4


@settings(deadline=None, max_examples=50)
@given(
    x=st.floats(0, 12.79),
    y=st.floats(-6.4, 6.39),
    z=st.floats(-3, 1),
    size=st.tuples(*[st.floats(0.1, 20)] * 3),
    yaw=st.floats(-pi, pi),
    axis=st.booleans(),
)
def test_decode_undoes_encode(
    x: float, y: float, z: float, size: tuple[float, ...], yaw: float, axis: bool
) -> None:
    box = torch.tensor([[x, y, z, *size, yaw]])
    head = _head(axis=axis)
    cells = head.objects([box], [LABELS[:1]], [SPEEDS[:1]]).cells
    codes = head.encode(box, cells)
    assert (codes["offset"] > -1e-4).all()
    assert (codes["offset"] < 1 + 1e-4).all()
    back = head.decode(codes, cells)
    torch.testing.assert_close(back[:, :6], box[:, :6], atol=1e-4, rtol=1e-5)
    assert torch.remainder(back[0, 6] - box[0, 6] + 1, 2 * pi).item() == pytest.approx(1, abs=1e-4)


def test_an_axis_is_the_same_from_both_ends_and_its_direction_is_a_cross_entropy() -> None:
    head = _head(axis=True, iou=False)
    ahead = torch.tensor([[5.0, 1.0, 0.0, 4.0, 2.0, 1.5, 0.3]])
    behind = ahead + torch.tensor([0.0] * 6 + [pi])
    cells = head.objects([ahead], [LABELS[:1]], [SPEEDS[:1]]).cells
    one, two = head.encode(ahead, cells), head.encode(behind, cells)
    torch.testing.assert_close(one["heading"], two["heading"])
    assert (one["direction"].item(), two["direction"].item()) == (1, 0)
    said = one | {"direction": torch.tensor([[2.0]])}
    right = head.code_losses(said, cells, ahead, SPEEDS[:1])["direction"].item()
    wrong = head.code_losses(said, cells, behind, SPEEDS[:1])["direction"].item()
    assert right == pytest.approx(0.2 * log(1 + exp(-2)), abs=1e-6)
    assert wrong == pytest.approx(0.2 * log(1 + exp(2)), abs=1e-6)


def _slow_radius(length: float, width: float, m: float) -> float:
    """The least of the three cases, as CenterPoint's code has them."""
    cases = [
        (1, length + width, width * length * (1 - m) / (1 + m)),
        (4, 2 * (length + width), (1 - m) * width * length),
        (4 * m, -2 * m * (length + width), (m - 1) * width * length),
    ]
    return min((b + sqrt(b * b - 4 * a * c)) / 2 for a, b, c in cases)


@given(st.floats(0.5, 100), st.floats(0.5, 100), st.floats(0.01, 0.9))
def test_radius_is_the_least_of_the_published_cases(length: float, width: float, m: float) -> None:
    fast = gaussian_radius(torch.tensor([[length, width]], dtype=torch.float64), m)
    assert fast.item() == pytest.approx(_slow_radius(length, width, m), rel=1e-8, abs=1e-8)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, 1), st.integers(0, 6), st.integers(0, 4), st.integers(0, 4)
        ),
        max_size=4,
    )
)
def test_heatmap_equals_a_plain_one(objects: list[tuple[int, int, int, int, int]]) -> None:
    shape = (2, 2, 5, 7)
    slow = torch.zeros(shape)
    for b, k, x, y, r in objects:
        for j, i in product(range(5), range(7)):
            if abs(i - x) <= r and abs(j - y) <= r:
                value = exp(-((i - x) ** 2 + (j - y) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                slow[b, k, j, i] = max(slow[b, k, j, i].item(), value)
    table = torch.tensor(objects, dtype=torch.int64).reshape(-1, 5)
    fast = draw_heatmap(shape, table[:, 0], table[:, 1], table[:, 2:4], table[:, 4])
    torch.testing.assert_close(fast, slow)


def test_focal_losses_equal_plain_ones() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    heatmap = torch.rand(2, 2, 3, 3, dtype=torch.float64) * 0.9
    heatmap[0, 0, 1, 1] = heatmap[1, 1, 0, 2] = 1
    total = 0.0
    for z, t in zip(logits.flatten().tolist(), heatmap.flatten().tolist()):
        p = torch.tensor(z, dtype=torch.float64).sigmoid()
        total -= float((1 - p) ** 2 * p.log() if t == 1 else (1 - t) ** 4 * p**2 * (1 - p).log())
    assert heatmap_focal(logits, heatmap).item() == pytest.approx(total / 2)
    target = (heatmap == 1).double()
    p = logits.sigmoid()
    ones, zeros = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    torch.testing.assert_close(sigmoid_focal(logits, target), torch.where(target == 1, ones, zeros))


def test_losses_equal_plain_ones() -> None:
    head = _head(velocity=True, box_weight=2.0, velocity_weight=0.2)
    outputs = head(torch.randn(2, 4, 32, 32))
    boxes, labels, speeds = [BOXES[:1], BOXES[1:]], [LABELS[:1], LABELS[1:]], [SPEEDS[:1], SPEEDS[1:]]
    parts = head.loss(outputs, boxes, labels, speeds)
    box_error = speed_error = iou_error = 0.0
    for row, (sample, box) in enumerate(zip([0, 1, 1], BOXES)):
        u, v = box[0].item() / 0.4, (box[1].item() + 6.4) / 0.4
        i, j = int(u), int(v)
        at = {name: values[sample, :, j, i] for name, values in outputs.items()}
        wanted = torch.stack(
            [
                torch.tensor(u - i),
                torch.tensor(v - j),
                box[2],
                *box[3:6].log(),
                box[6].cos(),
                box[6].sin(),
            ]
        )
        said = torch.cat([at["offset"], at["height"], at["size"], at["heading"]])
        box_error += (said - wanted).abs().sum().item()
        if row != 1:
            speed_error += (at["velocity"] - SPEEDS[row]).abs().sum().item()
        centre = [(i + said[0]) * 0.4, (j + said[1]) * 0.4 - 6.4, said[2]]
        decoded = torch.stack([*centre, *said[3:6].exp(), torch.atan2(said[7], said[6])])
        reached = paired_iou_3d(decoded[None], box[None]).item()
        iou_error += abs(at["iou"].item() - (2 * reached - 1))
    assert parts["box"].item() == pytest.approx(2 * box_error / 3, rel=1e-4)
    assert parts["velocity"].item() == pytest.approx(0.4 * speed_error / 2, rel=1e-4)
    assert parts["iou"].item() == pytest.approx(iou_error / 3, rel=1e-4)


def test_frames_without_boxes() -> None:
    head = _head(velocity=True)
    outputs = head(torch.randn(2, 4, 32, 32))
    parts = head.loss(outputs, *([of, of] for of in NONE))
    assert parts["heatmap"] > 0
    assert not any(parts[name] for name in ("box", "velocity", "iou"))
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    quiet = {name: values.detach() for name, values in outputs.items()}
    quiet["heatmap"] = torch.full_like(quiet["heatmap"], -30.0)
    assert [len(found) for found in head.detections(quiet)] == [0, 0]


def test_boxes_outside_the_range_or_without_extent_are_ignored() -> None:
    head = _head()
    outputs = head(torch.randn(1, 4, 32, 32))
    outside = BOXES.clone()
    outside[0, 0], outside[1, 1], outside[2, 4] = 12.8, -6.5, 0.0
    alone = head.loss(outputs, [BOXES], [LABELS], [SPEEDS])
    beside = head.loss(
        outputs, [torch.cat([outside, BOXES])], [torch.cat([LABELS] * 2)], [torch.cat([SPEEDS] * 2)]
    )
    assert alone == beside


def test_a_centre_at_the_border_stays_in_the_grid() -> None:
    head = _head()
    below = torch.nextafter(torch.tensor(12.8), torch.tensor(0.0))
    box = torch.tensor([[below, -6.4, -1.0, 4.0, 2.0, 1.5, 0.0]])
    assert head.objects([box], [LABELS[:1]], [SPEEDS[:1]]).cells.tolist() == [[31, 0]]


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "one-tower"])
def test_one_frame_is_learnt_by_heart(separate: bool) -> None:
    head = _head(separate=separate, velocity=True)
    bev = torch.randn(1, 4, 32, 32)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    untrained = head.eval().detections(head(bev))[0]
    assert not (bev_iou(untrained.boxes, BOXES) > 0.5).any()
    head.train()
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 200)
        optimizer.zero_grad()
        parts = head.loss(head(bev), [BOXES], [LABELS], [SPEEDS])
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    (found,) = head.eval().detections(head(bev))
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1, 2]
    assert (paired_iou_3d(found.boxes[order], BOXES) > 0.7).all()
    assert (found.boxes[order, 6] - BOXES[:, 6]).sin().abs().max() < 0.1
    assert (found.scores > 0.6).all()


def test_boxes_that_overlap_fall_to_the_best() -> None:
    boxes = BOXES[[0, 0]] + torch.tensor([[0.0], [0.45]]) * torch.eye(7)[0]
    same, other = torch.tensor([0, 0]), torch.tensor([0, 1])
    assert bev_iou(boxes[:1], boxes[1:]).item() > 0.5

    def kept(labels: Tensor, nms: float | tuple[float, ...]) -> list[int]:
        head = _head(nms=nms, iou=False)
        return head.detections(_perfect(head, boxes, labels, SPEEDS[:2]))[0].labels.tolist()

    assert kept(same, 0.2) == [0]
    assert kept(same, 1.0) == [0, 0]
    assert kept(other, 0.2) == [0]
    assert kept(other, (0.2, 0.2, 0.2)) == [0, 1]
    assert kept(same, (0.2, 1.0, 1.0)) == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ()}, "classes=.* must be one or more different names"),
        ({"classes": ("Car", "Car")}, "classes=.* must be one or more different names"),
        ({"stride": 3}, "stride=3 must divide the 32×32 voxels"),
        ({"nms": (0.2, 0.1)}, "nms=.* one for each of the 3 classes"),
        ({"nms": 1.2}, "nms=1.2 must be one number from 0 to 1"),
        ({"iou_power": (0.2, 0.1)}, "iou_power=.* one for each of the 3 classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CenterHead(**({"channels": 4, "classes": CLASSES, "grid": GRID, "stride": 1} | arguments))  # type: ignore[arg-type]


def test_features_of_another_grid_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expects features \(B, 4, 32, 32\) with stride 1, got \(1, 4, 16, 32"
    ):
        _head()(torch.zeros(1, 4, 16, 32))
