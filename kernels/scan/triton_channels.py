"""Triton kernels of the scans whose channels are independent: elementwise, max-plus, log-sum-exp.

A program walks along a sequence, C tokens at a time, for BD channels: a tile is scanned by
`tl.associative_scan`, and what came before enters with its first row. Where that would leave the chip idle,
sequences are cut into segments: a first pass keeps only what each segment does (``TOTALS``), `join_channels`
finds the state before each, and a second pass starts from there.

``KIND`` is ``"real"``, ``"complex"``, ``"max_plus"`` or ``"logsumexp"``. An element of a scan is a pair (x,
y), where complex numbers have an imaginary part each and others none: (a, b) of ``h ← a h + b``, (g, i) of
``m ← max(m + g, i)``, and a level with the sum below it. With ``BACK`` it is a gradient that is scanned, on a
walk the other way: ``g_t = a_{t+1}* g_{t+1} + dh_t``.

Letters: C tokens and BD channels of a tile, D channels, N segments.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
EMPTY = tl.constexpr(float("-inf"))


@triton.jit
def product(x, y):
    """Multiply two coefficients; what overflows is held, lest 0 · ∞ appear, and NaN stays."""
    p = x * y
    return tl.where(p > LARGEST, LARGEST, tl.where(p < -LARGEST, -LARGEST, p))


@triton.jit
def affine(x1, y1, x2, y2):
    """Combine two steps of ``h ← x h + y``, the first on the left."""
    return product(x2, x1), x2 * y1 + y2


@triton.jit
def _held(x, known):
    # ∞ − ∞ of two products; a NaN that came in is known and stays.
    x = tl.where((x != x) & known, 0.0, x)
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))


@triton.jit
def complex_affine(a1, b1, c1, d1, a2, b2, c2, d2):
    """Combine two steps of ``h ← (a + ib) h + (c + id)``."""
    known = (a1 == a1) & (b1 == b1) & (a2 == a2) & (b2 == b2)
    a, b = _held(a2 * a1 - b2 * b1, known), _held(a2 * b1 + b2 * a1, known)
    return a, b, a2 * c1 - b2 * d1 + c2, a2 * d1 + b2 * c1 + d2


@triton.jit
def larger(x, y):
    """Maximum that keeps NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_plus(x1, y1, x2, y2):
    """Combine two steps of ``m ← max(m + x, y)``."""
    return x1 + x2, larger(y1 + x2, y2)


@triton.jit
def finite(level):
    """Replace −inf by 0, to subtract it from −inf."""
    return tl.where(level == EMPTY, 0.0, level)


@triton.jit
def log_of_sum(level, total):
    """Give the logarithm of a sum that is measured below ``level``."""
    return tl.where(level == EMPTY, level, level + tl.log(tl.where(level == EMPTY, 1.0, total)))


@triton.jit
def logsumexp(x1, y1, x2, y2):
    """Combine two sums ``y`` that are measured below the levels ``x``."""
    x = larger(x1, x2)
    base = finite(x)
    return x, y1 * tl.exp(x1 - base) + y2 * tl.exp(x2 - base)


@triton.jit
def combine(xr1, xi1, yr1, yi1, xr2, xi2, yr2, yi2, RING: tl.constexpr):
    """Combine two elements."""
    if RING == "complex":
        return complex_affine(xr1, xi1, yr1, yi1, xr2, xi2, yr2, yi2)
    if RING == "max_plus":
        x, y = max_plus(xr1, yr1, xr2, yr2)
        return x, x, y, y
    if RING == "logsumexp":
        x, y = logsumexp(xr1, yr1, xr2, yr2)
        return x, x, y, y
    x, y = affine(xr1, yr1, xr2, yr2)
    return x, x, y, y


@triton.jit
def _scan(xr, xi, yr, yi, RING: tl.constexpr):
    if RING == "complex":
        return tl.associative_scan((xr, xi, yr, yi), 0, complex_affine)
    if RING == "max_plus":
        x, y = tl.associative_scan((xr, yr), 0, max_plus)
        return x, x, y, y
    if RING == "logsumexp":
        x, y = tl.associative_scan((xr, yr), 0, logsumexp)
        return x, x, y, y
    x, y = tl.associative_scan((xr, yr), 0, affine)
    return x, x, y, y


@triton.jit
def _identity(like, RING: tl.constexpr):
    """Give the element that changes nothing."""
    zero = tl.zeros_like(like)
    if RING == "max_plus":
        return zero, zero, zero + EMPTY, zero
    if RING == "logsumexp":
        return zero + EMPTY, zero, zero, zero
    return zero + 1.0, zero, zero, zero


@triton.jit
def _load(x, at, mask, other, KIND: tl.constexpr):
    """Load real and imaginary parts, ``other`` where ``mask`` is not."""
    if KIND == "complex":
        return tl.load(x + 2 * at, mask=mask, other=other), tl.load(x + 2 * at + 1, mask=mask, other=0.0)
    real = tl.load(x + at, mask=mask, other=other).to(tl.float32)
    return real, real


