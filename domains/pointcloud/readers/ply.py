"""PLY, the Stanford polygon format: the vertices, as ascii or binary."""

from pathlib import Path

import numpy as np

from ..scene import Array

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8",
}  # fmt: skip


def read_ply(path: Path) -> dict[str, Array]:
    """Properties of the vertices by name.

    Raises:
        ValueError: the header is not understood, vertices are not its first element, or the data end early.
    """
    content = path.read_bytes()
    end = content.find(b"end_header")
    if not content.startswith(b"ply") or end < 0:
        raise ValueError(f"point cloud '{path}' has no PLY header")
    start = content.find(b"\n", end) + 1
    lines = [line.split() for line in content[:end].decode("latin-1").splitlines()]
    form = next((line[1] for line in lines if line[:1] == ["format"]), "none")
    places = [i for i, line in enumerate(lines) if line[:1] == ["element"]] + [len(lines)]
    if len(places) < 2 or lines[places[0]][1:2] != ["vertex"] or not lines[places[0]][-1].isdigit():
        raise ValueError(f"point cloud '{path}': the first element of a PLY file must be the vertices")
    number = int(lines[places[0]][-1])
    properties = [line for line in lines[places[0] : places[1]] if line[:1] == ["property"]]
    unknown = [line[1] for line in properties if line[1] not in _TYPES]
    if unknown:
        raise ValueError(f"point cloud '{path}': a vertex has a '{unknown[0]}', which cannot be read")
    names = [line[2].lower() for line in properties]
    if form == "ascii":
        words = content[start:].split()
        _enough(len(words), number * len(names), path, "values")
        try:
            table = np.array(words[: number * len(names)], np.float64)
        except ValueError as error:
            raise ValueError(f"point cloud '{path}': {error}") from error
        return dict(zip(names, table.reshape(number, len(names)).T))
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(form)
    if order is None:
        raise ValueError(f"point cloud '{path}': PLY format '{form}' is not ascii or binary")
    rows = np.dtype([(name, order + _TYPES[line[1]]) for name, line in zip(names, properties)])
    _enough(len(content) - start, number * rows.itemsize, path, "bytes")
    vertices = np.frombuffer(content, rows, number, start)
    return {name: vertices[name] for name in names}


def _enough(got: int, wanted: int, path: Path, what: str) -> None:
    if got < wanted:
        raise ValueError(f"point cloud '{path}' is cut off: {got} {what} of data where {wanted} belong")
