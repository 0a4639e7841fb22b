"""What both forms of the recurrent kernels read and write: sequences, inputs of gates, what is kept.

Letters as in `triton_fused`.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_cells import tanh


@triton.jit
def walks_of(sequences, order, S, BB: tl.constexpr, PACKED: tl.constexpr):
    """First token, number of tokens and place in the batch of the sequences of this program."""
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = rows < S
    place = tl.load(order + rows, mask=inside, other=0) if PACKED else tl.where(inside, rows, 0)
    start = tl.load(sequences + 4 * place, mask=inside, other=0)
    n = tl.load(sequences + 4 * place + 1, mask=inside, other=0)
    return start, n, place.to(tl.int64), inside


@triton.jit
def gate(x, at, mask, bias):
    """Input of a gate and its bias, in float32."""
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + bias


@triton.jit
def store_kept(kept, k0, k1, k2, k3, k4, k5, k6, live, D: tl.constexpr, KEPT: tl.constexpr):
    """Write one vector, five or seven."""
    tl.store(kept, k0, mask=live)
    if KEPT > 1:
        tl.store(kept + D, k1, mask=live)
        tl.store(kept + 2 * D, k2, mask=live)
        tl.store(kept + 3 * D, k3, mask=live)
        tl.store(kept + 4 * D, k4, mask=live)
    if KEPT > 5:
        tl.store(kept + 5 * D, k5, mask=live)
        tl.store(kept + 6 * D, k6, mask=live)


@triton.jit
def store_gates(to, d0, d1, d2, d3, live, STRIDE: tl.constexpr, PLANES: tl.constexpr):
    """Write one gradient, or four."""
    tl.store(to, d0, mask=live)
    if PLANES > 1:
        tl.store(to + STRIDE, d1, mask=live)
        tl.store(to + 2 * STRIDE, d2, mask=live)
        tl.store(to + 3 * STRIDE, d3, mask=live)


@triton.jit
def kept_and_before(
    gates, state, t, p, P, head, own, live, d,
    N: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Read what the forward kept of token t at position p, and c (or h, the only state), n and h before it.

    ``t`` and ``p`` are columns, one number a sequence.
    """
    kept = gates + (t + head.to(tl.int64) * P) * KEPT * D + d
    earlier, later = kept - STEP * KEPT * D, live & (p > 0)
    first = live & (p == 0)
    k0 = tl.load(kept, mask=live, other=0.0)
    k1, k2, k3, k4, k5, k6, s = k0, k0, k0, k0, k0, k0, k0
    if KEPT == 1:
        c = tl.load(earlier, mask=later, other=0.0) + tl.load(state + own, mask=first, other=0.0)
        h = c
    else:
        k1 = tl.load(kept + D, mask=live, other=0.0)
        k2 = tl.load(kept + 2 * D, mask=live, other=0.0)
        k3 = tl.load(kept + 3 * D, mask=live, other=0.0)
        k4 = tl.load(kept + 4 * D, mask=live, other=0.0)
        c = tl.load(earlier + 4 * D, mask=later, other=0.0)
        h = tl.load(state + own, mask=first, other=0.0)
        if N == 1:
            h += c
            c = h
        else:
            c += tl.load(state + own + H * D, mask=first, other=0.0)
            o = tl.load(earlier + 3 * D, mask=later, other=0.0)
            if N > 2:
                k5 = tl.load(kept + 5 * D, mask=live, other=1.0)
                k6 = tl.load(kept + 6 * D, mask=live, other=0.0)
                s = tl.load(earlier + 5 * D, mask=later, other=1.0)
                h += tl.where(later, o * c / s, 0.0)
                s = tl.where(first, tl.load(state + own + 2 * H * D, mask=first, other=0.0), s)
            else:
                h += tl.where(later, o * tanh(c), 0.0)
    return k0, k1, k2, k3, k4, k5, k6, c, s, h