@triton.jit
def _store(x, at, real, imaginary, mask, KIND: tl.constexpr):
    if KIND == "complex":
        tl.store(x + 2 * at, real, mask=mask)
        tl.store(x + 2 * at + 1, imaginary, mask=mask)
    else:
        tl.store(x + at, real, mask=mask)


@triton.jit
def _start(state, at, mask, KIND: tl.constexpr, BACK: tl.constexpr):
    """Give the element that a state is."""
    if KIND == "logsumexp" and not BACK:
        level = tl.load(state + at, mask=mask, other=EMPTY)
        return level, level, tl.where(level == EMPTY, 0.0, 1.0), level
    yr, yi = _load(state, at, mask, 0.0, KIND)
    return tl.full(yr.shape, 1.0, tl.float32), tl.zeros_like(yr), yr, yi


@triton.jit
def _finish(
    final,
    at,
    mask,
    xr,
    yr,
    yi,
    x,
    level,
    origin,
    start,
    n,
    column,
    D,
    STEP,
    KIND: tl.constexpr,
    BACK: tl.constexpr,
):
    """Store the state that the element at the end of a walk is, or with BACK the initial state's gradient."""
    if BACK:
        # What the walk's last token, the sequence's first, does to the gradient.
        token = (start.to(tl.int64) + (n - 1).to(tl.int64) * STEP) * D + column
        some = column < tl.where(n > 0, D, 0)
        if KIND == "logsumexp":
            z = tl.load(origin + at, mask=mask, other=EMPTY)
            m = tl.load(level + token, mask=some, other=EMPTY)
            kept = tl.exp(tl.where(n > 0, z - finite(m), 0.0))
            yr = tl.where(z == EMPTY, 0.0, yr * kept)
        else:
            ar, ai = _load(x, token, some, 1.0, KIND)
            if KIND == "complex":
                yr, yi = ar * yr + ai * yi, ar * yi - ai * yr
            else:
                yr = ar * yr
    elif KIND == "logsumexp":
        yr = log_of_sum(xr, yr)
    _store(final, at, yr, yi, mask, KIND)


