"""Point clouds from single files and folders of one's own, and what is refused of them."""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstem.domains.pointcloud.readers import Folder, read_points
from mainstem.domains.pointcloud.readers.pcd import expand_lzf
from mainstem.domains.pointcloud.scene import Array

POINTS = np.random.default_rng(0).uniform(-20, 20, (40, 4)).astype(np.float32)
HEADER = (
    "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z _ intensity\nSIZE 4 4 4 1 4\nTYPE F F F U F\nCOUNT 1 1 1 2 1\n"
    "WIDTH 40\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 40\nDATA {}\n"
)


def literals(data: bytes) -> bytes:
    """LZF that compresses nothing."""
    pieces = [data[start : start + 32] for start in range(0, len(data), 32)]
    return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)


def pcd(path: Path, form: str, points: Array = POINTS) -> Path:
    padding = np.zeros((len(points), 2), np.uint8)
    if form == "ascii":
        rows = [" ".join([*map(repr, row[:3]), "7 8", repr(row[3])]) for row in points.tolist()]
        data = "\n".join(rows).encode()
    elif form == "binary":
        data = b"".join(row[:3].tobytes() + b"\7\7" + row[3:].tobytes() for row in points)
    else:
        whole = b"".join(
            column.tobytes() for column in (points[:, 0], points[:, 1], points[:, 2], padding, points[:, 3])
        )
        packed = literals(whole)
        data = struct.pack("<II", len(packed), len(whole)) + packed
    path.write_bytes(HEADER.format(form).encode() + data)
    return path


def ply(path: Path, form: str) -> Path:
    header = f"ply\nformat {form} 1.0\nelement vertex 40\n"
    header += "".join(f"property float {name}\n" for name in ("x", "y", "z", "intensity")) + "end_header\n"
    order = ">" if "big" in form else "<"
    text = "\n".join(" ".join(map(repr, row)) for row in POINTS.tolist()).encode()
    path.write_bytes(header.encode() + (text if form == "ascii" else POINTS.astype(f"{order}f4").tobytes()))
    return path


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path: Path, form: str) -> None:
    points, features = read_points(pcd(tmp_path / "a.pcd", form))
    assert features == ("intensity",)
    np.testing.assert_array_equal(points, POINTS)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply(tmp_path: Path, form: str) -> None:
    points, features = read_points(ply(tmp_path / "a.ply", form))
    assert features == ("intensity",)
    np.testing.assert_array_equal(points, POINTS)


def test_bin_and_npy_take_the_names_that_are_given(tmp_path: Path) -> None:
    POINTS.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", POINTS)
    for name in ("a.bin", "a.npy"):
        points, features = read_points(tmp_path / name)
        assert features == ("intensity",)
        np.testing.assert_array_equal(points, POINTS)
        points, features = read_points(tmp_path / name, ("ring", "x", "y", "z"))
        assert features == ("ring",)
        np.testing.assert_array_equal(points, POINTS[:, [1, 2, 3, 0]])
    np.save(tmp_path / "b.npy", POINTS[:, :3].astype(np.float64))
    points, features = read_points(tmp_path / "b.npy")
    assert features == ()
    np.testing.assert_array_equal(points, POINTS[:, :3])


def test_las(tmp_path: Path) -> None:
    laspy = pytest.importorskip("laspy")
    file = laspy.create(point_format=0, file_version="1.2")
    file.header.scales = [1e-4] * 3
    file.x, file.y, file.z = POINTS[:, :3].astype(np.float64).T
    file.intensity = np.full(40, 13107, np.uint16)
    file.write(tmp_path / "a.las")
    points, features = read_points(tmp_path / "a.las")
    assert features == ("intensity",)
    np.testing.assert_allclose(points[:, :3], POINTS[:, :3], atol=1e-4)
    np.testing.assert_allclose(points[:, 3], 0.2)
    _, features = read_points(tmp_path / "a.las", ("x", "y", "z", "return_number"))
    assert features == ("return_number",)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(3, 264), st.data())
