"""The selective scan on a CPU: Numba, one task for some channels of a sequence, vectors along the channels.

Within a chunk of `CHUNK` tokens a state is followed through all tokens before the next one is taken up, so
that it stays in a register and all that the loop reads lies in first-level cache. With G_t the gradient of
h_t, a_t = exp(dt_t A) and g the gradient of y before its gate, the backward pass walks

    G_t = C_t g_t + a_{t+1} G_{t+1},   dC_t = Σ g_t h_t,   dB_t = Σ G_t dt_t x_t   (Σ over channels)
    d(dt x)_t = G_t · B_t,   d(dt)_t += A · (G_t a_t h_{t−1}),   dA = Σ_t dt_t G_t a_t h_{t−1}

from the state before each chunk, which a pass over the states alone has left. The sums over channels are made
of one part a task, in a fixed order.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..simd import BYTES, fma, jit, kernel, load, mul, prefetch, repeat, splat, store, sub, zeros
from ..token_groups import as_array, blank, fresh, sequence_table
from ..vector_math import exp2, sigmoid
from ..vector_sums import add_totals

CHUNK = 64
BLOCKS = 8
"""Vectors of channels a task: what is read of a token is then longer than a cache line or two."""

LOG2 = math.log(2)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""
    walks = sequence_table(cu_seqlens, x.shape[0], x.shape[1], reverse)
    h = _by_block(state)
    y = fresh(x.shape, A.dtype)
    _run_forward(
        len(walks) * _groups(h),
        walks,
        *_inputs(x, dt, A, B, C, D, z),
        h.numpy(),
        y.numpy(),
    )
    return y.to(x.dtype), _by_channel(h, state)


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, dt, A, B, C, D, z and the state."""
    walks = sequence_table(cu_seqlens, x.shape[0], x.shape[1], reverse)
    h, d = _by_block(state), _by_block(dstate.to(A.dtype))
    dx, ddt = (fresh(x.shape, A.dtype) for _ in range(2))
    dz = fresh((0, 0, 0) if z is None else z.shape, A.dtype)
    dB, dC = (fresh((_groups(h), B.numel()), A.dtype) for _ in range(2))
    dA, dD = torch.zeros_like(h), torch.zeros_like(h[:, :, 0])
    _run_backward(
        len(walks) * _groups(h),
        walks,
        *_inputs(x, dt, A, B, C, D, z),
        h.numpy(),
        as_array(dy, A.dtype),
        d.numpy(),
        *(t.numpy() for t in (dx, ddt, dA, dB, dC, dD, dz)),
    )
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        _by_channel(dA, state).sum(0),
        dB.sum(0).view(B.shape).to(B.dtype),
        dC.sum(0).view(C.shape).to(C.dtype),
        dD.flatten(1)[:, : x.shape[2]].sum(0),
        None if z is None else dz.to(z.dtype),
        _by_channel(d, state),
    )


def _inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None) -> list[Any]:
    """Everything that does not change, as arrays of one type; A in base 2 and by blocks."""
    gate = x.new_empty(0, 0, 0) if z is None else z
    rates = _by_block(A[None] / LOG2)[0]
    skip = pad(D, (0, rates[:, 0].numel() - D.numel()))
    return [as_array(t, A.dtype) for t in (x, dt, rates, B, C, skip, gate)]


