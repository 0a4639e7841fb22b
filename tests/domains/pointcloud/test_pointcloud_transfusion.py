from itertools import permutations

import pytest
import torch
from three_objects import BOXES, CLASSES, GRID, LABELS, NONE, SPEEDS
from torch import Tensor
from torch.nn import functional as F

from mainstem.domains.pointcloud.heads import TransFusionHead
from mainstem.domains.pointcloud.heads.decoder import Decoder
from mainstem.domains.pointcloud.heads.losses import sigmoid_focal
from mainstem.domains.pointcloud.overlap import iou_3d, paired_iou_3d


def _head(**settings: object) -> TransFusionHead:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "width": 16,
        "hidden": 16,
        "heads": 2,
        "proposals": 6,
        "window": 9,
        "dropout": 0.0,
    }
    return TransFusionHead(4, CLASSES, GRID, 1, **(sizes | settings))  # type: ignore[arg-type]


def test_proposals_are_the_best_peaks() -> None:
    head = _head(small=("Pedestrian",), proposals=20).eval()
    outputs = head(torch.randn(2, 4, 32, 32))
    for frame in range(2):
        heat = outputs["heatmap"][frame].detach().sigmoid()
        high = F.pad(heat, (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).amax((3, 4)).tolist()
        values = heat.tolist()
        peaks = []
        for label, y, x in torch.cartesian_prod(torch.arange(3), torch.arange(32), torch.arange(32)).tolist():
            value = values[label][y][x]
            if label == 1 or value == high[label][y][x]:
                peaks.append((value, label, x, y))
        peaks = sorted(peaks, reverse=True)[:20]
        assert outputs["proposed"][frame].tolist() == [label for _, label, _, _ in peaks]
        assert outputs["places"][frame].tolist() == [[x + 0.5, y + 0.5] for _, _, x, y in peaks]
        expected = torch.stack([heat[:, y, x] for _, _, x, y in peaks])
        torch.testing.assert_close(outputs["peak"][frame], expected)


def test_a_proposal_looks_at_its_window_only() -> None:
    head = _head(window=9, proposals=1).eval()
    head.shared = torch.nn.Conv2d(4, 16, 1)
    seen = torch.rand(1, 4, 32, 32)
    heat = torch.full((1, 3, 32, 32), -5.0)
    heat[0, 0, 20, 10] = 5.0
    head.heatmap.forward = lambda shared: heat  # type: ignore[method-assign]
    seen.requires_grad_()
    head(seen)["offset"].sum().backward()
    assert seen.grad is not None
    y, x = seen.grad[0].abs().sum(0).nonzero().unbind(1)
    assert (int(y.min()), int(y.max()), int(x.min()), int(x.max())) == (16, 24, 6, 14)
    assert len(y) == 81


def test_attention_equals_a_plain_one() -> None:
    torch.manual_seed(0)
    decoder = Decoder(8, 2, 12, 0.0).double()
    queries, places = torch.randn(2, 2, 3, 8, dtype=torch.float64).unbind(0)
    keys, key_places = torch.randn(2, 2, 5, 8, dtype=torch.float64).unbind(0)
    near = torch.rand(2, 3, 5) < 0.5
    near[..., 0] = True

    def attend(module: torch.nn.Module, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        one = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
        with torch.no_grad():
            one.in_proj_weight.copy_(torch.cat([module.query.weight, module.key_value.weight]))  # type: ignore[union-attr, list-item]
            one.in_proj_bias.copy_(torch.cat([module.query.bias, module.key_value.bias]))  # type: ignore[union-attr, list-item]
            one.out_proj.load_state_dict(module.output.state_dict())  # type: ignore[union-attr]
        seen: Tensor = one(q, k, k, attn_mask=~allowed.repeat_interleave(2, 0))[0]
        return seen

    all_of = torch.ones(2, 3, 3, dtype=torch.bool)
    x = decoder.norms[0](queries + attend(decoder.among, queries + places, queries + places, all_of))
    x = decoder.norms[1](x + attend(decoder.across, x + places, keys + key_places, near))
    x = decoder.norms[2](x + decoder.alone(x))
    torch.testing.assert_close(decoder(queries, places, keys, key_places, near), x)


def test_objects_get_the_cheapest_proposals() -> None:
    head = _head(proposals=5)
    outputs = head(torch.randn(2, 4, 32, 32))
    objects = head.objects([BOXES[:2], BOXES[2:]], [LABELS[:2], LABELS[2:]], [SPEEDS[:2], SPEEDS[2:]])
    sample, proposal, owner = head.match(outputs, objects)
    assert sample.tolist() == [0, 0, 1]
    for frame, rows in enumerate([[0, 1], [2]]):
        codes = {name: outputs[name][frame].detach() for name in ("offset", "height", "size", "heading")}
        found = head.decode(codes, outputs["places"][frame])
        logits = outputs["class"][frame].detach()
        costs = torch.zeros(5, len(rows))
        for p in range(5):
            for column, row in enumerate(rows):
                z = logits[p, LABELS[row]]
                cost = sigmoid_focal(z, torch.tensor(1.0)) - sigmoid_focal(z, torch.tensor(0.0))
                cost = 0.15 * cost + 0.25 * (found[p, :2] - BOXES[row, :2]).abs().sum() / 12.8
                costs[p, column] = cost - 0.25 * iou_3d(found[p : p + 1], BOXES[row : row + 1])[0, 0]
        cheapest = min(
            sum(costs[p, c].item() for c, p in enumerate(chosen))
            for chosen in permutations(range(5), len(rows))
        )
        mine = sample == frame
        spent = sum(
            costs[p, rows.index(o)].item() for p, o in zip(proposal[mine].tolist(), owner[mine].tolist())
        )
        assert spent == pytest.approx(cheapest, abs=1e-5)


def test_losses_equal_plain_ones() -> None:
    head = _head()
    outputs = head(torch.randn(1, 4, 32, 32))
    objects = head.objects([BOXES], [LABELS], [SPEEDS])
    _, proposal, owner = head.match(outputs, objects)
    parts = head.loss(outputs, [BOXES], [LABELS], [SPEEDS])
    shown = torch.zeros(6, 3)
    box = speed = iou = 0.0
    for p, o in zip(proposal.tolist(), owner.tolist()):
        shown[p, LABELS[o]] = 1
        at = {
            name: outputs[name][0, p] for name in ("offset", "height", "size", "heading", "velocity", "iou")
        }
        x, y = outputs["places"][0, p].tolist()
        wanted = BOXES[o]
        offset = torch.stack([wanted[0] / 0.4 - x, (wanted[1] + 6.4) / 0.4 - y])
        heading = torch.stack([wanted[6].cos(), wanted[6].sin()])
        said = torch.cat([at["offset"], at["height"], at["size"], at["heading"]])
        box += (said - torch.cat([offset, wanted[2:3], wanted[3:6].log(), heading])).abs().sum().item()
        if o != 1:
            speed += (at["velocity"] - SPEEDS[o]).abs().sum().item()
        centre = [(x + said[0]) * 0.4, (y + said[1]) * 0.4 - 6.4, said[2]]
        decoded = torch.stack([*centre, *said[3:6].exp(), torch.atan2(said[7], said[6])])
        iou += abs(at["iou"].item() - (2 * paired_iou_3d(decoded[None], wanted[None]).item() - 1))
    focal = sigmoid_focal(outputs["class"][0], shown).sum() / 3
    expected = {
        "class": focal.item(),
        "box": 0.25 * box / 3,
        "velocity": 0.05 * speed / 2,
        "iou": 0.5 * iou / 3,
    }
    assert {name: parts[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert parts["heatmap"].isfinite()


def test_frames_without_boxes_or_with_more_than_proposals() -> None:
    head = _head(proposals=2)
    outputs = head(torch.randn(2, 4, 32, 32))
    parts = head.loss(outputs, [NONE[0], BOXES], [NONE[1], LABELS], [NONE[2], SPEEDS])
    assert len(head.match(outputs, head.objects([BOXES] * 2, [LABELS] * 2, [SPEEDS] * 2))[0]) == 4
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    nothing = head.loss(outputs, *([of, of] for of in NONE))
    assert nothing["class"] > 0
    assert not any(nothing[name] for name in ("box", "velocity", "iou"))


def test_one_frame_is_learnt_by_heart() -> None:
    head = _head(proposals=12)
    bev = torch.randn(1, 4, 32, 32)
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 120)
        optimizer.zero_grad()
        parts = head.loss(head(bev), [BOXES], [LABELS], [SPEEDS])
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = head.detections(head(bev))[0][torch.arange(3)]
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1, 2]
    assert (paired_iou_3d(found.boxes[order], BOXES) > 0.7).all()
    assert found.velocities is not None
    assert F.l1_loss(found.velocities[order][[0, 2]], SPEEDS[[0, 2]]) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 4}, "window=4 must be an odd number of cells"),
        ({"small": ("Tram",)}, r"small=\['Tram'\] names Tram: classes has Car, Pedestrian, Cyclist"),
        ({"heads": 3}, "heads=3 must divide width=16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _head(**arguments)
