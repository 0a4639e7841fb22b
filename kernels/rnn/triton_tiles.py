"""Which form and tiles a head takes on a GPU: the limits of a multiprocessor, and a search of what fits."""

from functools import cache
from typing import NamedTuple

from ..gpu import SHARED_LIMIT, padded
from .tile_search import AtMost, Divides, NoTiles, Problem, Variable, product, solve

REGISTERS = 224
"""Words of a thread for vectors and addresses; what is left of 255 is masks and operands."""
ADDRESSES = 17
"""Words of a thread for the addresses of one stage, as compiled kernels show."""


class Tiles(NamedTuple):
    """How a kernel runs.

    Attributes:
        fused: whether the matrices stay in shared memory; otherwise they are streamed.
        batch: sequences a program.
        columns, depth: output and input channels a tile; the whole head where fused.
        warps: warps a program.
        stages: of the pipeline of what is read.
    """

    fused: bool
    batch: int
    columns: int
    depth: int
    warps: int
    stages: int


@cache
def tiles(capability: int, gates: int, kept: int, size: int, width: int, gradient: bool) -> Tiles:
    """Choose for one cell, head size, and direction.

    Args:
        capability: of the device: 80, 90 or 100.
        gates: of the cell.
        kept: vectors that the cell keeps a token.
        size: D.
        width: bytes that an operand of the products takes: 8 where it is split into two numbers of tf32.
        gradient: whether for the backward.
    """
    try:
        return fused(capability, gates, kept, size, width, gradient)
    except NoTiles:
        return streamed(capability, gates, kept, size, width, gradient)


def fused(capability: int, gates: int, kept: int, size: int, width: int, gradient: bool) -> Tiles:
    """Tiles of the fused form; takes what `tiles` takes.

    Raises:
        NoTiles: the matrices do not fit beside a step's vectors; the message names the limit.
    """
    whole = padded(size)
    batch, warps = Variable("batch", (16, 32, 64)), Variable("warps", (1, 2, 4, 8))
    # What the backward reads beside the matrices waits in shared memory where it is read a step ahead. The
    # forward reads what is added to products, and the compiler does not read that ahead.
    stages = Variable("stages", (1, 2) if gradient else (1,))
    read = (kept + 4) * batch.values[0] * whole * 4
    problem = Problem(
        (batch, warps, stages),
        (
            Divides(
                "a 16 × 8 tile for every warp",
                product(batch, coefficient=whole),
                product(warps, coefficient=128),
            ),
            AtMost(
                "registers of a thread",
                product(batch, stages, coefficient=_vectors(gates, kept) * whole / 32, over=(warps,))
                + product(stages, coefficient=ADDRESSES),
                REGISTERS,
            ),
            AtMost(
                "shared memory",
                product(batch, coefficient=max(width, 4) * whole)
                + product(coefficient=gates * width * whole**2)
                + product(stages, coefficient=read)
                + product(coefficient=-read),
                SHARED_LIMIT[capability],
            ),
        ),
        # A step takes as long for 16 sequences as for more, and more programs find more multiprocessors.
        product(batch, coefficient=-100) + product(warps, coefficient=10) + product(stages),
    )
    found = solve(problem).values
    return Tiles(True, found["batch"], whole, whole, found["warps"], found["stages"])


def _vectors(gates: int, kept: int) -> int:
    """Most vectors of a sequence that are in registers at once, as compiled kernels show."""
    return 2 * kept + 2 * gates + 2


def streamed(capability: int, gates: int, kept: int, size: int, width: int, gradient: bool) -> Tiles:
    """Tiles of the streamed form; takes what `tiles` takes, and always finds some.

    A step is bound by the matrices on their way from the second-level cache, so that the most bytes under way
    win.
    """
    whole = padded(size)
    sizes = [n for n in (16, 32, 64, 128) if n <= whole]
    # With deeper tiles of single tf32 operands the compiler aims at 128 registers and misses by two or four.
    columns, depth = Variable("columns", sizes), Variable("depth", sizes[:3] if width == 4 else sizes)
    ahead = Variable("ahead", (1, 2))
    warps = Variable("warps", (1, 2, 4, 8))
    batch = 16
    together = 1 if gradient else gates
    problem = Problem(
        (columns, depth, ahead, warps),
        (
            Divides("columns of the head", product(coefficient=whole), product(columns)),
            Divides("channels of the head", product(coefficient=whole), product(depth)),
            Divides(
                "a 16 × 8 tile for every warp",
                product(columns, coefficient=batch),
                product(warps, coefficient=128),
            ),
            AtMost(
                "registers of a thread",
                product(columns, coefficient=_vectors(gates, kept) * batch / 32, over=(warps,))
                + product(columns, depth, coefficient=together * width / 4 / 32, over=(warps,)),
                160,  # of REGISTERS: the addresses of both loops take the rest
            ),
            AtMost(
                "shared memory",
                product(columns, depth, ahead, coefficient=together * min(width, 4))
                + product(depth, ahead, coefficient=4 * batch),
                SHARED_LIMIT[capability] / 2,
            ),
        ),
        product(columns, depth, ahead) + product(warps),
    )
    found = solve(problem).values
    return Tiles(False, batch, found["columns"], found["depth"], found["warps"], 1 + found["ahead"])
