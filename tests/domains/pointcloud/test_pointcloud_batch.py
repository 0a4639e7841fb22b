from typing import Any

import numpy as np
import pytest
import torch

from mainstem.domains.pointcloud.batch import collate
from mainstem.domains.pointcloud.scene import Scene

CLASSES = ("Pedestrian", "Car")
CAR = [1.0, 2, -1, 4, 1.8, 1.5, 0.3]
VAN = [9.0, 2, -1, 5, 2.0, 2.5, 0.0]
WALKER = [5.0, -2, -1, 0.8, 0.6, 1.7, -1.0]


def frame(name: str, points: Any, boxes: Any = (), names: Any = (), velocities: Any = None) -> Scene:
    table = np.asarray(points, np.float32).reshape(-1, 4)
    moving = None if velocities is None else np.asarray(velocities, np.float32)
    boxes = np.asarray(boxes, np.float32).reshape(-1, 7)
    return Scene(name, table, ("intensity",), boxes, np.array(names, np.str_), moving)


def three() -> list[Scene]:
    points = np.arange(20, dtype=np.float32).reshape(5, 4)
    full = frame("a", points[:3], [CAR, VAN, WALKER], ["Car", "Van", "Pedestrian"], [[1, 2], [3, 4], [5, 6]])
    return [full, frame("empty", []), frame("b", points[3:], [CAR], ["Car"])]


def test_frames_lie_end_to_end() -> None:
    batch = collate(three(), CLASSES)
    assert len(batch) == 3
    assert torch.equal(batch.points, torch.arange(20.0).reshape(5, 4))
    assert batch.points.dtype == torch.float32
    assert batch.sample.tolist() == [0, 0, 0, 2, 2]
    assert batch.sample.dtype == torch.int64


def test_targets_are_of_the_known_classes_only_and_scenes_keep_all() -> None:
    scenes = three()
    batch = collate(scenes, CLASSES)
    assert [label.tolist() for label in batch.labels] == [[1, 0], [], [1]]
    torch.testing.assert_close(batch.boxes[0], torch.tensor([CAR, WALKER]))
    assert [tuple(boxes.shape) for boxes in batch.boxes] == [(2, 7), (0, 7), (1, 7)]
    assert batch.velocities[0].tolist() == [[1, 2], [5, 6]]
    assert batch.velocities[1].shape == (0, 2)
    assert batch.velocities[2].isnan().all()
    assert batch.scenes == scenes
    assert batch.scenes[0].names.tolist() == ["Car", "Van", "Pedestrian"]
    assert all(label.dtype == torch.int64 for label in batch.labels)
    assert all(boxes.dtype == torch.float32 for boxes in batch.boxes)


def test_a_frame_of_unknown_classes_only_has_no_target() -> None:
    batch = collate([frame("a", [[0, 0, 0, 0]], [VAN], ["Van"])], CLASSES)
    assert batch.boxes[0].shape == (0, 7)
    assert batch.labels[0].shape == (0,)


def test_double_precision_and_strided_points_become_plain_floats() -> None:
    table = np.arange(16.0).reshape(2, 8)[:, ::2]
    scene = Scene("a", table, ("intensity",), np.array([CAR]), np.array(["Car"]), np.zeros((1, 2)))
    batch = collate([scene], CLASSES)
    assert batch.points.tolist() == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert batch.points.dtype == batch.boxes[0].dtype == batch.velocities[0].dtype == torch.float32


def test_moving_takes_the_tensors_along_and_leaves_the_scenes() -> None:
    batch = collate(three(), CLASSES)
    moved = batch.to("meta")
    tensors = [moved.points, moved.sample, *moved.boxes, *moved.labels, *moved.velocities]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.scenes is batch.scenes
    assert batch.points.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": np.zeros((2, 3), np.float32)}, r"frame a: points must be \(N, 4\).*1 features.*\(2, 3\)"),
        ({"boxes": np.zeros((1, 9), np.float32)}, r"frame a: boxes must be \(M, 7\), got \(1, 9\)"),
        ({"names": np.array(["Car"])}, "frame a: names has 1 entries for 0 boxes"),
        ({"velocities": np.zeros((2, 2), np.float32)}, "frame a: velocities has 2 entries for 0 boxes"),
        ({"attributes": {"points": np.zeros(3)}}, "frame a: points has 3 entries for 0 boxes"),
    ],
)
def test_a_scene_whose_parts_do_not_belong_together_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(**{"id": "a", "points": np.zeros((2, 4), np.float32), "features": ("intensity",), **change})
