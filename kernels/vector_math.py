"""Elementary functions of the explicit vectors of `simd`: exp2, exp, sigmoid, tanh.

Each is a polynomial on a short interval around zero and an exponent put in by hand, so that it stays in
registers and needs no library. Float32 and float64; within 2 units in the last place, except where said.
An exponential below the smallest normal number is zero, one above the largest is infinite, and NaN stays NaN.
"""
# Numba and llvmlite ship no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import math
from typing import Any, NamedTuple

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

intrinsic: Any = numba.extending.intrinsic


class _Format(NamedTuple):
    """What a floating-point format has of numbers, and how many terms its polynomials need.

    Attributes:
        mantissa: bits of the mantissa.
        integer: ``1.5 · 2^mantissa``: added to a small integer, that integer is in the last bits of the sum.
        lowest: binary exponent of the smallest normal number.
        highest: binary exponent of the first power of two that is infinite.
        log2_high, log2_low: log 2 in two parts; a small integer times the first is exact.
        powers: of ``(2^f − 1) / f``, |f| ≤ 1/2.
        exponentials: of ``(e^r − 1) / r``, |r| ≤ log(2)/2.
        one: from here on ``tanh`` is 1.
    """

    mantissa: int
    integer: float
    lowest: int
    highest: int
    log2_high: float
    log2_low: float
    powers: tuple[float, ...]
    exponentials: tuple[float, ...]
    one: float


_TAYLOR = tuple(1 / math.factorial(i + 1) for i in range(13))

# Minimax polynomials by Remez' algorithm, errors 7e-9 and 1e-8; beyond float32, the Taylor series. The factor
# that is left out keeps exp(0) = 1 exact: a slow decay would add up an error there over its whole memory.
_SINGLE = _Format(
    mantissa=23,
    integer=1.5 * 2.0**23,
    lowest=-126,
    highest=128,
    log2_high=0.693359375,
    log2_low=-2.12194440054690583e-4,
    powers=(
        0.693147188029,
        0.240226510842,
        0.0555035710552,
        0.00961803077052,
        0.00133908668472,
        0.000154697352055,
    ),
    exponentials=(
        1.00000001078,
        0.500000008087,
        0.166665051696,
        0.0416662404902,
        0.00836915784515,
        0.0013948595691,
    ),
    one=10.0,
)
_DOUBLE = _Format(
    mantissa=52,
    integer=1.5 * 2.0**52,
    lowest=-1022,
    highest=1024,
    log2_high=0.6931471803691238,
    log2_low=1.9082149292705877e-10,
    powers=tuple(c * math.log(2) ** (i + 1) for i, c in enumerate(_TAYLOR)),
    exponentials=_TAYLOR,
    one=20.0,
)


class _Builder:
    """Writes vector arithmetic on the type of ``x``."""

    def __init__(self, builder, x):
        self.ir, self.vector = builder, x.type
        single = isinstance(x.type.element, ir.FloatType)
        self.format = _SINGLE if single else _DOUBLE
        self.suffix = f"v{x.type.count}{'f32' if single else 'f64'}"
        self.bits = ir.VectorType(ir.IntType(32 if single else 64), x.type.count)

    def number(self, value):
        return ir.Constant(self.vector, [ir.Constant(self.vector.element, value)] * self.vector.count)

    def _call(self, name, *args):
        kind = ir.FunctionType(self.vector, [self.vector] * len(args))
        function = cgutils.get_or_insert_function(self.ir.module, kind, f"llvm.{name}.{self.suffix}")
        return self.ir.call(function, args)

    def fma(self, x, y, z):
        return self._call("fma", x, y, z)

    def nearest(self, x):
        return self._call("roundeven", x)

    def polynomial(self, x, coefficients):
        total = self.number(coefficients[-1])
        for c in coefficients[-2::-1]:
            total = self.fma(total, x, self.number(c))
        return total

    def shift(self, n):
        """Put the integers ``n`` where the exponent of a number is."""
        last = self.ir.bitcast(self.ir.fadd(n, self.number(self.format.integer)), self.bits)
        mantissa = ir.Constant(self.bits, [self.format.mantissa] * self.vector.count)
        return self.ir.shl(last, mantissa)

    def scale(self, p, n):
        """``p · 2^n`` where that is a normal number."""
        return self.ir.bitcast(self.ir.add(self.ir.bitcast(p, self.bits), self.shift(n)), self.vector)

    def where(self, test, x, bound, yes, no):
        return self.ir.select(self.ir.fcmp_ordered(test, x, self.number(bound)), yes, no)

    def exp2(self, x):
        # At the highest exponent the fraction is 0, and what comes out are the bits of infinity.
        x = self.where(">", x, self.format.highest, self.number(self.format.highest), x)
        n = self.nearest(x)
        f = self.ir.fsub(x, n)
        p = self.fma(f, self.polynomial(f, self.format.powers), self.number(1.0))
        return self.where("<", x, self.format.lowest, self.number(0.0), self.scale(p, n))

    def exp(self, x):
        n, r = self._reduce(x)
        p = self.fma(r, self.polynomial(r, self.format.exponentials), self.number(1.0))
        y = self.scale(p, n)
        y = self.where("<", x, self.format.lowest * math.log(2), self.number(0.0), y)
        # The last number whose exponential is finite lies within one unit of this.
        return self.where(">", x, self._log_of_largest(), self.number(math.inf), y)

    def _log_of_largest(self):
        """Largest number of the format below the logarithm of its largest number."""
        return 88.72283172607422 if self.format is _SINGLE else 709.782712893384

    def _reduce(self, x):
        """Split ``x = n log 2 + r``."""
        n = self.nearest(self.ir.fmul(x, self.number(math.log2(math.e))))
        r = self.fma(n, self.number(-self.format.log2_high), x)
        return n, self.fma(n, self.number(-self.format.log2_low), r)

    def sigmoid(self, x):
        one = self.number(1.0)
        return self.ir.fdiv(one, self.ir.fadd(one, self.exp(self.ir.fneg(x))))

    def tanh(self, x):
        # (e − 1) / (e + 1) with e − 1 by its own polynomial keeps the digits of a small x.
        limit = self.format.one
        x = self.where(">", x, limit, self.number(limit), x)
        x = self.where("<", x, -limit, self.number(-limit), x)
        n, r = self._reduce(self.ir.fmul(x, self.number(2.0)))
        q = self.ir.fmul(r, self.polynomial(r, self.format.exponentials))
        one = self.number(1.0)
        power = self.scale(one, n)
        e = self.fma(power, q, self.ir.fsub(power, one))
        return self.ir.fdiv(e, self.ir.fadd(e, self.number(2.0)))


@intrinsic
def exp2(typingctx, x):
    """``2^x`` in every lane."""

    def codegen(context, builder, signature, args):
        return _Builder(builder, args[0]).exp2(args[0])

    return x(x), codegen


@intrinsic
def exp(typingctx, x):
    """``e^x`` in every lane."""

    def codegen(context, builder, signature, args):
        return _Builder(builder, args[0]).exp(args[0])

    return x(x), codegen


@intrinsic
def sigmoid(typingctx, x):
    """``1 / (1 + e^{−x})`` in every lane, within 3 units in the last place."""

    def codegen(context, builder, signature, args):
        return _Builder(builder, args[0]).sigmoid(args[0])

    return x(x), codegen


@intrinsic
def tanh(typingctx, x):
    """``tanh x`` in every lane, within 4 units in the last place."""

    def codegen(context, builder, signature, args):
        return _Builder(builder, args[0]).tanh(args[0])

    return x(x), codegen
