"""The cells themselves for the Numba kernels: one token of one head, both ways, a vector at a time.

A row of gates is ``G`` stretches of ``DP`` numbers, D rounded up to whole vectors. ``D − d`` tells how much
of the vector at d is there; the rest is read as zeros (or ones, where it is divided by) and not written.
"""
# Numba and llvmlite ship no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from ..simd import BYTES, add, fma, fnma, intrinsic, jit, load, mul, repeat, store, sub, zeros
from ..vector_math import exp, sigmoid, tanh


@intrinsic
def divide(typingctx, x, y):
    """``x / y``."""

    def codegen(context, builder, signature, args):
        return builder.fdiv(*args)

    return x(x, x), codegen


@intrinsic
def larger(typingctx, x, y):
    """Larger of x and y, x where one is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return x(x, x), codegen


@intrinsic
def nonzero(typingctx, test, x, y):
    """``x`` in the lanes where ``test`` is not zero, ``y`` in the others."""

    def codegen(context, builder, signature, args):
        zero = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_unordered("!=", args[0], zero), args[1], args[2])

    return x(test, x, x), codegen


def _masked(builder, vector, name, result, args):
    suffix = f"v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}.p0"
    kind = ir.FunctionType(result, [x.type for x in args])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.{name}.{suffix}"), args
    )


def _place(context, builder, signature, args, vector, left):
    """Address of a vector, and which of its lanes are there."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    pointer = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
    blank = ir.Constant(ir.VectorType(left.type, vector.count), ir.Undefined)
    first = builder.insert_element(blank, left, ir.Constant(ir.IntType(32), 0))
    spread = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    lanes = ir.Constant(ir.VectorType(left.type, vector.count), list(range(vector.count)))
    return pointer, builder.icmp_signed("<", lanes, builder.shuffle_vector(first, blank, spread))


