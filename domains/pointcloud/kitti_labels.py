"""KITTI's text files: calibrations, and labels or results, one box a line.

The files speak of the rectified camera: x to the right, y down, z forward, a box by the centre of its bottom.
Everything that leaves this module is in the LiDAR's frame, as in `Scene`.
Source: Geiger et al., "Are we ready for autonomous driving?", CVPR 2012, and its development kit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .boxes import corners

Array = NDArray[Any]

IMAGE_SIZE = (1242, 375)
IMAGE_BOX = ("image_left", "image_top", "image_right", "image_bottom")
_FIELDS = 15  # of a label; a result has its score behind them
_NEAREST = 0.1  # m before the camera; nearer points are projected as if they were there
# The benchmark's files and the tracking benchmark's name two matrices differently.
_RECTIFICATION = ("R0_rect", "R_rect")
_VELODYNE = ("Tr_velo_to_cam", "Tr_velo_cam")


@dataclass(frozen=True)
class Calibration:
    """Where the left colour camera stands, seen from the LiDAR.

    Attributes:
        projection: ``(3, 4)`` P2, from the rectified camera to pixels.
        rectification: ``(3, 3)`` R0_rect.
        velodyne_to_camera: ``(3, 4)`` Tr_velo_to_cam.
        image_size: width and height in pixels; KITTI's vary by a few, and only the images tell.
    """

    projection: Array
    rectification: Array
    velodyne_to_camera: Array
    image_size: tuple[int, int] = IMAGE_SIZE

    @staticmethod
    def default() -> "Calibration":
        """An ideal KITTI camera, at the LiDAR and level with it."""
        projection = np.array([[721.5377, 0, 609.5593, 0], [0, 721.5377, 172.854, 0], [0, 0, 1, 0]])
        axes = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]])
        return Calibration(projection, np.eye(3), axes)

    @staticmethod
    def read(path: str | Path, image_size: tuple[int, int] = IMAGE_SIZE) -> "Calibration":
        """Read ``calib/*.txt`` of the object or the tracking benchmark.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a matrix is missing, or has not as many numbers as it must.
        """
        lines: dict[str, list[str]] = {}
        for line in _text(path).splitlines():
            name, *numbers = line.split() or [""]
            lines[name.rstrip(":")] = numbers

        def matrix(names: tuple[str, ...], columns: int) -> Array:
            name = next((name for name in names if name in lines), None)
            if name is None:
                raise ValueError(f"calibration '{path}' has no {' or '.join(names)}; it has {_listed(lines)}")
            numbers = lines[name]
            if len(numbers) != 3 * columns or not all(map(_is_number, numbers)):
                raise ValueError(
                    f"calibration '{path}': {name} must be {3 * columns} numbers, got '{' '.join(numbers)}'"
                )
            return np.array(numbers, np.float64).reshape(3, columns)

        return Calibration(matrix(("P2",), 4), matrix(_RECTIFICATION, 3), matrix(_VELODYNE, 4), image_size)

    def write(self, path: str | Path) -> None:
        """Write the file; the other three cameras are given as the same one, the GPS as at the LiDAR."""
        matrices = {f"P{camera}": self.projection for camera in range(4)}
        matrices |= {"R0_rect": self.rectification, "Tr_velo_to_cam": self.velodyne_to_camera}
        matrices |= {"Tr_imu_to_velo": np.eye(3, 4)}
        rows = [f"{name}: {' '.join(f'{x:.12e}' for x in array.flat)}\n" for name, array in matrices.items()]
        Path(path).write_text("".join(rows), encoding="utf-8")

    @property
    def _rotation(self) -> Array:
        return np.asarray(self.rectification @ self.velodyne_to_camera[:, :3])

    @property
    def _offset(self) -> Array:
        return np.asarray(self.rectification @ self.velodyne_to_camera[:, 3])

    def to_camera(self, points: Array) -> Array:
        """Points ``(N, 3+F)`` of the LiDAR in the rectified camera: float64 ``(N, 3)``."""
        return np.asarray(points[:, :3].astype(np.float64) @ self._rotation.T + self._offset)

    def to_lidar(self, points: Array) -> Array:
        """Undo `to_camera`: float64 ``(N, 3)``."""
        return np.linalg.solve(self._rotation, (points[:, :3].astype(np.float64) - self._offset).T).T

    def project(self, points: Array) -> tuple[Array, Array]:
        """Pixels ``(N, 2)``, right and down, and metres before the camera ``(N,)``, of LiDAR points (N, 3+F).

        A point nearer than 0.1 m or behind the camera is projected as if it were 0.1 m before it.
        """
        x, y, z = (self.to_camera(points) @ self.projection[:, :3].T + self.projection[:, 3]).T
        return np.stack([x, y], 1) / np.maximum(z, _NEAREST)[:, None], z

    def in_view(self, points: Array) -> Array:
        """Which LiDAR points ``(N, 3+F)`` the camera sees: ``(N,)`` booleans; NaN it does not."""
        pixels, depth = self.project(points)
        return np.asarray((depth > 0) & (pixels >= 0).all(1) & (pixels < self.image_size).all(1))

    def image_boxes(self, boxes: Array) -> tuple[Array, Array]:
        """Boxes ``(M, 7)`` seen in the image.

        Returns:
            Left, top, right and bottom in pixels, cut at the image's edges: ``(M, 4)``, zeros behind the
            camera; and the share of the uncut area that was cut off, ``(M,)`` from 0 to 1.
        """
        points = corners(torch.from_numpy(np.asarray(boxes, np.float64))).numpy().reshape(-1, 3)
        pixels, depth = self.project(points)
        pixels, depth = pixels.reshape(-1, 8, 2), depth.reshape(-1, 8)
        whole = np.concatenate([pixels.min(1), pixels.max(1)], 1)
        whole[(depth <= _NEAREST).all(1)] = 0
        width, height = self.image_size
        cut = np.clip(whole, 0, [width - 1, height - 1, width - 1, height - 1])
        area, kept = (np.maximum(one[:, 2:] - one[:, :2], 0).prod(1) for one in (whole, cut))
        return cut, 1 - np.divide(kept, area, out=np.zeros_like(area), where=area > 0)


def read_labels(path: str | Path, calibration: Calibration) -> tuple[Array, Array, dict[str, Array]]:
    """Read a file of labels or results.

    Args:
        path: text, 15 fields a line, or 16 with a score; lines of ``DontCare`` are left to `read_ignored`.
        calibration: of the same frame.

    Returns:
        Boxes, float32 ``(M, 7)`` in the LiDAR's frame; names ``(M,)``; and the attributes ``truncation``
        (0 to 1), ``occlusion`` (0 to 3), ``alpha`` (radians), ``image_left``, ``image_top``, ``image_right``,
        ``image_bottom`` (pixels), and ``score`` in a file of results, each ``(M,)``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another number of fields, or a field is not a number.
    """
    return parse_labels(_text(path).splitlines(), calibration, f"labels '{path}'")


def parse_labels(
    lines: Sequence[str], calibration: Calibration, source: str
) -> tuple[Array, Array, dict[str, Array]]:
    """`read_labels` from the lines themselves; ``source`` names them in an error."""
    names, values = _table(lines, source)
    kept = names != "DontCare"
    names, values = names[kept], values[kept]
    boxes = boxes_from_camera(values[:, 7:14], calibration)
    attributes: dict[str, Array] = {"truncation": values[:, 0].astype(np.float32)}
    attributes["occlusion"] = values[:, 1].astype(np.int64)
    attributes["alpha"] = values[:, 2].astype(np.float32)
    attributes |= {side: values[:, 3 + i].astype(np.float32) for i, side in enumerate(IMAGE_BOX)}
    if values.shape[1] == _FIELDS:
        attributes["score"] = values[:, 14].astype(np.float32)
    return boxes, names, attributes


def read_ignored(path: str | Path) -> Array:
    """Regions of the image that are not labelled (``DontCare``): float32 ``(n, 4)`` pixels."""
    return parse_ignored(_text(path).splitlines(), f"labels '{path}'")


def parse_ignored(lines: Sequence[str], source: str) -> Array:
    """`read_ignored` from the lines themselves; ``source`` names them in an error."""
    names, values = _table(lines, source)
    return values[names == "DontCare", 3:7].astype(np.float32)


def write_labels(
    path: str | Path,
    boxes: Array,
    names: Sequence[str] | Array,
    scores: Sequence[float] | Array | None = None,
    calibration: Calibration | None = None,
    attributes: Mapping[str, Array] | None = None,
    ignored: Array | None = None,
) -> None:
    """Write a file of labels, or of results where ``scores`` are given.

    Args:
        path: the file; its folder must exist.
        boxes: ``(M, 7)`` in the LiDAR's frame.
        names: ``(M,)`` classes.
        scores: ``(M,)``.
        calibration: of the frame; without one, `Calibration.default`.
        attributes: ``truncation``, ``occlusion``, ``alpha``, the image box, as `read_labels` gives them; what
            is missing is worked out from the box, and its occlusion is 0.
        ignored: ``(n, 4)`` pixels, regions that are not labelled.

    Raises:
        ValueError: arrays that do not belong together, or a name with a space.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
    calibration = Calibration.default() if calibration is None else calibration
    for what, given in {"names": names, "scores": scores, **(attributes or {})}.items():
        if given is not None and len(given) != len(boxes):
            raise ValueError(f"labels '{path}': {what} has {len(given)} entries for {len(boxes)} boxes")
    camera = boxes_to_camera(boxes, calibration)
    image, truncation = calibration.image_boxes(boxes)
    known: dict[str, Array] = {"truncation": truncation, "occlusion": np.zeros(len(boxes), np.int64)}
    known["alpha"] = _wrapped(camera[:, 6] - np.arctan2(camera[:, 3], camera[:, 5]))
    known |= {side: image[:, i] for i, side in enumerate(IMAGE_BOX)}
    known |= attributes or {}
    rows = []
    for i, name in enumerate(names):
        if len(str(name).split()) != 1:
            raise ValueError(f"labels '{path}': a name must be one word, got '{name}'")
        fields = [str(name), f"{known['truncation'][i]:.2f}", f"{int(known['occlusion'][i])}"]
        fields += [f"{known['alpha'][i]:.4f}", *(f"{known[side][i]:.2f}" for side in IMAGE_BOX)]
        fields += [f"{value:.4f}" for value in camera[i]]
        fields += [] if scores is None else [f"{scores[i]:.6f}"]
        rows.append(" ".join(fields))
    for region in () if ignored is None else ignored:
        sides = " ".join(f"{side:.2f}" for side in region)
        rows.append(f"DontCare -1 -1 -10 {sides} -1 -1 -1 -1000 -1000 -1000 -10")
    Path(path).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def boxes_from_camera(boxes: Array, calibration: Calibration) -> Array:
    """Boxes ``(M, 7)`` as the files give them, height, width, length, x, y, z, angle: float32 ``(M, 7)``."""
    height, width, length, _, _, _, angle = boxes.T
    x, y, z = calibration.to_lidar(boxes[:, 3:6]).T
    yaw = _wrapped(-angle - np.pi / 2)
    return np.stack([x, y, z + height / 2, length, width, height, yaw], 1).astype(np.float32)


def boxes_to_camera(boxes: Array, calibration: Calibration) -> Array:
    """Undo `boxes_from_camera`: float64 ``(M, 7)``."""
    x, y, z, length, width, height, yaw = boxes.astype(np.float64).T
    place = calibration.to_camera(np.stack([x, y, z - height / 2], 1))
    return np.column_stack([height, width, length, place, _wrapped(-yaw - np.pi / 2)])


def _table(lines: Sequence[str], source: str) -> tuple[Array, Array]:
    """Names ``(M,)`` and the numbers behind them ``(M, 14 or 15)`` of all lines."""
    numbered = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    columns = len(numbered[0][1]) if numbered else _FIELDS
    for number, fields in numbered:
        if len(fields) != columns or columns not in (_FIELDS, _FIELDS + 1):
            raise ValueError(
                f"{source}, line {number}: {len(fields)} fields; every line must have {_FIELDS},"
                f" or every line {_FIELDS + 1} with a score"
            )
        for field in fields[1:]:
            if not _is_number(field):
                raise ValueError(f"{source}, line {number}: '{field}' is not a number")
    names = np.array([fields[0] for _, fields in numbered], np.str_)
    values = np.array([fields[1:] for _, fields in numbered], np.float64).reshape(len(names), columns - 1)
    return names, values


def _text(path: str | Path) -> str:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist")
    return path.read_text(encoding="utf-8-sig")


def _is_number(field: str) -> bool:
    try:
        return bool(np.isfinite(float(field)))
    except ValueError:
        return False


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(name for name in names if name) or "nothing"


def _wrapped(angle: Array) -> Array:
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)
