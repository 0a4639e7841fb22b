"""The vector scans on a CPU: Numba, one task for a block of channels, or a head, of every sequence.

The gradients are the recurrences of `softmax_blocks` and `chunked`, one token at a time: nothing is divided
by a decay, and every exponent is ≤ 0.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..simd import jit, kernel
from ..token_groups import as_array, fresh, sequence_table

BLOCK = 64


def elementwise_forward(
    a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(h, final_state)``."""
    walks = sequence_table(cu_seqlens, b.shape[0], b.shape[1], reverse)
    h, final = fresh(b.shape, state.dtype), _blank(state)
    arrays = [_array(x, state) for x in (a, b, state, h, final)]
    _elementwise_forward(_tasks(walks, b), walks, *arrays)
    return h.to(b.dtype), final


def elementwise_backward(
    dh: Tensor,
    dstate: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(da, db, dinitial)``."""
    walks = sequence_table(cu_seqlens, b.shape[0], b.shape[1], reverse)
    da, db = (fresh(b.shape, state.dtype) for _ in range(2))
    dinitial = _blank(state)
    arrays = [_array(x, state) for x in (dh, dstate, a, b, state, da, db, dinitial)]
    _elementwise_backward(_tasks(walks, b), walks, *arrays)
    return da.to(a.dtype), db.to(b.dtype), dinitial


def logsumexp_forward(
    s: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    walks = sequence_table(cu_seqlens, v.shape[0], v.shape[1], reverse)
    o, final = fresh(v.shape, state.dtype), _blank(state)
    arrays = [_array(x, state) for x in (s, v, state, o, final)]
    _logsumexp_forward(len(walks) * v.shape[2], walks, *arrays)
    return o.to(v.dtype), final


def logsumexp_backward(
    do: Tensor,
    dstate: Tensor,
    s: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(ds, dv, dinitial)``."""
    walks = sequence_table(cu_seqlens, v.shape[0], v.shape[1], reverse)
    ds, dv = fresh(s.shape, state.dtype), fresh(v.shape, state.dtype)
    dinitial = _blank(state)
    arrays = [_array(x, state) for x in (do, dstate, s, v, state, ds, dv, dinitial)]
    _logsumexp_backward(len(walks) * v.shape[2], walks, *arrays)
    return ds.to(s.dtype), dv.to(v.dtype), dinitial


def logcumsumexp_forward(
    s: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(z, final_state)``."""
    walks = sequence_table(cu_seqlens, s.shape[0], s.shape[1], reverse)
    level, total, final = _levels(walks, s, state)
    return (level + total.log()).to(s.dtype), final


def logcumsumexp_backward(
    dz: Tensor,
    dstate: Tensor,
    s: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(ds, dinitial)``."""
    walks = sequence_table(cu_seqlens, s.shape[0], s.shape[1], reverse)
    level, total, _ = _levels(walks, s, state)
    ds, dinitial = fresh(s.shape, state.dtype), _blank(state)
    arrays = [_array(x, state) for x in (dz, dstate, s, state, level, total, ds, dinitial)]
    _logcumsumexp_backward(_tasks(walks, s), walks, *arrays)
    return ds.to(s.dtype), dinitial


def max_plus_forward(
    g: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(m, final_state)``."""
    walks = sequence_table(cu_seqlens, i.shape[0], i.shape[1], reverse)
    m, final = fresh(i.shape, state.dtype), _blank(state)
    arrays = [_array(x, state) for x in (g, i, state, m, final)]
    _max_plus_forward(_tasks(walks, i), walks, *arrays)
    return m.to(i.dtype), final


def _levels(walks: Any, s: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the running maximum, the sum below it, and the final state."""
    level, total = (fresh(s.shape, state.dtype) for _ in range(2))
    final = _blank(state)
    arrays = [_array(x, state) for x in (s, state, level, total, final)]
    _logcumsumexp_forward(_tasks(walks, s), walks, *arrays)
    return level, total, final


def _array(x: Tensor, state: Tensor) -> Any:
    return as_array(x.resolve_conj(), state.dtype)


def _blank(state: Tensor) -> Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


def _tasks(walks: Any, x: Tensor) -> int:
    return len(walks) * -(-x.shape[2] // BLOCK)


@jit
def _block(task, size):
    """Return the sequence of a task, and where its channels begin and end."""
    blocks = (size + BLOCK - 1) // BLOCK
    begin = task % blocks * BLOCK
    return task // blocks, begin, min(begin + BLOCK, size)


@jit
def _elementwise_task(task, walks, a, b, state, out, final):
    i, begin, end = _block(task, b.shape[2])
    row, start, step, n = walks[i]
    width = end - begin
    h = state[i, begin:end].copy()
    for p in range(n):
        t = start + p * step
        x, y, z = a[row, t, begin:end], b[row, t, begin:end], out[row, t, begin:end]
        for j in range(width):
            h[j] = x[j] * h[j] + y[j]
            z[j] = h[j]
    final[i, begin:end] = h


@jit
def _elementwise_backward_task(task, walks, dh, dstate, a, b, state, da, db, dinitial):
    i, begin, end = _block(task, b.shape[2])
    row, start, step, n = walks[i]
    width = end - begin
    h = state[i, begin:end].copy()
    # da first holds what h was before each token.
    for p in range(n):
        t = start + p * step
        x, y, z = a[row, t, begin:end], b[row, t, begin:end], da[row, t, begin:end]
        for j in range(width):
            z[j] = h[j]
            h[j] = x[j] * h[j] + y[j]
    g = dstate[i, begin:end].copy()
    for p in range(n - 1, -1, -1):
        t = start + p * step
        w, x, y, z = dh[row, t, begin:end], a[row, t, begin:end], db[row, t, begin:end], da[row, t, begin:end]
        for j in range(width):
            g[j] += w[j]
            y[j] = g[j]
            z[j] = g[j] * np.conj(z[j])
            g[j] *= np.conj(x[j])
    dinitial[i, begin:end] = g


@jit
def _softmax_token(s, v, m, u, w, one):
    """Take one token into ``[u, w]`` below the level m, and return the new m and u."""
    if s == -np.inf:
        return m, u
    if s > m:
        keep, gate = math.exp(m - s), one
        m = s
    else:
        keep, gate = one, math.exp(s - m)
    for j in range(w.shape[0]):
        w[j] = keep * w[j] + gate * v[j]
    return m, keep * u + gate


@jit
def _logsumexp_task(task, walks, s, v, state, out, final):
    H, V = v.shape[2:]
    i, head = task // H, task % H
    row, start, step, n = walks[i]
    m, u = state[i, head, 0], state[i, head, 1]
    w, one = state[i, head, 2:].copy(), v.dtype.type(1)
    for p in range(n):
        t = start + p * step
        m, u = _softmax_token(s[row, t, head], v[row, t, head], m, u, w, one)
        o = out[row, t, head]
        scale = one / u if u != 0 else u
        for j in range(V):
            o[j] = w[j] * scale
    final[i, head, 0], final[i, head, 1] = m, u
    final[i, head, 2:] = w


@jit
def _logsumexp_backward_task(task, walks, do, dstate, s, v, state, ds, dv, dinitial):
    H, V = v.shape[2:]
    i, head = task // H, task % H
    row, start, step, n = walks[i]
    m, u = state[i, head, 0], state[i, head, 1]
    w, one = state[i, head, 2:].copy(), v.dtype.type(1)
    level, total, inner = np.empty(n, s.dtype), np.empty(n, s.dtype), np.empty(n, s.dtype)
    zero = s.dtype.type(0)
    for p in range(n):
        t = start + p * step
        m, u = _softmax_token(s[row, t, head], v[row, t, head], m, u, w, one)
        g = do[row, t, head]
        dot = zero
        for j in range(V):
            dot += g[j] * w[j]
        scale = one / u if u != 0 else u
        level[p], total[p], inner[p] = m, scale, dot * scale
    # The gradient of [u, w], measured below the level of the token at hand.
    du, dw = dstate[i, head, 1], dstate[i, head, 2:].copy()
    for p in range(n - 1, -1, -1):
        t = start + p * step
        x, y, g = v[row, t, head], dv[row, t, head], do[row, t, head]
        du -= inner[p] * total[p]
        gate = math.exp(s[row, t, head] - level[p]) if level[p] != -np.inf else zero
        before = level[p - 1] if p > 0 else state[i, head, 0]
        keep = math.exp(before - level[p]) if before != -np.inf else zero
        dot = du
        for j in range(V):
            dw[j] += g[j] * total[p]
            dot += x[j] * dw[j]
            y[j] = gate * dw[j]
            dw[j] *= keep
        ds[row, t, head] = gate * dot
        du *= keep
    dm = state[i, head, 1] * du
    for j in range(V):
        dm += state[i, head, 2 + j] * dw[j]
    dinitial[i, head, 0], dinitial[i, head, 1] = dm, du
    dinitial[i, head, 2:] = dw


@jit
def _logcumsumexp_task(task, walks, s, state, level, total, final):
    i, begin, end = _block(task, s.shape[2])
    row, start, step, n = walks[i]
    m = state[i, begin:end].copy()
    u = np.where(m == -np.inf, 0.0, 1.0).astype(s.dtype)
    one = s.dtype.type(1)
    for p in range(n):
        t = start + p * step
        x, y, z = s[row, t, begin:end], level[row, t, begin:end], total[row, t, begin:end]
        for j in range(end - begin):
            if x[j] > m[j]:
                u[j] = u[j] * math.exp(m[j] - x[j]) + one
                m[j] = x[j]
            elif x[j] != -np.inf:
                u[j] += math.exp(x[j] - m[j])
            y[j] = m[j]
            z[j] = u[j]
    for j in range(end - begin):
        final[i, begin + j] = m[j] + math.log(u[j]) if u[j] != 0 else m[j]


@jit
def _logcumsumexp_backward_task(task, walks, dz, dstate, s, state, level, total, ds, dinitial):
    i, begin, end = _block(task, s.shape[2])
    row, start, step, n = walks[i]
    zero, one = s.dtype.type(0), s.dtype.type(1)
    for j in range(begin, end):
        # The gradient of the sum, measured below the level of the token at hand.
        t = start + (n - 1) * step
        last = level[row, t, j] if n > 0 else state[i, j]
        # Not exp(last − final state): far from 0 the float32 of their difference has lost its digits.
        share = one / total[row, t, j] if n > 0 else one
        g = dstate[i, j] * share if last != -np.inf else zero
        for p in range(n - 1, -1, -1):
            t = start + p * step
            m = level[row, t, j]
            if m == -np.inf:
                ds[row, t, j] = 0
                continue
            g += dz[row, t, j] / total[row, t, j]
            ds[row, t, j] = g * math.exp(s[row, t, j] - m)
            before = level[row, t - step, j] if p > 0 else state[i, j]
            g *= math.exp(before - m)
        dinitial[i, j] = g


@jit
def _max_plus_task(task, walks, g, x, state, out, final):
    i, begin, end = _block(task, x.shape[2])
    row, start, step, n = walks[i]
    m = state[i, begin:end].copy()
    for p in range(n):
        t = start + p * step
        for j in range(end - begin):
            m[j] = max(m[j] + g[row, t, begin + j], x[row, t, begin + j])
            out[row, t, begin + j] = m[j]
    final[i, begin:end] = m


@kernel("elementwise_scan")
def _elementwise_forward(first, last, *args):
    for task in range(first, last):
        _elementwise_task(task, *args)


@kernel("the gradient of elementwise_scan")
def _elementwise_backward(first, last, *args):
    for task in range(first, last):
        _elementwise_backward_task(task, *args)


@kernel("logsumexp_scan")
def _logsumexp_forward(first, last, *args):
    for task in range(first, last):
        _logsumexp_task(task, *args)


@kernel("the gradient of logsumexp_scan")
def _logsumexp_backward(first, last, *args):
    for task in range(first, last):
        _logsumexp_backward_task(task, *args)


@kernel("logcumsumexp")
def _logcumsumexp_forward(first, last, *args):
    for task in range(first, last):
        _logcumsumexp_task(task, *args)


@kernel("the gradient of logcumsumexp")
def _logcumsumexp_backward(first, last, *args):
    for task in range(first, last):
        _logcumsumexp_backward_task(task, *args)


@kernel("max_plus_scan")
def _max_plus_forward(first, last, *args):
    for task in range(first, last):
        _max_plus_task(task, *args)