def test_lzf_repeats_what_it_refers_to(start: bytes, length: int, data: st.DataObject) -> None:
    back = data.draw(st.integers(1, min(len(start), 32)))
    start = start[:32]
    back = min(back, len(start))
    count, offset = length - 2, back - 1
    head = [min(count, 7) << 5 | offset >> 8] + ([count - 7] if count >= 7 else [])
    expected = bytearray(start)
    for _ in range(length):
        expected.append(expected[-back])
    assert expand_lzf(literals(start) + bytes([*head, offset & 255])) == bytes(expected)


def test_points_that_are_not_finite_are_dropped_with_one_warning(tmp_path: Path) -> None:
    broken = POINTS.copy()
    broken[3, 1], broken[5, 3], broken[6, 0] = np.nan, np.inf, np.nan
    broken.tofile(tmp_path / "a.bin")
    with pytest.warns(UserWarning, match="3 of 40 points are not finite and are dropped") as caught:
        points, _ = read_points(tmp_path / "a.bin")
    assert len(caught) == 1
    np.testing.assert_array_equal(points, np.delete(POINTS, [3, 5, 6], 0))


def test_an_empty_file_is_an_empty_cloud(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    points, features = read_points(tmp_path / "a.bin")
    assert points.shape == (0, 4)
    assert features == ("intensity",)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    def told(name: str, content: bytes, error: type[Exception] = ValueError) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error) as raised:
            read_points(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        return str(raised.value)

    assert "not a whole number of points of 16 bytes" in told("a.bin", POINTS.tobytes()[:-3])
    assert "one of .bin, .npy, .pcd" in told("a.txt", b"1 2 3")
    assert "no PCD header" in told("a.pcd", b"# nothing")
    assert "is cut off" in told("b.pcd", pcd(tmp_path / "c.pcd", "binary").read_bytes()[:-1])
    assert "is cut off" in told("d.pcd", pcd(tmp_path / "c.pcd", "ascii").read_bytes()[:-30])
    assert "is cut off" in told("e.pcd", pcd(tmp_path / "c.pcd", "binary_compressed").read_bytes()[:-1])
    size = struct.pack("<II", 2, 640)
    header = HEADER.format("binary_compressed").encode()
    assert "compressed data are broken" in told("h.pcd", header + size + b"\xe0\x00")
    assert "could not convert" in told("i.pcd", HEADER.format("ascii").encode() + b"a " * 240)
    text = ply(tmp_path / "c.ply", "ascii").read_bytes()
    assert "could not convert" in told("d.ply", text.replace(b"end_header\n", b"end_header\nx "))
    assert "first element" in told("e.ply", text.replace(b"element vertex 40", b"element face 40"))
    listed = text.replace(b"property float x", b"property list uchar int x")
    assert "has a 'list', which cannot be read" in told("f.ply", listed)
    assert "header is not understood" in told("f.pcd", b"FIELDS x y z\nDATA ascii\n1 2 3")
    assert "is cut off" in told("a.ply", ply(tmp_path / "c.ply", "binary_big_endian").read_bytes()[:-1])
    assert "no PLY header" in told("b.ply", b"nothing")
    assert "cannot be read" in told("a.npy", b"nothing")
    assert "magic string is not correct" in told("b.npy", b"neither points nor pickled")
    assert "cannot be read" in told("a.las", b"nothing")
    with pytest.raises(ValueError, match=r"has no column 'ring': it has x, y, z, _, intensity"):
        read_points(tmp_path / "c.pcd", ("x", "y", "z", "ring"))
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        read_points(tmp_path / "none.bin")
    np.save(tmp_path / "g.npy", np.zeros((5, 6)))
    with pytest.raises(ValueError, match=r"must be \(N, 4\) for x, y, z, intensity, got \(5, 6\)"):
        read_points(tmp_path / "g.npy")


# Folders


def mine(root: Path) -> Path:
    (root / "points" / "night").mkdir(parents=True)
    (root / "labels" / "night").mkdir(parents=True)
    cloud = np.concatenate([POINTS, [[5, 1, 0, 255], [5.5, 1, 0.2, 51]]]).astype(np.float32)
    cloud.tofile(root / "points" / "b.bin")
    np.save(root / "points" / "a.npy", cloud)
    pcd(root / "points" / "night" / "c.pcd", "binary")
    (root / "labels" / "b.txt").write_text("5.2 1 0 4 2 1.5 0 Car\n\n-300 0 0 1 1 1 0.5 Tree 0.9\n")
    box = {"name": "Car", "box": [5.2, 1, 0, 4, 2, 1.5, 0], "velocity": [1, 0]}
    (root / "labels" / "a.json").write_text(json.dumps({"boxes": [box]}))
    (root / "labels" / "night" / "c.txt").touch()
    return root


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    mine(tmp_path)
    source = Folder(tmp_path / "points", tmp_path / "labels", intensity=255)
    a, b, c = (source[i] for i in range(len(source)))
    assert (a.id, b.id, c.id) == ("a", "b", "night/c")
    np.testing.assert_allclose(b.points[-2:, 3], [1, 0.2])
    np.testing.assert_allclose(b.boxes, [[5.2, 1, 0, 4, 2, 1.5, 0], [-300, 0, 0, 1, 1, 1, 0.5]])
    assert b.names.tolist() == ["Car", "Tree"]
    assert b.attributes["points"][1] == 0
    assert b.attributes["points"][0] >= 2
    assert a.velocities is not None
    np.testing.assert_array_equal(a.velocities, [[1, 0]])
    assert c.boxes.shape == (0, 7)
    assert len(c.points) == 40


def test_one_file_is_a_folder_of_one_frame(tmp_path: Path) -> None:
    POINTS.tofile(tmp_path / "x.pcd.bin")
    source = Folder(tmp_path / "x.pcd.bin", features=(), columns=("x", "y", "z", "intensity"))
    [scene] = [source[i] for i in range(len(source))]
    assert (scene.id, scene.features) == ("x", ())
    np.testing.assert_array_equal(scene.points, POINTS[:, :3])


def test_folders_that_are_refused(tmp_path: Path) -> None:
    mine(tmp_path)
    points, labels = tmp_path / "points", tmp_path / "labels"
    with pytest.raises(ValueError, match=r"class 'Tree' is not one of Car"):
        Folder(points, labels, classes=("Car",))[1]
    (labels / "b.txt").write_text("5.2 1 0 4 2 1.5 Car\n")
    with pytest.raises(ValueError, match=r"b\.txt', line 1: must be x y z dx dy dz yaw name"):
        Folder(points, labels)[1]
    (labels / "b.txt").write_text("5.2 1 0 4 -2 1.5 0 Car\n")
    with pytest.raises(ValueError, match="an edge that is not above 0"):
        Folder(points, labels)[1]
    (labels / "a.json").write_text('{"boxes": [{"name": "Car", "box": [1, 2]}]}')
    with pytest.raises(ValueError, match=r"a\.json': must be"):
        Folder(points, labels)[0]
    (labels / "night" / "c.txt").unlink()
    with pytest.raises(FileNotFoundError, match="frame night/c has no labels"):
        Folder(points, labels)[2]
    POINTS.tofile(points / "a.bin")
    with pytest.raises(ValueError, match="two files of points called 'a'"):
        Folder(points)
    with pytest.raises(ValueError, match="has no file of points"):
        Folder(labels)
    with pytest.raises(ValueError, match="time is not among them"):
        Folder(points, features=("time",), columns=("x", "y", "z"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Folder(tmp_path / "none")


def test_nothing_is_warned_of_where_all_is_well(tmp_path: Path) -> None:
    POINTS.tofile(tmp_path / "a.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Folder(tmp_path)[0].points) == 40
