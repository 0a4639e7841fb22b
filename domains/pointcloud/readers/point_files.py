"""One point cloud from one file: .bin, .npy, .pcd, .ply, .las."""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np

from ..scene import Array
from .pcd import read_pcd
from .ply import read_ply

ENDINGS = (".bin", ".npy", ".pcd", ".ply", ".las", ".laz")
COLUMNS = ("x", "y", "z", "intensity")


def read_points(path: str | Path, columns: Sequence[str] | None = None) -> tuple[Array, tuple[str, ...]]:
    """Read a point cloud.

    ``.bin`` (float32) and ``.npy`` do not name their columns: ``columns`` names all of them, in their order;
    the default is x, y, z, intensity, or x, y, z for an .npy of three columns. The other formats do, and
    ``columns`` chooses; the default is x, y, z, and intensity where the file has it. The intensity of .las is
    divided by 65535, which that format prescribes; everything else is as the file says. Points
    with a coordinate or a feature that is not a finite number are dropped, with one warning.

    Args:
        path: the file; its ending tells the format.
        columns: names, ``"x"``, ``"y"`` and ``"z"`` among them.

    Returns:
        Points, float32 ``(N, 3 + F)``: x, y, z and the features; and the names of the features.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, of another format, or has not the columns.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"point cloud '{path}' does not exist")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"point cloud '{path}': the ending '{ending}' is not one of {', '.join(ENDINGS)}")
    if columns is not None and not {"x", "y", "z"} <= set(columns):
        raise ValueError(f"point cloud '{path}': columns must have x, y and z, got {', '.join(columns)}")
    if ending in (".bin", ".npy"):
        table = _read_bin(path, columns or COLUMNS) if ending == ".bin" else _read_npy(path, columns)
    else:
        reader = {".pcd": read_pcd, ".ply": read_ply}.get(ending, _read_las)
        table = _chosen(reader(path), columns, path)
    features = tuple(name for name in table if name not in ("x", "y", "z"))
    points = np.stack([table[name].astype(np.float32) for name in ("x", "y", "z", *features)], 1)
    return _finite(points, path), features


def _read_bin(path: Path, columns: Sequence[str]) -> dict[str, Array]:
    size, row = path.stat().st_size, 4 * len(columns)
    if size % row:
        raise ValueError(
            f"point cloud '{path}': {size} bytes are not a whole number of points of {row} bytes"
            f" ({', '.join(columns)}); the file is cut off, or has other columns"
        )
    return dict(zip(columns, np.fromfile(path, np.float32).reshape(-1, len(columns)).T))


def _read_npy(path: Path, columns: Sequence[str] | None) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"point cloud '{path}' cannot be read: {' '.join(str(error).split())}") from error
    if columns is None:
        columns = COLUMNS[: array.shape[-1]] if array.ndim == 2 and array.shape[-1] == 3 else COLUMNS
    if array.ndim != 2 or array.shape[1] != len(columns):
        raise ValueError(
            f"point cloud '{path}': must be (N, {len(columns)}) for {', '.join(columns)}, got {array.shape}"
        )
    return dict(zip(columns, array.T))


def _read_las(path: Path) -> dict[str, Array]:
    try:
        laspy = import_module("laspy")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"point cloud '{path}': .las needs laspy: pip install 'mainstem[pointcloud]'"
        ) from error
    try:
        file = laspy.read(path)
    except Exception as error:
        raise ValueError(f"point cloud '{path}' cannot be read: {' '.join(str(error).split())}") from error
    table = {name.lower(): np.asarray(file[name]) for name in file.point_format.dimension_names}
    table |= {axis: np.asarray(file[axis]) for axis in "xyz"}
    if "intensity" in table:
        table["intensity"] = table["intensity"] / 65535
    return table


def _chosen(table: Mapping[str, Array], columns: Sequence[str] | None, path: Path) -> dict[str, Array]:
    wanted = columns or [name for name in COLUMNS if name in table or name != "intensity"]
    for name in wanted:
        if name not in table:
            raise ValueError(f"point cloud '{path}' has no column '{name}': it has {', '.join(table)}")
    return {name: table[name] for name in wanted}


def _finite(points: Array, path: Path) -> Array:
    kept = np.isfinite(points).all(1)
    if not kept.all():
        lost = len(points) - int(kept.sum())
        warnings.warn(
            f"point cloud '{path}': {lost} of {len(points)} points are not finite and are dropped",
            stacklevel=3,
        )
    return points[kept]
