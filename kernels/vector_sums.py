"""Sums over the lanes of four vectors of `simd` at once, in a third of the instructions of four sums."""
# Numba and llvmlite ship no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

intrinsic: Any = numba.extending.intrinsic


def _shuffle(builder, x, y, lanes):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(x, y, mask)


def _interleave(builder, x, y, width):
    """Add the first half of every four lanes to the second: pieces of ``width`` lanes of x, then of y.

    Within four lanes, where a processor moves data freely.
    """
    count = x.type.count
    halves = []
    for half in (0, 2):
        lanes = []
        for four in range(0, count, 4):
            for piece in range(half, half + 2, width):
                for source in (0, count):
                    lanes += [source + four + piece + i for i in range(width)]
        halves.append(_shuffle(builder, x, y, lanes))
    return builder.fadd(*halves)


@intrinsic
def add_totals(typingctx, array, index, x0, x1, x2, x3):
    """Add the sums of the lanes of x0 … x3 to ``array[index : index + 4]``, always in the same order."""

    def codegen(context, builder, signature, args):
        x0, x1, x2, x3 = args[2:]
        # Every four lanes then hold a part of each of the four sums.
        sums = _interleave(builder, _interleave(builder, x0, x1, 1), _interleave(builder, x2, x3, 1), 2)
        while sums.type.count > 4:
            half = sums.type.count // 2
            low = _shuffle(builder, sums, sums, list(range(half)))
            sums = builder.fadd(low, _shuffle(builder, sums, sums, list(range(half, 2 * half))))
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), sums.type.as_pointer())
        align = signature.args[0].dtype.bitwidth // 8
        builder.store(builder.fadd(builder.load(address, align=align), sums), address, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, x0, x1, x2, x3), codegen
