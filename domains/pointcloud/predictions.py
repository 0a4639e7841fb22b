"""Files of predictions: boxes in the formats of KITTI, of nuScenes and as plain JSON, and pictures."""

import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy.spatial.transform import Rotation

from ...core.files import write_whole
from .detections import Detections
from .grid import Grid
from .kitti_labels import Calibration, write_labels
from .plots import bev_figure
from .scene import Array, Scene

Format = Literal["kitti", "nuscenes", "json"]

NUSCENES_LIMIT = 500
# Above this speed (m/s) an object counts as moving.
_MOVING = 0.2
# The attribute of a moving and of a resting object, for each of nuScenes' ten classes.
_NUSCENES_ATTRIBUTES = {
    **dict.fromkeys(
        ("car", "truck", "bus", "trailer", "construction_vehicle"), ("vehicle.moving", "vehicle.parked")
    ),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    **dict.fromkeys(("traffic_cone", "barrier"), ("", "")),
}


def write_predictions(
    detections: Sequence[Detections],
    scenes: Sequence[Scene],
    directory: Path,
    *,
    classes: Sequence[str],
    format: Format = "json",
    threshold: float = 0.0,
    calibration: Calibration | None = None,
) -> list[Path]:
    """Write the boxes of frames, each file whole or not at all.

    ``json`` is a file ``<id>.json`` a frame (`json_boxes`), ``kitti`` a file ``<id>.txt`` a frame in the
    camera's coordinates, and ``nuscenes`` one ``results_nusc.json`` in world coordinates (`nuscenes_boxes`).
    A slash in the name of a frame makes a folder.

    Args:
        detections: of each frame; on any device.
        scenes: the frames, in the same order.
        directory: made if it is not there.
        classes: names of the labels.
        format: of the files.
        threshold: boxes with a smaller score are left out.
        calibration: for frames without one of their own (``meta["calibration"]``), for ``kitti``.

    Raises:
        ValueError: a frame's name occurs twice or leads out of ``directory``; or the format needs what the
            frames do not have.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got '{format}'")
    directory = Path(directory)
    paths = _paths(scenes, directory, ".txt" if format == "kitti" else ".json")
    kept = [boxes[boxes.scores >= threshold].to("cpu") for boxes in detections]
    if format == "nuscenes":
        results = {
            scene.id: nuscenes_boxes(boxes, scene, classes) for boxes, scene in zip(kept, scenes, strict=True)
        }
        sensors = dict.fromkeys(("use_camera", "use_radar", "use_map", "use_external"), False)
        content = {"meta": {**sensors, "use_lidar": True}, "results": results}
        return [_write_json(directory / "results_nusc.json", content)]
    for boxes, scene, path in zip(kept, scenes, paths, strict=True):
        if format == "json":
            _write_json(path, json_boxes(boxes, scene, classes))
        else:
            _write_kitti(path, boxes, scene, classes, calibration)
    return paths


def write_pictures(
    detections: Sequence[Detections],
    scenes: Sequence[Scene],
    directory: Path,
    *,
    classes: Sequence[str],
    threshold: float = 0.3,
    grid: Grid | None = None,
) -> list[Path]:
    """Write ``<id>.png`` of each frame: its points from above, its labelled boxes and the predicted ones."""
    directory = Path(directory)
    paths = _paths(scenes, directory, ".png")
    for boxes, scene, path in zip(detections, scenes, paths, strict=True):
        figure = bev_figure(scene, boxes.to("cpu"), classes, threshold=threshold, grid=grid)
        write_whole(path, partial(figure.savefig, format="png", dpi=130))
    return paths


def json_boxes(detections: Detections, scene: Scene, classes: Sequence[str]) -> dict[str, Any]:
    """The boxes of a frame as plain JSON, in the sensor's coordinates.

    ``{"frame": id, "boxes": [{"name", "score", "box": [x, y, z, dx, dy, dz, yaw], "velocity": [vx, vy]}]}``
    in metres, radians and m/s; ``velocity`` only where the detector gives one.
    """
    boxes = [
        {
            "name": classes[label],
            "score": round(score, 4),
            "box": [round(number, 4) for number in box],
        }
        for label, score, box in zip(
            detections.labels.tolist(), detections.scores.tolist(), detections.boxes.tolist()
        )
    ]
    if detections.velocities is not None:
        for box, velocity in zip(boxes, detections.velocities.tolist()):
            if all(map(math.isfinite, velocity)):
                box["velocity"] = [round(number, 4) for number in velocity]
    return {"frame": scene.id, "boxes": boxes}


def nuscenes_boxes(detections: Detections, scene: Scene, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The best 500 boxes of a frame as nuScenes' evaluation wants them, in world coordinates.

    Args:
        detections: of the frame, on the CPU.
        scene: its name is the token of the sample, its ``meta["pose"]`` (4, 4) turns the sensor's
            coordinates into the world's.
        classes: names of the labels, of nuScenes' ten.

    Raises:
        ValueError: the frame has no pose, or a class is none of the ten.
    """
    foreign = [name for name in classes if name not in _NUSCENES_ATTRIBUTES]
    if foreign:
        raise ValueError(
            f"nuScenes has no class {', '.join(map(repr, foreign))}, only {', '.join(_NUSCENES_ATTRIBUTES)}:"
            " write json instead"
        )
    if "pose" not in scene.meta:
        raise ValueError(
            f"frame {scene.id} has no pose, which nuScenes' world coordinates need: write json instead"
        )
    best = detections[detections.scores.argsort(descending=True, stable=True)[:NUSCENES_LIMIT]]
    boxes, pose = best.boxes.double().numpy(), np.asarray(scene.meta["pose"], np.float64)
    turn = Rotation.from_matrix(pose[:3, :3])
    centres = boxes[:, :3] @ pose[:3, :3].T + pose[:3, 3]
    velocities = np.zeros((len(best), 3))
    if best.velocities is not None:
        velocities[:, :2] = np.nan_to_num(best.velocities.double().numpy())
    velocities = velocities @ pose[:3, :3].T
    written = []
    for box, centre, velocity, score, label in zip(
        boxes, centres, velocities, best.scores.tolist(), best.labels.tolist()
    ):
        name = classes[label]
        x, y, z, w = (turn * Rotation.from_euler("z", box[6])).as_quat()
        moving = float(np.hypot(*velocity[:2])) > _MOVING
        written.append(
            {
                "sample_token": scene.id,
                "translation": centre.tolist(),
                "size": box[[4, 3, 5]].tolist(),
                "rotation": [float(number) for number in (w, x, y, z)],
                "velocity": velocity[:2].tolist(),
                "detection_name": name,
                "detection_score": score,
                "attribute_name": _NUSCENES_ATTRIBUTES[name][0 if moving else 1],
            }
        )
    return written


def _write_kitti(
    path: Path, boxes: Detections, scene: Scene, classes: Sequence[str], calibration: Calibration | None
) -> None:
    used = scene.meta.get("calibration", calibration)
    if used is None:
        raise ValueError(
            f"frame {scene.id} has no calibration, which KITTI's camera coordinates need:"
            " give one, or write json"
        )
    names: Array = np.array([classes[label] for label in boxes.labels.tolist()], dtype=np.str_)
    write_whole(
        path,
        lambda file: write_labels(
            file, boxes.boxes.numpy(), names, scores=boxes.scores.numpy(), calibration=used
        ),
    )


def _paths(scenes: Sequence[Scene], directory: Path, suffix: str) -> list[Path]:
    paths: dict[Path, None] = {}
    for scene in scenes:
        path = Path(os.path.normpath(directory / f"{scene.id}{suffix}"))
        if not path.is_relative_to(os.path.normpath(directory)):
            raise ValueError(f"frame '{scene.id}': its name leads out of {directory}")
        if path in paths:
            raise ValueError(f"frame '{scene.id}' occurs twice: both would be written to {path}")
        paths[path] = None
    return list(paths)


def _write_json(path: Path, content: Any) -> Path:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
