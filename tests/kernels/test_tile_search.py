import doctest
from itertools import product as every
from math import inf
from random import Random

import pytest

from mainstem.kernels.gpu import SHARED_LIMIT
from mainstem.kernels.rnn import tile_search
from mainstem.kernels.rnn.cells import CELLS
from mainstem.kernels.rnn.tile_search import (
    AtMost,
    Divides,
    Equal,
    NoTiles,
    Problem,
    Variable,
    product,
    solve,
)
from mainstem.kernels.rnn.triton_tiles import fused, streamed, tiles


def value(terms: tile_search.Sum, at: dict[str, int]) -> float:
    return sum(term.between(at, at)[0] for term in terms)


def holds(constraint: tile_search.Constraint, at: dict[str, int]) -> bool:
    found = value(constraint.terms, at)
    if isinstance(constraint, AtMost):
        return found <= constraint.limit
    if isinstance(constraint, Equal):
        return found == constraint.value
    return found % value(constraint.by, at) == 0


def brute_force(problem: Problem) -> tuple[float, int]:
    """The best height, or −∞, and how many choices there are."""
    names = [v.name for v in problem.variables]
    choices = [dict(zip(names, chosen)) for chosen in every(*(v.values for v in problem.variables))]
    heights = [
        value(problem.objective, at) for at in choices if all(holds(c, at) for c in problem.constraints)
    ]
    return max(heights, default=-inf), len(choices)


def random_problem(random: Random) -> Problem:
    """Tiles that cover a size, within registers and shared memory, as a kernel would want them."""
    size = 16 * random.randint(1, 24)
    tile, count = Variable("tile", range(8, 97, 8)), Variable("count", range(1, 25))
    warps, stages = Variable("warps", (1, 2, 4)), Variable("stages", (1, 2))
    return Problem(
        (tile, count, warps, stages),
        (
            Equal("the tiles cover the size", product(tile, count), size),
            Divides("a product takes 16", product(tile), product(coefficient=16)),
            Divides(
                "every warp has a part", product(tile), product(warps, coefficient=random.choice((4, 8, 16)))
            ),
            AtMost(
                "registers", product(tile, tile, coefficient=1 / 32, over=(warps,)), random.randint(2, 128)
            ),
            AtMost("shared memory", product(tile, stages) + product(count), random.randint(20, 300)),
        ),
        product(tile, coefficient=random.choice((-1.0, 1.0)))
        + product(warps, stages, coefficient=random.random()),
    )


def test_the_best_of_200_problems_is_that_of_brute_force_in_a_tenth_of_the_nodes() -> None:
    random, visited, choices, solved = Random(0), 0, 0, 0
    for _ in range(200):
        problem = random_problem(random)
        best, count = brute_force(problem)
        choices += count
        if best == -inf:
            with pytest.raises(NoTiles):
                solve(problem)
            continue
        found = solve(problem)
        assert all(holds(c, found.values) for c in problem.constraints)
        assert value(problem.objective, found.values) == pytest.approx(best)
        assert solve(problem).values == found.values
        visited, solved = visited + found.nodes, solved + 1
    assert 50 < solved < 200
    assert visited * 10 < choices


def test_propagation_alone_decides_where_it_can() -> None:
    tile, count = Variable("tile", range(1, 100)), Variable("count", range(1, 100))
    found = solve(Problem((tile, count), (Equal("cover", product(tile, count), 97 * 98),), product(tile)))
    assert found.values == {"tile": 98, "count": 97}
    assert found.nodes < 5


def test_of_equals_the_larger_earlier_variable_wins() -> None:
    a, b = Variable("a", (1, 2, 4)), Variable("b", (1, 2, 4))
    assert solve(Problem((a, b), (Equal("area", product(a, b), 4),), product(a, b))).values == {
        "a": 4,
        "b": 1,
    }


def test_no_solution_names_the_constraint() -> None:
    tile = Variable("tile", (16, 32))
    limit = AtMost("shared memory", product(tile, coefficient=10), 100)
    with pytest.raises(NoTiles, match="shared memory leaves no choice"):
        solve(Problem((tile,), (limit,), product(tile)))
    with pytest.raises(ValueError, match="tile needs at least one value"):
        Variable("tile", ())


def test_the_module_s_example() -> None:
    assert doctest.testmod(tile_search).failed == 0


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("cell", list(CELLS))
def test_every_head_has_tiles_and_small_ones_stay_on_the_chip(capability: int, cell: str) -> None:
    plan = CELLS[cell]
    for size in (1, 16, 60, 64, 96, 128, 256, 1000):
        for gradient in (False, True):
            for width in (2, 4, 8):
                found = tiles(capability, plan.gates, plan.kept, size, width, gradient)
                assert found.batch * found.columns % (128 * found.warps) == 0
                weights = plan.gates * found.columns * found.depth * width
                assert not found.fused or weights < SHARED_LIMIT[capability]
            assert tiles(capability, plan.gates, plan.kept, size, 2, gradient).fused or size > 128


def test_a_head_that_does_not_fit_is_streamed_and_says_what_was_too_small() -> None:
    with pytest.raises(NoTiles, match=r"registers of a thread|shared memory"):
        fused(90, 4, 5, 256, 2, False)
    assert tiles(90, 4, 5, 256, 2, False) == streamed(90, 4, 5, 256, 2, False)
