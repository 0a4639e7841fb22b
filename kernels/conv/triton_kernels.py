"""Triton kernels of the short convolution: one launch forward and one backward.

A program takes C tokens of a walk and BD channels; the first programs take chunks of tokens, the last ones
what belongs to a sequence as a whole: its final state, or the gradient of its initial one. A tap is a load of
the same tile some tokens earlier, which the first-level cache answers. Where the gradient goes through SiLU,
what was before it is computed again for every tap: W² such loads, and no second launch.

Letters: C tokens and BD channels of a tile, D channels, W taps, N chunks, S sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _input(x, state, sequence, start, n, position, column, D, W: tl.constexpr, STEP: tl.constexpr):
    """Load the inputs at these positions of a walk: of the state before 0, zeros from n on."""
    inside = (column < D)[None, :]
    token = start.to(tl.int64) + position.to(tl.int64) * STEP
    known = ((position >= 0) & (position < n))[:, None] & inside
    u = tl.load(x + token[:, None] * D + column[None, :], mask=known, other=0.0).to(tl.float32)
    if W > 1:
        early = ((position < 0) & (position > -W))[:, None] & inside
        row = (sequence.to(tl.int64) * D + column)[None, :] * (W - 1) + (position + W - 1)[:, None]
        u += tl.load(state + row, mask=early, other=0.0)
    return u


@triton.jit
def _tap(x, state, weight, w, sequence, start, n, position, column, D, W: tl.constexpr, STEP: tl.constexpr):
    tap = tl.load(weight + column * W + w, mask=column < D, other=0.0).to(tl.float32)
    return tap[None, :] * _input(x, state, sequence, start, n, position - (W - 1 - w), column, D, W, STEP)


@triton.jit
def _sum_taps(
    x, state, weight, bias, sequence, start, n, position, column, D, W: tl.constexpr, STEP: tl.constexpr
):
    """Convolve at these positions, without the activation."""
    inside = column < D
    total = tl.zeros((position.shape[0], column.shape[0]), tl.float32)
    # Few taps are unrolled; tiles of many would not fit the registers.
    if W <= 4:
        for w in tl.static_range(W):
            total += _tap(x, state, weight, w, sequence, start, n, position, column, D, W, STEP)
    else:
        for w in range(W):
            total += _tap(x, state, weight, w, sequence, start, n, position, column, D, W, STEP)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _gradient(
    dy, x, state, weight, bias, sequence, start, n, position, column, D,
    W: tl.constexpr, STEP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Give the gradient before the activation at these positions, zero outside the sequence."""
    token = start.to(tl.int64) + position.to(tl.int64) * STEP
    known = ((position >= 0) & (position < n))[:, None] & (column < D)[None, :]
    g = tl.load(dy + token[:, None] * D + column[None, :], mask=known, other=0.0).to(tl.float32)
    if SILU:
        o = _sum_taps(x, state, weight, bias, sequence, start, n, position, column, D, W, STEP)
        gate = tl.sigmoid(o)
        g *= gate * (1 + o * (1 - gate))
    return g


@triton.jit(do_not_specialize=("N",))
def convolve(
    x,  # (tokens, D)
    weight,  # (D, W)
    bias,  # (D,) or None
    state,  # (S, D, W - 1)
    y,
    final,  # (S, D, W - 1)
    chunks,
    sequences,
    N,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,  # ≥ W - 1
):
    """Outputs of a chunk, or the final state of a sequence."""
    index = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < D
    if index < N:
        sequence, position = tl.load(chunks + 4 * index), tl.load(chunks + 4 * index + 1)
        start, n = tl.load(chunks + 4 * index + 2), tl.load(chunks + 4 * index + 3)
        p = position + tl.arange(0, C)
        o = _sum_taps(x, state, weight, bias, sequence, start, n, p, column, D, W, STEP)
        if SILU:
            o *= tl.sigmoid(o)
        token = start.to(tl.int64) + p.to(tl.int64) * STEP
        tl.store(y + token[:, None] * D + column[None, :], o, mask=(p < n)[:, None] & inside[None, :])
    elif W > 1:
        sequence = index - N
        start, n = tl.load(sequences + 4 * sequence), tl.load(sequences + 4 * sequence + 1)
        k = tl.arange(0, BW)
        u = _input(x, state, sequence, start, n, n - (W - 1) + k, column, D, W, STEP)
        row = (sequence.to(tl.int64) * D + column)[None, :] * (W - 1) + k[:, None]
        tl.store(final + row, u, mask=(k < W - 1)[:, None] & inside[None, :])


@triton.jit
def _through_taps(
    dy, dstate, x, state, weight, bias, sequence, start, n, position, column, D,
    W: tl.constexpr, STEP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Give the gradient of the inputs at these positions, which a state's may be."""
    inside = column < D
    total = tl.zeros((position.shape[0], column.shape[0]), tl.float32)
    # Not unrolled: all those tiles at a time would not fit the registers.
    for w in range(W):
        tap = tl.load(weight + column * W + w, mask=inside, other=0.0).to(tl.float32)
        g = _gradient(
            dy, x, state, weight, bias, sequence, start, n, position + (W - 1 - w), column, D, W, STEP, SILU
        )
        total += tap[None, :] * g
    if W > 1:
        k = position - (n - (W - 1))
        kept = ((k >= 0) & (k < W - 1))[:, None] & inside[None, :]
        row = (sequence.to(tl.int64) * D + column)[None, :] * (W - 1) + k[:, None]
        total += tl.load(dstate + row, mask=kept, other=0.0)
    return total


@triton.jit(do_not_specialize=("N",))
def convolve_back(
    dy,
    dstate,
    x,
    weight,
    bias,
    state,
    dx,
    dinitial,
    partial,  # (N, W + 1, D): gradients of weight and bias from each chunk
    chunks,
    sequences,
    N,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
):
    """Gradients of a chunk, or of the initial state of a sequence."""
    index = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < D
    if index < N:
        sequence, position = tl.load(chunks + 4 * index), tl.load(chunks + 4 * index + 1)
        start, n = tl.load(chunks + 4 * index + 2), tl.load(chunks + 4 * index + 3)
        p = position + tl.arange(0, C)
        u = _through_taps(dy, dstate, x, state, weight, bias, sequence, start, n, p, column, D, W, STEP, SILU)
        token = start.to(tl.int64) + p.to(tl.int64) * STEP
        tl.store(dx + token[:, None] * D + column[None, :], u, mask=(p < n)[:, None] & inside[None, :])
        g = _gradient(dy, x, state, weight, bias, sequence, start, n, p, column, D, W, STEP, SILU)
        at = partial + index.to(tl.int64) * ((W + 1) * D) + column
        for w in range(W):
            u = _input(x, state, sequence, start, n, p - (W - 1 - w), column, D, W, STEP)
            tl.store(at + w * D, tl.sum(g * u, 0), mask=inside)
        tl.store(at + W * D, tl.sum(g, 0), mask=inside)
    elif W > 1:
        sequence = index - N
        start, n = tl.load(sequences + 4 * sequence), tl.load(sequences + 4 * sequence + 1)
        k = tl.arange(0, BW)
        du = _through_taps(
            dy, dstate, x, state, weight, bias, sequence, start, n, k - (W - 1), column, D, W, STEP, SILU
        )
        at_state = (sequence.to(tl.int64) * D + column)[None, :] * (W - 1) + k[:, None]
        tl.store(dinitial + at_state, du, mask=(k < W - 1)[:, None] & inside[None, :])