@triton.jit(do_not_specialize=("length",))
def walk_channels(
    x,  # (tokens, D): a, g or s
    y,  # b, i or nothing; with BACK the gradient of the output
    level,  # with BACK: of "logsumexp" the level of each token …
    before,  # … and the sum below it; of the others, the state before each token
    state,  # (sequences, D), or the elements (N, 4, D) before each segment
    origin,  # the initial state, with BACK of "logsumexp"
    out,
    other,  # second output: the gradient of a, the sum; None for none
    final,  # (sequences, D), or None in segments
    totals,  # (N, 4, D), with TOTALS
    table,  # sequences or segments
    length,  # tokens a segment
    D,
    KIND: tl.constexpr,
    BACK: tl.constexpr,
    EARLIER: tl.constexpr,  # store the state before each token and not after it
    SPLIT: tl.constexpr,
    TOTALS: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
):
    """Scan a sequence or a segment."""
    # The gradient of a log-sum-exp is an affine scan.
    RING: tl.constexpr = "real" if BACK and KIND == "logsumexp" else KIND
    index = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < D
    begin = 0
    if SPLIT:
        begin = tl.load(table + 4 * index + 1)
        start = tl.load(table + 4 * index + 2)
        n = tl.load(table + 4 * index + 3)
        end = tl.minimum(n, begin + length)
    else:
        start = tl.load(table + 4 * index)
        n = tl.load(table + 4 * index + 1)
        end = n
    at = index.to(tl.int64) * D + column
    part = index.to(tl.int64) * (4 * D) + column
    if TOTALS:
        cxr, cxi, cyr, cyi = _identity(column.to(tl.float32), RING)
    elif SPLIT:
        cxr, cxi = tl.load(state + part, mask=inside), tl.load(state + part + D, mask=inside)
        cyr, cyi = tl.load(state + part + 2 * D, mask=inside), tl.load(state + part + 3 * D, mask=inside)
    else:
        cxr, cxi, cyr, cyi = _start(state, at, inside, KIND, BACK)
    t = tl.arange(0, C)
    if EARLIER:
        first = start.to(tl.int64) * D + column
        some = tl.where((n > 0) & (start + begin * STEP == start), D, 0)
        _store(out, first, cyr, cyi, column < some, KIND)
    for p in range(begin, end, C):
        position = p + t
        mask = (position < end)[:, None] & inside[None, :]
        token = (start.to(tl.int64) + position.to(tl.int64) * STEP)[:, None] * D + column[None, :]
        if BACK:
            # The token that comes before on this walk is the next one in time.
            later = mask & (position > 0)[:, None]
            yr, yi = _load(y, token, mask, 0.0, KIND)
            if KIND == "logsumexp":
                m = tl.load(level + token, mask=mask, other=EMPTY)
                u = tl.load(before + token, mask=mask, other=0.0)
                above = tl.load(level + token - STEP * D, mask=later, other=0.0)
                share = tl.where(u > 0, 1.0 / tl.where(u > 0, u, 1.0), 0.0)
                yr = yr * share
                # The gradient of the final state comes in as that of one more output.
                xr = tl.where((position == 0)[:, None], share, tl.exp(m - finite(above)))
                xr = tl.where(mask, tl.where(m == EMPTY, 0.0, xr), 1.0)
                xi = xr
            else:
                xr, xi = _load(x, token - STEP * D, later, 1.0, KIND)
                if KIND == "complex":
                    xi = -xi
        elif KIND == "logsumexp":
            xr, xi = _load(x, token, mask, EMPTY, KIND)
            yr = tl.where(xr == EMPTY, 0.0, 1.0)
            yi = yr
        else:
            xr, xi = _load(x, token, mask, 0.0 if KIND == "max_plus" else 1.0, KIND)
            yr, yi = _load(y, token, mask, EMPTY if KIND == "max_plus" else 0.0, KIND)
        fxr, fxi, fyr, fyi = combine(
            cxr[None, :], cxi[None, :], cyr[None, :], cyi[None, :], xr, xi, yr, yi, RING
        )
        enters = (t == 0)[:, None]
        xr, xi = tl.where(enters, fxr, xr), tl.where(enters, fxi, xi)
        yr, yi = tl.where(enters, fyr, yr), tl.where(enters, fyi, yi)
        xr, xi, yr, yi = _scan(xr, xi, yr, yi, RING)
        leaves = (t == C - 1)[:, None]
        cxr, cxi = tl.sum(tl.where(leaves, xr, 0.0), 0), tl.sum(tl.where(leaves, xi, 0.0), 0)
        cyr, cyi = tl.sum(tl.where(leaves, yr, 0.0), 0), tl.sum(tl.where(leaves, yi, 0.0), 0)
        if not TOTALS:
            if EARLIER:
                _store(out, token + STEP * D, yr, yi, mask & (position + 1 < n)[:, None], KIND)
            elif KIND == "logsumexp":
                if BACK:
                    s = tl.load(x + token, mask=mask, other=EMPTY).to(tl.float32)
                    gate = tl.where(m == EMPTY, 0.0, tl.exp(s - finite(m)))
                    tl.store(out + token, gate * yr, mask=mask)
                elif other is None:
                    tl.store(out + token, log_of_sum(xr, yr), mask=mask)
                else:
                    tl.store(out + token, xr, mask=mask)
                    tl.store(other + token, yr, mask=mask)
            else:
                _store(out, token, yr, yi, mask, KIND)
                if BACK:
                    hr, hi = _load(before, token, mask, 0.0, KIND)
                    if KIND == "complex":
                        _store(other, token, yr * hr + yi * hi, yi * hr - yr * hi, mask, KIND)
                    else:
                        tl.store(other + token, yr * hr, mask=mask)
    if TOTALS:
        _store_element(totals, part, cxr, cxi, cyr, cyi, inside, D)
    if not SPLIT:
        _finish(final, at, inside, cxr, cyr, cyi, x, level, origin, start, n, column, D, STEP, KIND, BACK)


@triton.jit
def _store_element(to, at, xr, xi, yr, yi, mask, D):
    tl.store(to + at, xr, mask=mask)
    tl.store(to + at + D, xi, mask=mask)
    tl.store(to + at + 2 * D, yr, mask=mask)
    tl.store(to + at + 3 * D, yi, mask=mask)


@triton.jit
def join_channels(
    parts,  # (N, 4, D): what each segment does; on return, the element before it
    x,
    level,
    state,
    origin,
    final,
    table,
    D,
    KIND: tl.constexpr,
    BACK: tl.constexpr,
    STEP: tl.constexpr,
    BD: tl.constexpr,
):
    """Find the state before every segment, and the final state."""
    RING: tl.constexpr = "real" if BACK and KIND == "logsumexp" else KIND
    index = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < D
    start, n = tl.load(table + 4 * index), tl.load(table + 4 * index + 1)
    first, count = tl.load(table + 4 * index + 2), tl.load(table + 4 * index + 3)
    at = index.to(tl.int64) * D + column
    xr, xi, yr, yi = _start(state, at, inside, KIND, BACK)
    for i in range(count):
        part = (first + i).to(tl.int64) * (4 * D) + column
        pxr, pxi = tl.load(parts + part, mask=inside), tl.load(parts + part + D, mask=inside)
        pyr, pyi = tl.load(parts + part + 2 * D, mask=inside), tl.load(parts + part + 3 * D, mask=inside)
        _store_element(parts, part, xr, xi, yr, yi, inside, D)
        xr, xi, yr, yi = combine(xr, xi, yr, yi, pxr, pxi, pyr, pyi, RING)
    _finish(final, at, inside, xr, yr, yi, x, level, origin, start, n, column, D, STEP, KIND, BACK)
