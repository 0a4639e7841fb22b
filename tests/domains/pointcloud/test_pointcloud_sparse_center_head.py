from math import exp

import pytest
import torch
from three_objects import BOXES, CLASSES, GRID, LABELS, NONE, SPEEDS

from mainstem.domains.pointcloud.heads import CenterHead, SparseCenterHead
from mainstem.domains.pointcloud.overlap import paired_iou_3d
from mainstem.domains.pointcloud.voxels import Voxels, voxel_index

GROUPS = (("Car",), ("Cyclist", "Pedestrian"))


def _head(**settings: object) -> SparseCenterHead:
    torch.manual_seed(0)
    arguments: dict[str, object] = {"groups": GROUPS, "width": 8, "velocity": True, "iou": True}
    return SparseCenterHead(4, CLASSES, GRID, 1, **(arguments | settings))  # type: ignore[arg-type]


def _voxels(batch: int, share: float, empty: int | None = None) -> Voxels:
    generator = torch.Generator().manual_seed(1)
    occupied = torch.rand(batch, 32 * 32, generator=generator) < share
    if empty is not None:
        occupied[empty] = False
    index = voxel_index(occupied.flatten().nonzero()[:, 0], (1, 32, 32))
    return Voxels(torch.randn(len(index), 4, generator=generator), index, (1, 32, 32), batch)


def test_targets_equal_plain_ones() -> None:
    head, voxels = _head(min_radius=1), _voxels(2, 0.2)
    outputs = head(voxels)
    objects = head.objects([BOXES[:1], BOXES[1:]], [LABELS[:1], LABELS[1:]], [SPEEDS[:1], SPEEDS[1:]])
    owner, heatmap = head.targets(outputs, objects)
    slow = torch.zeros(len(voxels.index), 3)
    radii = head.radius(BOXES).tolist()
    for row, frame in enumerate([0, 1, 1]):
        u, v = BOXES[row, 0].item() / 0.4 - 0.5, (BOXES[row, 1].item() + 6.4) / 0.4 - 0.5
        cells = [(i, x, y) for i, (b, _, y, x) in enumerate(voxels.index.tolist()) if b == frame]
        nearest, cx, cy = min(cells, key=lambda cell: (cell[1] - u) ** 2 + (cell[2] - v) ** 2)
        assert owner[row] == nearest
        for i, x, y in cells:
            if max(abs(x - cx), abs(y - cy)) <= radii[row]:
                value = exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * ((2 * radii[row] + 1) / 6) ** 2))
                slow[i, LABELS[row]] = max(slow[i, LABELS[row]].item(), value)
    torch.testing.assert_close(heatmap, slow)


def test_what_says_the_boxes_is_read_as_the_boxes() -> None:
    head, voxels = _head(), _voxels(1, 0.1)
    outputs = {name: values.detach().clone() for name, values in head(voxels).items()}
    owner, _ = head.targets(outputs, head.objects([BOXES], [LABELS], [SPEEDS]))
    codes = head.encode(BOXES, voxels.index[owner][:, [3, 2]])
    codes |= {"iou": torch.ones(3, 1), "velocity": SPEEDS}
    for number in range(2):
        outputs[f"{number}/heatmap"].fill_(-30)
    for row, (number, column) in enumerate([(0, 0), (1, 1), (1, 0)]):
        outputs[f"{number}/heatmap"][owner[row], column] = 10.0 - row
        for name in codes:
            outputs[f"{number}/{name}"][owner[row]] = codes[name][row]
    (found,) = head.detections(outputs)
    assert found.labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.boxes, BOXES, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.velocities, SPEEDS, equal_nan=True)
    parts = head.loss(outputs, [BOXES], [LABELS], [SPEEDS])
    assert parts["box"] < 1e-5
    assert parts["velocity"] < 1e-5
    assert parts["iou"] < 1e-4


def test_where_all_cells_are_occupied_it_loses_what_the_dense_head_does() -> None:
    sparse = _head(groups=None, box_weight=2.0)
    dense = CenterHead(4, CLASSES, GRID, 1, width=8, velocity=True)
    outputs = sparse(_voxels(2, 2.0))
    maps = {
        name.removeprefix("0/"): values.view(2, 32, 32, -1).permute(0, 3, 1, 2)
        for name, values in outputs.items()
        if name.startswith("0/")
    }
    targets = [BOXES[:1], BOXES[1:]], [LABELS[:1], LABELS[1:]], [SPEEDS[:1], SPEEDS[1:]]
    expected = dense.loss(maps, *targets)
    found = sparse.loss(outputs, *targets)
    assert {name: part.item() for name, part in found.items()} == pytest.approx(
        {name: part.item() for name, part in expected.items()}, rel=1e-5
    )


def test_empty_frames() -> None:
    head = _head()
    outputs = head(_voxels(3, 0.2, empty=1))
    frames = [BOXES, BOXES, NONE[0]], [LABELS, LABELS, NONE[1]], [SPEEDS, SPEEDS, NONE[2]]
    owner, _ = head.targets(outputs, head.objects(*frames))
    assert owner[3:].tolist() == [-1] * 3
    assert (owner[:3] >= 0).all()
    parts = head.loss(outputs, *frames)
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    head.min_score = 0.0
    found = head.detections(outputs)
    assert len(found) == 3
    assert len(found[1]) == 0
    assert len(found[0]) > 0


def test_one_frame_is_learnt_by_heart() -> None:
    head, voxels = _head(width=24, iou=False, velocity=False), _voxels(1, 0.3)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 60)
        optimizer.zero_grad()
        parts = head.loss(head(voxels), [BOXES], [LABELS], [SPEEDS])
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    (found,) = head.eval().detections(head(voxels))
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1, 2]
    assert (paired_iou_3d(found.boxes[order], BOXES) > 0.7).all()


@pytest.mark.parametrize("groups", [(("Car",), ("Cyclist",)), (CLASSES, ("Car",)), (CLASSES, ())])
def test_groups_that_do_not_hold_each_class_once_are_refused(groups: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must hold each of Car, Pedestrian, Cyclist once"):
        _head(groups=groups)


def test_voxels_of_another_grid_are_refused() -> None:
    voxels = Voxels(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64), (2, 32, 32), 1)
    with pytest.raises(
        ValueError, match=r"voxels of 4 features on a grid \(1, 32, 32\), got 4 on \(2, 32, 32\)"
    ):
        _head()(voxels)
