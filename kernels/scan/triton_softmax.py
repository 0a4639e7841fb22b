"""Triton kernels of `logsumexp_scan`: a program walks along a sequence, or a segment of one, for one head.

The level ``m_t = max s_i`` comes first, a scan of scores only; with it ``u_t = Σ exp(s_i − m_t)`` and
``w_t = Σ exp(s_i − m_t) v_i`` are affine scans that decay by ``exp(m_{t−1} − m_t)``, two exponentials a token
and none of them above 1. The gradient scans ``q_t = [−do_t·o_t, do_t] / u_t`` the other way with the same
decays.

An element is ``[m, u, w]``, the state; with ``BACK`` the decay of a segment and the gradient of [u, w].

Letters: C tokens a tile, H heads, V values, BV ≥ V, N segments.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

import triton
import triton.language as tl

from .triton_channels import EMPTY, affine, finite, larger


@triton.jit
def _affine_scan(x, y, before):
    """Scan ``h ← x h + y`` from ``before`` along the rows of ``x`` and ``y``."""
    row = tl.arange(0, x.shape[0])
    first = row == 0 if len(x.shape) == 1 else (row == 0)[:, None]
    y = tl.where(first, x * before + y, y)
    return tl.associative_scan((x, y), 0, affine)[1]


@triton.jit
def _last(x):
    """Take the last row."""
    row = tl.arange(0, x.shape[0])
    last = row == x.shape[0] - 1 if len(x.shape) == 1 else (row == x.shape[0] - 1)[:, None]
    return tl.sum(tl.where(last, x, 0.0), 0)


@triton.jit
def _load_element(x, at, column, inside):
    return tl.load(x + at), tl.load(x + at + 1), tl.load(x + at + 2 + column, mask=inside, other=0.0)


@triton.jit
def _store_element(x, at, column, inside, m, u, w):
    tl.store(x + at, m)
    tl.store(x + at + 1, u)
    tl.store(x + at + 2 + column, w, mask=inside)


@triton.jit
def _finish(final, at, column, inside, m, u, w, level, origin, start, n, head, H, STEP, BACK: tl.constexpr):
    """Store the final state, or with BACK the gradient of the initial one."""
    if BACK:
        m0, u0, w0 = _load_element(origin, at, column, inside)
        token = start.to(tl.int64) + (n - 1).to(tl.int64) * STEP
        after = tl.load(level + token * H + head, mask=n > 0, other=0.0)
        # Measured below the initial level.
        kept = tl.where(n > 0, tl.where(m0 == EMPTY, 0.0, tl.exp(m0 - finite(after))), 1.0)
        u, w = u * kept, w * kept
        m = u0 * u + tl.sum(tl.where(inside, w0 * w, 0.0), 0)
    _store_element(final, at, column, inside, m, u, w)


@triton.jit(do_not_specialize=("length",))
def walk_heads(
    s,  # (tokens, H)
    v,  # (tokens, H, V)
    state,  # (sequences, H, V + 2), or the elements (N, H, V + 2) before each segment
    origin,  # the initial state, with BACK
    o,  # (tokens, H, V), or None
    do,  # with BACK, and to prepare it
    level,  # (tokens, H): m_t, …
    share,  # … 1 / u_t …
    inner,  # … and do_t · o_t, which a first pass stores for BACK
    ds,
    dv,
    final,
    totals,  # (N, H, V + 2), with TOTALS
    table,
    length,
    H,
    V: tl.constexpr,
    BACK: tl.constexpr,
    SPLIT: tl.constexpr,
    TOTALS: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
):
    """Scan a sequence or a segment."""
    index, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BV)
    inside = column < V
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
    at = (index.to(tl.int64) * H + head) * (V + 2)
    if TOTALS:
        u, w = 0.0, tl.zeros((BV,), tl.float32)
        m = 1.0 if BACK else EMPTY
    else:
        m, u, w = _load_element(state, at, column, inside)
    t = tl.arange(0, C)
    for p in range(begin, end, C):
        position = p + t
        valid = position < end
        row = (start.to(tl.int64) + position.to(tl.int64) * STEP) * H + head
        cell = row[:, None] * V + column[None, :]
        mask = valid[:, None] & inside[None, :]
        score = tl.load(s + row, mask=valid, other=EMPTY).to(tl.float32)
        value = tl.load(v + cell, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            m_t = tl.load(level + row, mask=valid, other=EMPTY)
            above = tl.load(level + row - STEP * H, mask=valid & (position > 0), other=0.0)
            keep = tl.where(position == 0, 1.0, tl.exp(m_t - finite(above)))
            keep = tl.where(valid, tl.where(m_t == EMPTY, 0.0, keep), 1.0)
            part = tl.load(share + row, mask=valid, other=0.0)
            g = tl.load(do + cell, mask=mask, other=0.0).to(tl.float32) * part[:, None]
            g_u = -tl.load(inner + row, mask=valid, other=0.0) * part
            du = _affine_scan(keep, g_u, u)
            dw = _affine_scan(tl.broadcast_to(keep[:, None], (C, BV)), g, w[None, :])
            if TOTALS:
                m = m * _last(tl.associative_scan((keep, g_u), 0, affine)[0])
            else:
                gate = tl.where(m_t == EMPTY, 0.0, tl.exp(score - finite(m_t)))
                tl.store(ds + row, gate * (du + tl.sum(value * dw, 1)), mask=valid)
                tl.store(dv + cell, gate[:, None] * dw, mask=mask)
            u, w = _last(du), _last(dw)
        else:
            m_t = larger(tl.associative_scan(score, 0, larger), m)
            # The level one token earlier, also just after the end, by a scan of scores one token earlier.
            known = (position <= end) & (t > 0)
            earlier = tl.load(s + row - STEP * H, mask=known, other=EMPTY).to(tl.float32)
            m_before = larger(tl.associative_scan(earlier, 0, larger), m)
            base = finite(m_t)
            keep, gate = tl.exp(m_before - base), tl.exp(score - base)
            u_t = _affine_scan(keep, gate, u)
            keep = tl.broadcast_to(keep[:, None], (C, BV))
            w_t = _affine_scan(keep, gate[:, None] * value, w[None, :])
            if not TOTALS:
                part = tl.where(u_t == 0, 0.0, 1.0 / tl.where(u_t == 0, 1.0, u_t))
                if o is not None:
                    tl.store(o + cell, w_t * part[:, None], mask=mask)
                else:
                    g = tl.load(do + cell, mask=mask, other=0.0).to(tl.float32)
                    tl.store(level + row, m_t, mask=valid)
                    tl.store(share + row, part, mask=valid)
                    tl.store(inner + row, tl.sum(g * w_t, 1) * part, mask=valid)
            m, u, w = _last(m_t), _last(u_t), _last(w_t)
    if TOTALS:
        _store_element(totals, at, column, inside, m, u, w)
    if not SPLIT:
        _finish(final, at, column, inside, m, u, w, level, origin, start, n, head, H, STEP, BACK)


@triton.jit
def join_heads(
    parts,  # (N, H, V + 2): what each segment does; on return, the element before it
    level,
    state,
    origin,
    final,
    table,
    H,
    V: tl.constexpr,
    BACK: tl.constexpr,
    STEP: tl.constexpr,
    BV: tl.constexpr,
):
    """Find the state before every segment, and the final state."""
    index, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BV)
    inside = column < V
    start, n = tl.load(table + 4 * index), tl.load(table + 4 * index + 1)
    first, count = tl.load(table + 4 * index + 2), tl.load(table + 4 * index + 3)
    at = (index.to(tl.int64) * H + head) * (V + 2)
    m, u, w = _load_element(state, at, column, inside)
    for i in range(count):
        part = ((first + i).to(tl.int64) * H + head) * (V + 2)
        pm, pu, pw = _load_element(parts, part, column, inside)
        _store_element(parts, part, column, inside, m, u, w)
        if BACK:
            u, w = pm * u + pu, pm * w + pw
        else:
            top = larger(m, pm)
            base = finite(top)
            keep, gate = tl.exp(m - base), tl.exp(pm - base)
            m, u, w = top, keep * u + gate * pu, keep * w + gate * pw
    _finish(final, at, column, inside, m, u, w, level, origin, start, n, head, H, STEP, BACK)
