from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.voxels import voxel_index, voxel_key

GRID = Grid((0.0, -2.0, -3.0), (3.2, 2.0, 1.0), (0.4, 0.5, 2.0))


def test_size_is_that_of_z_y_x() -> None:
    assert GRID.size == (2, 8, 8)
    assert Grid((-75.52, -75.52, -2.0), (75.52, 75.52, 4.0), (0.32, 0.32, 0.1875)).size == (32, 472, 472)


@pytest.mark.parametrize(
    ("low", "high", "voxel", "message"),
    [
        ((0, 0, 0), (1, 0, 1), (0.5, 0.5, 0.5), "along y the range 0…0 m with voxels of 0.5 m is empty"),
        ((0, 0, 0), (1, 1, -1), (0.5, 0.5, 0.5), "along z the range 0…-1 m .* is empty"),
        ((0, 0, 0), (1, 1, 1), (0, 0.5, 0.5), "along x the range 0…1 m with voxels of 0 m is empty"),
        ((0, 0, 0), (1, 1, 1), (0.5, 0.5, -0.5), "along z .* voxels of -0.5 m is empty"),
        ((0, float("nan"), 0), (1, 1, 1), (0.5, 0.5, 0.5), "along y the range nan…1 m .* is empty"),
        ((0, 0, 0), (1, 1, float("inf")), (0.5, 0.5, 0.5), "along z the range 0…inf m"),
        ((0, 0, 0), (1, 1.2, 1), (0.5, 0.5, 0.5), r"along y .* holds 2.400 voxels of 0.5 m.* 0…1$"),
        ((-1, 0, 0), (-0.9, 1, 1), (0.5, 0.5, 0.5), r"along x .* holds 0.200 voxels .* -1…-0.5$"),
        ((0, 0, 0), (1e-4, 1, 1), (0.5, 0.5, 0.5), r"along x .* holds 0.000 voxels .* 0…0.5$"),
        ((0, 0), (1, 1), (0.5, 0.5), "low, high and voxel need one number for each of x, y and z"),
        ((0, 0, 0), (1, 1, 1), (0.5, 0.5), "low, high and voxel need one number for each of x, y and z"),
    ],
)
def test_a_bad_range_is_refused(low: Any, high: Any, voxel: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(low, high, voxel)


def test_the_lower_corner_belongs_to_it_and_the_upper_does_not() -> None:
    nan = float("nan")
    points = torch.tensor(
        [
            [0.0, -2.0, -3.0, 7.0],
            [3.2, 0.0, 0.0, 7.0],
            [1.0, 2.0, 0.0, 7.0],
            [1.0, 0.0, 1.0, 7.0],
            [-1e-6, 0.0, 0.0, 7.0],
            [3.1999, 1.9999, 0.9999, 7.0],
            [nan, 0.0, 0.0, 7.0],
            [1.0, 0.0, nan, 7.0],
            [float("inf"), 0.0, 0.0, 7.0],
            [1.0, 0.0, 0.0, nan],
        ]
    )
    assert GRID.inside(points).tolist() == [True, *[False] * 4, True, *[False] * 3, True]
    assert GRID.inside(points[:0]).shape == (0,)


def test_cells_of_worked_points() -> None:
    points = torch.tensor([[0.0, -2.0, -3.0], [0.4, -1.5, -1.0], [3.19, 1.99, 0.99], [1.3, 0.1, -1.01]])
    assert GRID.cells(points).tolist() == [[0, 0, 0], [1, 1, 1], [1, 7, 7], [0, 4, 3]]
    assert GRID.cells(points[:0]).shape == (0, 3)
    centre = GRID.centres(torch.tensor([[1, 0, 7]]))
    torch.testing.assert_close(centre, torch.tensor([[3.0, -1.75, 0.0]]))


@pytest.mark.parametrize("edge", [0.1, 0.2, 0.3, 0.32, 0.4, 0.15])
def test_the_last_float_below_the_upper_corner_is_in_the_last_cell(edge: float) -> None:
    grid = Grid((-edge * 471, 0.0, 0.0), (edge * 471, edge * 3, edge), (edge, edge, edge))
    corner = torch.tensor([grid.high])
    below = torch.nextafter(corner, torch.full_like(corner, -1e9))
    assert grid.inside(below).all()
    depth, height, width = grid.size
    assert grid.cells(below).tolist() == [[depth - 1, height - 1, width - 1]]


@given(
    cells=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 7), st.integers(0, 7), st.floats(-0.49, 0.49)), min_size=1
    )
)
def test_points_about_a_centre_lie_in_its_cell(cells: list[tuple[int, int, int, float]]) -> None:
    chosen = torch.tensor([cell[:3] for cell in cells])
    offset = torch.tensor([cell[3] for cell in cells])[:, None] * torch.tensor(GRID.voxel)
    points = GRID.centres(chosen) + offset
    assert GRID.inside(points).all()
    assert torch.equal(GRID.cells(points), chosen)


def test_voxel_keys_ascend_like_their_index_and_go_back() -> None:
    size = (2, 3, 5)
    index = torch.cartesian_prod(*(torch.arange(count) for count in (2, *size)))
    key = voxel_key(index, size)
    assert torch.equal(key, torch.arange(len(index)))
    assert torch.equal(voxel_index(key, size), index)
