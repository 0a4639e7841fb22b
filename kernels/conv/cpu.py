"""Short convolution on a CPU: Numba, one task for some channels of a piece of a sequence.

The inputs of a piece are copied, with the W-1 before and after it, to memory that stays in the first cache;
all taps, the activation and every gradient then read them there.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..simd import BYTES, add, fma, jit, kernel, load, mul, repeat, store, sub, zeros
from ..token_groups import as_array, fresh, sequence_table
from ..vector_math import sigmoid

PIECE = 64
"""Tokens of a piece."""
BLOCK = 128
"""Channels of a task."""
PARTIALS = 32
"""Sums of the gradients of the weights that are made apart and then added: always as many, on any threads."""


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""
    size = _whole_vectors(x.shape[2], state.dtype)
    pieces = _pieces(x, weight, cu_seqlens, reverse)
    y, final = fresh((*x.shape[:2], size), state.dtype), state.new_empty(_rows(state, size))
    arrays = _inputs(x, weight, bias, state, size)
    silu, tasks = activation == "silu", len(pieces) * -(-size // BLOCK)
    _forward(tasks, pieces, *arrays, silu, y.numpy(), final.numpy())
    return _channels(y, x), final[..., : x.shape[2]].transpose(1, 2).contiguous()


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dweight, dbias, dinitial)``."""
    channels, width = weight.shape
    size = _whole_vectors(channels, state.dtype)
    pieces = _pieces(x, weight, cu_seqlens, reverse)
    dx, dinitial = fresh((*x.shape[:2], size), state.dtype), state.new_empty(_rows(state, size))
    partials = state.new_zeros((min(PARTIALS, len(pieces)), width + 1, size))
    arrays = _inputs(x, weight, bias, state, size)
    given = [_padded(t, size, state.dtype) for t in (dy, dstate.transpose(1, 2))]
    results = [t.numpy() for t in (dx, dinitial, partials)]
    _backward(len(partials) * -(-size // BLOCK), pieces, *given, *arrays, activation == "silu", *results)
    sums = partials.sum(0)[:, :channels]
    dbias = sums[width].to(weight.dtype if bias is None else bias.dtype)
    dinitial = dinitial[..., :channels].transpose(1, 2).contiguous()
    return _channels(dx, x), sums[:width].mT.contiguous().to(weight.dtype), dbias.clone(), dinitial


def _whole_vectors(channels: int, dtype: torch.dtype) -> int:
    lanes = BYTES // dtype.itemsize
    return -(-channels // lanes) * lanes


def _rows(state: Tensor, size: int) -> tuple[int, int, int]:
    return state.shape[0], state.shape[2], size


def _padded(x: Tensor, size: int, dtype: torch.dtype) -> Any:
    """Array of ``x (…, D)`` with zeros for the channels up to ``size``."""
    return as_array(x if x.shape[-1] == size else pad(x.to(dtype), (0, size - x.shape[-1])), dtype)


def _inputs(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, size: int) -> list[Any]:
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return [_padded(t, size, state.dtype) for t in (x, weight.mT, bias, state.transpose(1, 2))]


def _channels(y: Tensor, like: Tensor) -> Tensor:
    if y.shape == like.shape:
        return y.to(like.dtype)
    return y[..., : like.shape[2]].to(like.dtype, memory_format=torch.contiguous_format).contiguous()


def _pieces(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Any:
    """Table ``(N, 6)`` of sequence, first flat token, step, n, and position and length of each piece.

    An empty sequence has a piece too, which passes its state on.
    """
    walks = sequence_table(cu_seqlens, x.shape[0], x.shape[1], reverse)
    n, piece = walks[:, 3], max(PIECE, weight.shape[1])
    count = np.maximum(1, -(-n // piece))
    owner = np.repeat(np.arange(len(walks)), count)
    position = (np.arange(len(owner)) - (np.cumsum(count) - count)[owner]) * piece
    start = walks[:, 0] * x.shape[1] + walks[:, 1]
    step, n = walks[owner, 2], n[owner]
    columns = (owner, start[owner], step, n, position, np.minimum(piece, n - position))
    return np.ascontiguousarray(np.stack(columns, 1))


@jit
def _gather(block, x, state, sequence, start, step, n, first, count, channel, width):
    """Copy positions first … first+count−1 to rows of ``block``: of the state before 0, zeros from n on."""
    lanes = BYTES // x.itemsize
    size, before = x.shape[2], state.shape[1]
    for r in range(count):
        p = first + r
        if p >= n:
            for c in range(0, width, lanes):
                store(block, r * BLOCK + c, zeros(x))
        elif p >= 0:
            at = (start + p * step) * size + channel
            for c in range(0, width, lanes):
                store(block, r * BLOCK + c, load(x, at + c))
        else:
            at = (sequence * before + before + p) * size + channel
            for c in range(0, width, lanes):
                store(block, r * BLOCK + c, load(state, at + c))


@jit
def _tap_sum(start, rows, at, weight, channel, width, step):
    """Add to ``start`` the rows of ``rows`` from ``at`` on, ``step`` apart, under the taps."""
    size = weight.shape[1]
    if width == 4:
        s = fma(load(rows, at), load(weight, channel), start)
        t = mul(load(rows, at + step), load(weight, size + channel))
        s = fma(load(rows, at + 2 * step), load(weight, 2 * size + channel), s)
        t = fma(load(rows, at + 3 * step), load(weight, 3 * size + channel), t)
        return add(s, t)
    for w in range(width):
        start = fma(load(rows, at + w * step), load(weight, w * size + channel), start)
    return start


@jit
def _forward_task(task, block, pieces, x, weight, bias, state, silu, y, final):
    size, taps, lanes = x.shape[2], weight.shape[0], BYTES // x.itemsize
    blocks = (size + BLOCK - 1) // BLOCK
    sequence, start, step, n, position, count = pieces[task // blocks]
    channel = task % blocks * BLOCK
    width = min(BLOCK, size - channel)
    before = position - taps + 1
    _gather(block, x, state, sequence, start, step, n, before, count + taps - 1, channel, width)
    for r in range(count):
        at = (start + (position + r) * step) * size + channel
        for c in range(0, width, lanes):
            o = _tap_sum(load(bias, channel + c), block, r * BLOCK + c, weight, channel + c, taps, BLOCK)
            store(y, at + c, mul(o, sigmoid(o)) if silu else o)
    if position + count == n:
        at = sequence * (taps - 1) * size + channel
        for r in range(taps - 1):
            for c in range(0, width, lanes):
                store(final, at + r * size + c, load(block, (count + r) * BLOCK + c))


@jit
def _add_state(g, dstate, sequence, k, channel):
    """Add what reaches an input as entry k of the final state, where k is one."""
    _, before, size = dstate.shape
    if k < 0 or k >= before:
        return g
    return add(g, load(dstate, (sequence * before + k) * size + channel))


@jit
def _backward_piece(
    piece, partial, channel, inputs, grads, dy, dstate, x, weight, bias, state, silu, dx, dinitial, partials
):
    size, taps, lanes = x.shape[2], weight.shape[0], BYTES // x.itemsize
    width = min(BLOCK, size - channel)
    sequence, start, step, n, position, count = piece
    before = taps - 1
    one = repeat(x.dtype.type(1))
    _gather(inputs, x, state, sequence, start, step, n, position - before, count + 2 * before, channel, width)
    # Rows of the gradient before the taps: `before` of zeros, the piece's own, and as many after it.
    for r in range(before):
        for c in range(0, width, lanes):
            store(grads, r * BLOCK + c, zeros(x))
    own = before * BLOCK
    _gather(grads[own:], dy, state, sequence, start, step, n, position, count + before, channel, width)
    if silu:
        for r in range(min(count + before, n - position)):
            for c in range(0, width, lanes):
                at = r * BLOCK + c
                o = _tap_sum(load(bias, channel + c), inputs, at, weight, channel + c, taps, BLOCK)
                gate = sigmoid(o)
                slope = mul(gate, fma(o, sub(one, gate), one))
                store(grads, own + at, mul(load(grads, own + at), slope))
    for r in range(count):
        p = position + r
        at = (start + p * step) * size + channel
        for c in range(0, width, lanes):
            last = own + (r + before) * BLOCK + c
            g = _tap_sum(zeros(x), grads, last, weight, channel + c, taps, -BLOCK)
            store(dx, at + c, _add_state(g, dstate, sequence, p - n + before, channel + c))
    if position == 0:
        for k in range(before):
            at = (sequence * before + k) * size + channel
            for c in range(0, width, lanes):
                g = _tap_sum(zeros(x), grads, own + k * BLOCK + c, weight, channel + c, taps, -BLOCK)
                store(dinitial, at + c, _add_state(g, dstate, sequence, k - n, channel + c))
    for c in range(0, width, lanes):
        for w in range(taps):
            at = (partial * (taps + 1) + w) * size + channel + c
            s = load(partials, at)
            for r in range(count):
                s = fma(load(grads, own + r * BLOCK + c), load(inputs, (r + w) * BLOCK + c), s)
            store(partials, at, s)
        at = (partial * (taps + 1) + taps) * size + channel + c
        s = load(partials, at)
        for r in range(count):
            s = add(s, load(grads, own + r * BLOCK + c))
        store(partials, at, s)


@kernel("short_convolution")
def _forward(first, last, pieces, x, weight, *arrays):
    block = np.empty((max(PIECE, weight.shape[0]) + weight.shape[0]) * BLOCK, x.dtype)
    for task in range(first, last):
        _forward_task(task, block, pieces, x, weight, *arrays)


@kernel("the gradient of short_convolution")
def _backward(first, last, pieces, dy, dstate, x, weight, bias, state, silu, dx, dinitial, partials):
    rows = max(PIECE, weight.shape[0]) + 2 * weight.shape[0]
    inputs, grads = np.empty(rows * BLOCK, x.dtype), np.empty(rows * BLOCK, x.dtype)
    blocks, count = (x.shape[2] + BLOCK - 1) // BLOCK, len(partials)
    for task in range(first, last):
        partial, channel = task // blocks, task % blocks * BLOCK
        for i in range(partial * len(pieces) // count, (partial + 1) * len(pieces) // count):
            _backward_piece(
                pieces[i], partial, channel, inputs, grads, dy, dstate, x, weight, bias, state, silu,
                dx, dinitial, partials,
            )  # fmt: skip