@intrinsic
def load_first(typingctx, array, index, left, other):
    """Vector at ``index``, of which the first ``left`` numbers are there; ``other`` in place of the rest."""

    def codegen(context, builder, signature, args):
        vector = args[3].type
        pointer, mask = _place(context, builder, signature, args, vector, args[2])
        align = ir.Constant(ir.IntType(32), signature.args[0].dtype.bitwidth // 8)
        return _masked(builder, vector, "load", vector, [pointer, align, mask, args[3]])

    return other(array, types.intp, types.intp, other), codegen


@intrinsic
def store_first(typingctx, array, index, left, value):
    """Write the first ``left`` numbers of ``value``."""

    def codegen(context, builder, signature, args):
        vector = args[3].type
        pointer, mask = _place(context, builder, signature, args, vector, args[2])
        align = ir.Constant(ir.IntType(32), signature.args[0].dtype.bitwidth // 8)
        _masked(builder, vector, "store", ir.VoidType(), [args[3], pointer, align, mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), codegen


@jit
def get(x, at, left, other):
    """Vector at ``at``, of which ``left`` numbers are there; what ``other`` holds in place of the rest."""
    if left >= BYTES // x.itemsize:
        return load(x, at)
    return load_first(x, at, left, other)


@jit
def put(x, at, left, value):
    """Write the first ``left`` numbers of ``value``."""
    if left >= BYTES // x.itemsize:
        store(x, at, value)
    else:
        store_first(x, at, left, value)


@jit
def slope(y, one):
    """``y (1 − y)``, derivative of the sigmoid whose value is y."""
    return fnma(y, y, mul(y, one))


@jit
def log_sigmoid(x, sample):
    """``log σ(x) = min(x, 0) − log(1 + e)``, ``e = exp(−|x|)``; the log is ``2 artanh(e / (2 + e))``."""
    one = sample.dtype.type(1)
    zero = zeros(sample)
    size = larger(x, sub(zero, x))
    e = exp(sub(zero, size))
    s = divide(e, add(e, repeat(one + one)))
    square = mul(s, s)
    # s ≤ 1/3, so that the terms fall by a factor of nine.
    terms = 7 if sample.itemsize == 4 else 17
    total = repeat(one / sample.dtype.type(2 * terms + 1))
    for k in range(terms - 1, -1, -1):
        total = fma(total, square, repeat(one / sample.dtype.type(2 * k + 1)))
    low = sub(zero, larger(zero, sub(zero, x)))
    return fnma(add(s, s), total, low)


@jit
def forward_row(kind, pre, r, h, held, x, at, stride, gates, keep, to, D, DP):
    """Take the sums of row ``r`` in ``pre`` to the next states, and keep at ``to`` what the backward needs.

    ``x[at + g · stride]`` is the input of gate g, which the GRU needs apart from the recurrent sum.
    """
    lanes = BYTES // pre.itemsize
    one, none = repeat(pre.dtype.type(1)), zeros(pre)
    for d in range(0, DP, lanes):
        left, own = D - d, r * DP + d
        if kind == 0:  # lstm
            a = r * 4 * DP + d
            i, f = sigmoid(load(pre, a)), sigmoid(load(pre, a + DP))
            g, o = tanh(load(pre, a + 2 * DP)), sigmoid(load(pre, a + 3 * DP))
            c = fma(f, load(held, own), mul(i, g))
            store(held, own, c)
            store(h, own, mul(o, tanh(c)))
            if keep:
                put(gates, to + d, left, i)
                put(gates, to + D + d, left, f)
                put(gates, to + 2 * D + d, left, g)
                put(gates, to + 3 * D + d, left, o)
                put(gates, to + 4 * D + d, left, c)
        elif kind == 1:  # gru
            a = r * 3 * DP + d
            reset, z = sigmoid(load(pre, a)), sigmoid(load(pre, a + DP))
            recurrent = load(pre, a + 2 * DP)
            n = tanh(fma(reset, recurrent, get(x, at + 2 * stride + d, left, none)))
            new = fma(z, sub(load(h, own), n), n)
            store(h, own, new)
            if keep:
                put(gates, to + d, left, reset)
                put(gates, to + D + d, left, z)
                put(gates, to + 2 * D + d, left, n)
                put(gates, to + 3 * D + d, left, recurrent)
                put(gates, to + 4 * D + d, left, new)
        elif kind == 4:  # elman
            new = tanh(load(pre, own))
            store(h, own, new)
            if keep:
                put(gates, to + d, left, new)
        else:  # slstm
            a, s = r * 4 * DP + d, 3 * r * DP + d
            i, f = load(pre, a), load(pre, a + DP)
            z, o = tanh(load(pre, a + 2 * DP)), sigmoid(load(pre, a + 3 * DP))
            c, n, m = load(held, s), load(held, s + DP), load(held, s + 2 * DP)
            past = add(m, log_sigmoid(f, pre) if kind == 2 else f)
            m = nonzero(n, larger(past, i), i)
            forget = nonzero(n, exp(sub(past, m)), none)
            enter = exp(sub(i, m))
            c, n = fma(forget, c, mul(enter, z)), fma(forget, n, enter)
            store(held, s, c)
            store(held, s + DP, n)
            store(held, s + 2 * DP, m)
            store(h, own, divide(mul(o, c), n))
            if keep:
                put(gates, to + d, left, enter)
                put(gates, to + D + d, left, forget)
                put(gates, to + 2 * D + d, left, z)
                put(gates, to + 3 * D + d, left, o)
                put(gates, to + 4 * D + d, left, c)
                put(gates, to + 5 * D + d, left, n)
                put(gates, to + 6 * D + d, left, sigmoid(sub(none, f)) if kind == 2 else one)


@jit
def backward_row(
    kind, dpre, r, dh, held, dy, here, after, gates, at, source, c_at, n_at, drec, to, stride, before, D, DP
):  # fmt: skip
    """Take row ``r``'s gradients of h and of the other states through one token.

    Args:
        kind: number of the cell.
        dpre: row ``r`` receives the gradients of the recurrent sums.
        r: the row.
        dh: row ``r`` holds h's gradient, and receives what of it does not pass the recurrent sums.
        held: row ``r`` holds the other states' gradients.
        dy: gradient of the output, ``(P, H, D)``; this token's at ``here``.
        here, after: where ``before`` holds what h was before this token and before the next; ``after`` is −1
            at the last.
        gates: what the forward kept; this token's at ``at``.
        source: holds c of the token before, or the only state, at ``c_at``, and n at ``n_at``.
        drec: receives the gradients of the recurrent sums, and the GRU's of its candidate, ``stride`` apart
            from ``to`` on.
        before: receives h of each token's predecessor where that is known here.
        D, DP: head size, and rounded up to whole vectors.
    """
    lanes = BYTES // dpre.itemsize
    one, none = repeat(dpre.dtype.type(1)), zeros(dpre)
    for d in range(0, DP, lanes):
        left, own = D - d, r * DP + d
        g = add(load(dh, own), get(dy, here + d, left, none))
        if kind == 0:  # lstm
            i, f = get(gates, at + d, left, none), get(gates, at + D + d, left, none)
            z, o = get(gates, at + 2 * D + d, left, none), get(gates, at + 3 * D + d, left, none)
            bent = tanh(get(gates, at + 4 * D + d, left, none))
            dc = fma(mul(g, o), fnma(bent, bent, one), load(held, own))
            di, df = (
                mul(mul(dc, z), slope(i, one)),
                mul(mul(dc, get(source, c_at + d, left, none)), slope(f, one)),
            )
            dz, do = mul(mul(dc, i), fnma(z, z, one)), mul(mul(g, bent), slope(o, one))
            store(held, own, mul(dc, f))
            store(dh, own, none)
            _four(dpre, r, d, DP, drec, to, stride, left, di, df, dz, do)
            if after >= 0:
                put(before, after + d, left, mul(o, bent))
        elif kind == 1:  # gru
            reset, z = get(gates, at + d, left, none), get(gates, at + D + d, left, none)
            n, recurrent = get(gates, at + 2 * D + d, left, none), get(gates, at + 3 * D + d, left, none)
            h = get(source, c_at + d, left, none)
            dn = mul(mul(g, sub(one, z)), fnma(n, n, one))
            dz, dr = mul(mul(g, sub(h, n)), slope(z, one)), mul(mul(dn, recurrent), slope(reset, one))
            store(dh, own, mul(g, z))
            a = r * 3 * DP + d
            store(dpre, a, dr)
            store(dpre, a + DP, dz)
            store(dpre, a + 2 * DP, mul(dn, reset))
            put(drec, to + d, left, dr)
            put(drec, to + stride + d, left, dz)
            put(drec, to + 2 * stride + d, left, mul(dn, reset))
            put(drec, to + 3 * stride + d, left, dn)
            put(before, here + d, left, h)
        elif kind == 4:  # elman
            y = get(gates, at + d, left, none)
            g = mul(g, fnma(y, y, one))
            store(dpre, own, g)
            store(dh, own, none)
            put(drec, to + d, left, g)
            put(before, here + d, left, get(source, c_at + d, left, none))
        else:  # slstm
            enter, forget = get(gates, at + d, left, none), get(gates, at + D + d, left, none)
            z, o = get(gates, at + 2 * D + d, left, none), get(gates, at + 3 * D + d, left, none)
            n = get(gates, at + 5 * D + d, left, one)
            ratio = divide(get(gates, at + 4 * D + d, left, none), n)
            step = divide(mul(g, o), n)
            s = 3 * r * DP + d
            dc, dn = add(load(held, s), step), fnma(step, ratio, load(held, s + DP))
            past = mul(dc, get(source, c_at + d, left, none))
            past = mul(fma(dn, get(source, n_at + d, left, none), past), forget)
            di = mul(fma(dc, z, dn), enter)
            # m was the larger of two terms: that one's gate is exp(0), and to it goes m's gradient.
            dm = sub(sub(load(held, s + 2 * DP), past), di)
            lost = sub(forget, one)
            di, past = nonzero(lost, add(di, dm), di), nonzero(lost, past, add(past, dm))
            store(held, s, mul(dc, forget))
            store(held, s + DP, mul(dn, forget))
            store(held, s + 2 * DP, past)
            store(dh, own, none)
            df = mul(past, get(gates, at + 6 * D + d, left, none))
            dz, do = mul(mul(dc, enter), fnma(z, z, one)), mul(mul(g, ratio), slope(o, one))
            _four(dpre, r, d, DP, drec, to, stride, left, di, df, dz, do)
            if after >= 0:
                put(before, after + d, left, mul(o, ratio))


@jit
def _four(dpre, r, d, DP, drec, to, stride, left, g0, g1, g2, g3):
    a = 4 * r * DP + d
    store(dpre, a, g0)
    store(dpre, a + DP, g1)
    store(dpre, a + 2 * DP, g2)
    store(dpre, a + 3 * DP, g3)
    put(drec, to + d, left, g0)
    put(drec, to + stride + d, left, g1)
    put(drec, to + 2 * stride + d, left, g2)
    put(drec, to + 3 * stride + d, left, g3)
