"""PCD, the Point Cloud Library's format, version 0.7: ascii, binary and binary_compressed."""

from pathlib import Path

import numpy as np

from ..scene import Array

_KINDS = {"F": "f", "I": "i", "U": "u"}


def read_pcd(path: Path) -> dict[str, Array]:
    """Columns of the file by name; of a field with several values only the first is kept.

    Raises:
        ValueError: the header is not understood, or the data end too early.
    """
    content = path.read_bytes()
    header, start = _header(content, path)
    try:
        names = [name.lower() for name in header["FIELDS"]]
        counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
        kinds = [_KINDS[kind] + size for kind, size in zip(header["TYPE"], header["SIZE"])]
        number, form = int(header["POINTS"][0]), header["DATA"][0].lower()
        # Fields named _ are padding, and there may be several.
        rows = np.dtype(
            [(f"f{i}", f"<{kind}", (count,)) for i, (kind, count) in enumerate(zip(kinds, counts))]
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"point cloud '{path}': the PCD header is not understood ({error!r})") from error
    if form == "ascii":
        columns = _ascii(content[start:], number, counts, path)
    elif form == "binary":
        _enough(len(content) - start, number * rows.itemsize, path)
        table = np.frombuffer(content, rows, number, start)
        columns = [table[f"f{i}"][:, 0] for i in range(len(names))]
    elif form == "binary_compressed":
        columns = _columnwise(_expanded(content, start, path), rows, number, path)
    else:
        raise ValueError(f"point cloud '{path}': DATA {form} is not ascii, binary or binary_compressed")
    return dict(zip(names, columns))


def _header(content: bytes, path: Path) -> tuple[dict[str, list[str]], int]:
    """Words of the header by their first, and where the data start."""
    header: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in header:
        end = content.find(b"\n", start)
        if end < 0:
            raise ValueError(f"point cloud '{path}' has no PCD header that ends with DATA")
        words = content[start:end].decode("latin-1").split()
        start = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    return header, start


def _ascii(data: bytes, number: int, counts: list[int], path: Path) -> list[Array]:
    words = data.split()
    _enough(len(words), number * sum(counts), path, "values")
    try:
        table = np.array(words[: number * sum(counts)], np.float64).reshape(number, sum(counts))
    except ValueError as error:
        raise ValueError(f"point cloud '{path}': {error}") from error
    return [table[:, place] for place in np.cumsum([0, *counts[:-1]])]


def _columnwise(data: bytes, rows: np.dtype[np.void], number: int, path: Path) -> list[Array]:
    _enough(len(data), number * rows.itemsize, path)
    columns, start = [], 0
    for name in rows.names or ():
        kind = rows[name].base
        width = rows[name].itemsize // kind.itemsize
        columns.append(np.frombuffer(data, kind, number * width, start).reshape(number, width)[:, 0])
        start += number * rows[name].itemsize
    return columns


def _expanded(content: bytes, start: int, path: Path) -> bytes:
    _enough(len(content) - start, 8, path)
    packed, whole = np.frombuffer(content, "<u4", 2, start).tolist()
    _enough(len(content) - start - 8, packed, path)
    try:
        data = expand_lzf(content[start + 8 : start + 8 + packed])
    except (ValueError, IndexError) as error:
        raise ValueError(f"point cloud '{path}': the compressed data are broken ({error})") from error
    _enough(len(data), whole, path)
    return data


def expand_lzf(data: bytes) -> bytes:
    """Undo LZF compression (the format of liblzf: runs of literals, and references back)."""
    out, place = bytearray(), 0
    while place < len(data):
        control = data[place]
        place += 1
        if control < 32:
            out += data[place : place + control + 1]
            place += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[place]
            place += 1
        back = len(out) - ((control & 31) << 8) - data[place] - 1
        place += 1
        length += 2
        if back < 0:
            raise ValueError("LZF data refer to what was before their start")
        # A reference may run into what it writes itself: the bytes then repeat.
        piece = bytes(out[back : back + length])
        while len(piece) < length:
            piece += piece[: length - len(piece)]
        out += piece
    return bytes(out)


def _enough(got: int, wanted: int, path: Path, what: str = "bytes") -> None:
    if got < wanted:
        raise ValueError(f"point cloud '{path}' is cut off: {got} {what} of data where {wanted} belong")