def _by_block(x: Tensor) -> Tensor:
    """Turn ``(S, D, N)`` into ``(S, blocks, N, lanes)``, zeros where there is no channel; always a copy.

    N is rounded up to a pair, as the kernels take two states at a time.
    """
    lanes = BYTES // x.element_size()
    x = pad(x.detach(), (0, x.shape[2] % 2, 0, -x.shape[1] % lanes))
    x = x.reshape(x.shape[0], x.shape[1] // lanes, lanes, x.shape[2]).transpose(2, 3)
    return x.clone(memory_format=torch.contiguous_format)


def _by_channel(x: Tensor, like: Tensor) -> Tensor:
    """Undo `_by_block`."""
    channels = x.transpose(2, 3).flatten(1, 2)[:, : like.shape[1], : like.shape[2]]
    return channels.clone(memory_format=torch.contiguous_format)


def _groups(h: Tensor) -> int:
    return -(-h.shape[1] // BLOCKS)


@jit
def _take(tile, x, D, token, step, m, column):
    """Copy the vector at ``column`` of m rows of x, from row ``token`` on; zeros where the row ends."""
    lanes = BYTES // x.itemsize
    if column + lanes <= D:
        for t in range(m):
            at = (token + t * step) * D + column
            store(tile, t * lanes, load(x, at))
            # The next chunk lies on other pages of memory, where the processor does not look by itself.
            prefetch(x, at + CHUNK * step * D)
    else:
        flat = x.reshape(x.size)
        for t in range(m):
            store(tile, t * lanes, zeros(x))
            for j in range(D - column):
                tile[t * lanes + j] = flat[(token + t * step) * D + column + j]


@jit
def _give(x, D, token, step, m, column, tile):
    """Copy a tile back to where `_take` would find it."""
    lanes = BYTES // x.itemsize
    if column + lanes <= D:
        for t in range(m):
            store(x, (token + t * step) * D + column, load(tile, t * lanes))
    else:
        flat = x.reshape(x.size)
        for t in range(m):
            for j in range(D - column):
                flat[(token + t * step) * D + column + j] = tile[t * lanes + j]


@jit
def _read_rows(rows, x, N, token, step, m):
    """Copy m rows of ``x (…, N)``, N rounded up to a pair."""
    width, flat = N + N % 2, x.reshape(x.size)
    for t in range(m):
        at = (token + t * step) * N
        for s in range(N):
            rows[t * width + s] = flat[at + s]


@jit
def _follow(h, rates, dt, u, B, C, m, y):
    """Take the states h of a block through m tokens, and add to y what is read of them."""
    N, lanes = h.shape
    for s in range(0, N, 2):
        h0, h1 = load(h, s * lanes), load(h, (s + 1) * lanes)
        r0, r1 = load(rates, s * lanes), load(rates, (s + 1) * lanes)
        for t in range(m):
            j, k = t * lanes, t * N + s
            d, w = load(dt, j), load(u, j)
            h0 = fma(exp2(mul(d, r0)), h0, mul(w, splat(B, k)))
            h1 = fma(exp2(mul(d, r1)), h1, mul(w, splat(B, k + 1)))
            store(y, j, fma(splat(C, k + 1), h1, fma(splat(C, k), h0, load(y, j))))
        store(h, s * lanes, h0)
        store(h, (s + 1) * lanes, h1)


@jit
def _follow_back(d, dA, h, rates, dt, u, g, B, C, m, y, du, ddt, sums, scratch):
    """Take the states h of a block through m tokens again, and their gradient d back.

    Adds to du, ddt, dA, to y, which the gate needs, and to sums ``(m, N / 2, 4)`` the part of dB and dC that
    the block has in a pair of states. The scratch holds decays, and what is left of the states before.
    """
    N, lanes = h.shape
    for s in range(0, N, 2):
        h0, h1 = load(h, s * lanes), load(h, (s + 1) * lanes)
        r0, r1 = load(rates, s * lanes), load(rates, (s + 1) * lanes)
        for t in range(m):
            i, j, k = 4 * t * lanes, t * lanes, t * N + s
            step, w = load(dt, j), load(u, j)
            a0, a1 = exp2(mul(step, r0)), exp2(mul(step, r1))
            h0, h1 = mul(a0, h0), mul(a1, h1)
            store(scratch, i, a0)
            store(scratch, i + lanes, a1)
            store(scratch, i + 2 * lanes, h0)
            store(scratch, i + 3 * lanes, h1)
            h0, h1 = fma(w, splat(B, k), h0), fma(w, splat(B, k + 1), h1)
        d0, d1 = load(d, s * lanes), load(d, (s + 1) * lanes)
        dr0, dr1 = load(dA, s * lanes), load(dA, (s + 1) * lanes)
        for t in range(m - 1, -1, -1):
            i, j, k = 4 * t * lanes, t * lanes, t * N + s
            w, out, step = load(u, j), load(g, j), load(dt, j)
            b0, b1, c0, c1 = splat(B, k), splat(B, k + 1), splat(C, k), splat(C, k + 1)
            k0, k1 = load(scratch, i + 2 * lanes), load(scratch, i + 3 * lanes)
            d0, d1 = fma(out, c0, d0), fma(out, c1, d1)
            h0, h1 = fma(w, b0, k0), fma(w, b1, k1)
            add_totals(sums, 2 * k, mul(d0, w), mul(d1, w), mul(h0, out), mul(h1, out))
            store(y, j, fma(c1, h1, fma(c0, h0, load(y, j))))
            store(du, j, fma(d1, b1, fma(d0, b0, load(du, j))))
            k0, k1 = mul(d0, k0), mul(d1, k1)
            store(ddt, j, fma(k1, r1, fma(k0, r0, load(ddt, j))))
            dr0, dr1 = fma(k0, step, dr0), fma(k1, step, dr1)
            d0, d1 = mul(d0, load(scratch, i)), mul(d1, load(scratch, i + lanes))
        store(d, s * lanes, d0)
        store(d, (s + 1) * lanes, d1)
        store(dA, s * lanes, dr0)
        store(dA, (s + 1) * lanes, dr1)


@jit
def _give_sums(dB, dC, N, token, step, m, sums):
    """Write what `_follow_back` added up to m rows of dB and dC, and set it to zero again."""
    width = N + N % 2
    for t in range(m):
        at = (token + t * step) * N
        for s in range(N):
            i = 2 * (t * width + s - s % 2) + s % 2
            dB[at + s], dC[at + s] = sums[i], sums[i + 2]
    sums[:] = 0


@jit
def _gate(y, z, m):
    """Turn y into ``y silu(z)``."""
    lanes = BYTES // y.itemsize
    for i in range(0, m * lanes, lanes):
        v = load(z, i)
        store(y, i, mul(load(y, i), mul(v, sigmoid(v))))


@jit
def _gate_back(g, z, m):
    """Turn the gradient g of ``y silu(z)`` into that of y, and z into what times y is its own."""
    lanes = BYTES // g.itemsize
    one = repeat(g.dtype.type(1))
    for i in range(0, m * lanes, lanes):
        v, out = load(z, i), load(g, i)
        s = sigmoid(v)
        gate = mul(v, s)
        store(g, i, mul(out, gate))
        store(z, i, mul(out, fma(gate, sub(one, s), s)))


@jit
def _read_inputs(x, dt, skip, D, token, stride, m, column, values, steps, u, y):
    """Fetch x and dt of m tokens, ``u = dt x`` and ``y = D x``."""
    lanes = BYTES // x.itemsize
    _take(values, x, D, token, stride, m, column)
    _take(steps, dt, D, token, stride, m, column)
    for i in range(0, m * lanes, lanes):
        v = load(values, i)
        store(u, i, mul(v, load(steps, i)))
        store(y, i, mul(v, load(skip, column)))


@jit
def _forward_task(task, walks, x, dt, rates, B, C, skip, z, h, out):
    _, T, D = x.shape
    _, blocks, width, lanes = h.shape
    sequence, group = divmod(task, (blocks + BLOCKS - 1) // BLOCKS)
    row, start, step, n = walks[sequence]
    tile, N = CHUNK * lanes, B.shape[2]
    values, steps, u, y = blank(tile, x), blank(tile, x), blank(tile, x), blank(tile, x)
    b, c = blank(CHUNK * width, x), blank(CHUNK * width, x)
    for p in range(0, n, CHUNK):
        m, token = min(CHUNK, n - p), row * T + start + p * step
        _read_rows(b, B, N, token, step, m)
        _read_rows(c, C, N, token, step, m)
        for block in range(group * BLOCKS, min(blocks, (group + 1) * BLOCKS)):
            column = block * lanes
            _read_inputs(x, dt, skip, D, token, step, m, column, values, steps, u, y)
            _follow(h[sequence, block], rates[block], steps, u, b, c, m, y)
            if z.size > 0:
                _take(u, z, D, token, step, m, column)
                _gate(y, u, m)
            _give(out, D, token, step, m, column, y)


@jit
def _states_before(before, walk, x, dt, rates, B, C, skip, h, begin):
    """Write the states before each chunk, and leave those before the last one in h."""
    (row, start, step), (_, T, D) = walk, x.shape
    chunks, blocks, width, lanes = before.shape
    tile, N = CHUNK * lanes, B.shape[2]
    values, steps, u, y = blank(tile, x), blank(tile, x), blank(tile, x), blank(tile, x)
    b, c = blank(CHUNK * width, x), blank(CHUNK * width, x)
    for chunk in range(chunks):
        token = row * T + start + chunk * CHUNK * step
        _read_rows(b, B, N, token, step, CHUNK)
        for block in range(blocks):
            before[chunk, block] = h[block]
            column = (begin + block) * lanes
            _read_inputs(x, dt, skip, D, token, step, CHUNK, column, values, steps, u, y)
            _follow(h[block], rates[begin + block], steps, u, b, c, CHUNK, y)


@jit
def _finish(values, steps, gate, g, y, du, ddt, skip, dskip, m):
    """Turn du and ddt, of the state alone, into dx and ddt, gate into dz, and add to dskip."""
    lanes = BYTES // g.itemsize
    # The rates are in base 2, and ddt therefore in units of log 2.
    unit, factor = repeat(g.dtype.type(LOG2)), load(skip, 0)
    total_ = load(dskip, 0)
    for i in range(0, m * lanes, lanes):
        v, w, out = load(values, i), load(du, i), load(g, i)
        store(ddt, i, fma(w, v, mul(unit, load(ddt, i))))
        store(du, i, fma(out, factor, mul(w, load(steps, i))))
        store(gate, i, mul(load(gate, i), load(y, i)))
        total_ = fma(out, v, total_)
    store(dskip, 0, total_)


@jit
def _backward_task(task, walks, x, dt, rates, B, C, skip, z, h, dy, d, dx, ddt, dA, dB, dC, dD, dz):
    _, T, D = x.shape
    _, blocks, width, lanes = h.shape
    sequence, group = divmod(task, (blocks + BLOCKS - 1) // BLOCKS)
    row, start, step, n = walks[sequence]
    begin, end = group * BLOCKS, min(blocks, (group + 1) * BLOCKS)
    tile, N = CHUNK * lanes, B.shape[2]
    values, steps, u, y = blank(tile, x), blank(tile, x), blank(tile, x), blank(tile, x)
    g, gate, du, dsteps = blank(tile, x), blank(tile, x), blank(tile, x), blank(tile, x)
    b, c = blank(CHUNK * width, x), blank(CHUNK * width, x)
    scratch, sums = blank(4 * tile, x), blank(2 * CHUNK * width, x)
    chunks = (n + CHUNK - 1) // CHUNK
    before = np.empty((max(chunks - 1, 0), end - begin, width, lanes), x.dtype)
    states = h[sequence, begin:end]
    _states_before(before, (row, start, step), x, dt, rates, B, C, skip, states, begin)
    for chunk in range(chunks - 1, -1, -1):
        m, token = min(CHUNK, n - chunk * CHUNK), row * T + start + chunk * CHUNK * step
        _read_rows(b, B, N, token, step, m)
        _read_rows(c, C, N, token, step, m)
        for block in range(begin, end):
            column, state = block * lanes, states[block - begin]
            if chunk < chunks - 1:
                state[:] = before[chunk, block - begin]
            _read_inputs(x, dt, skip, D, token, step, m, column, values, steps, u, y)
            _take(g, dy, D, token, step, m, column)
            if z.size > 0:
                _take(gate, z, D, token, step, m, column)
                _gate_back(g, gate, m)
            du[:], dsteps[:] = 0, 0
            gradient, drates = d[sequence, block], dA[sequence, block]
            _follow_back(
                gradient, drates, state, rates[block], steps, u, g, b, c, m, y, du, dsteps, sums, scratch
            )
            dskip = dD[sequence, block]
            _finish(values, steps, gate, g, y, du, dsteps, skip[column:], dskip, m)
            _give(dx, D, token, step, m, column, du)
            _give(ddt, D, token, step, m, column, dsteps)
            if z.size > 0:
                _give(dz, D, token, step, m, column, gate)
        _give_sums(dB[group], dC[group], N, token, step, m, sums)


@kernel("selective_scan")
def _run_forward(first, last, *args):
    for task in range(first, last):
        _forward_task(task, *args)


@kernel("the gradient of selective_scan")
def _run_backward(first, last, *args):
    for task in range(first, last):
        _backward_task(task, *args)
