"""Delta rule on a CPU: Numba, one task for each head of each sequence, its state in the first-level cache.

A group of four tokens reads the state once, solves its own 4×4 lower triangle by forward substitution, and
updates the state once. With S'_t = Diag(a_t) S_{t-1}, e_t = v_t − S'_tᵀ k_t and u_t = β_t e_t, the state is
S_t = S'_t + k_t u_tᵀ.

The backward pass keeps e of every token and no state. With D_t the gradient of S_t,

    w_t = dv_t = β_t D_tᵀ k_t,  dβ_t = (D_tᵀ k_t) · e_t,  D_{t-1} = Diag(a_t) (D_t − k_t w_tᵀ)   (backwards)
    dq_t = S_t do_t,  z_t = S'_t w_t                                                             (forwards)
    dk_t = D_t u_t − z_t                                                                         (backwards)
    dg_t = dg_{t+1} + q_t ∘ dq'_t − k_t ∘ z_t − k_t ∘ dk'_t,

where dq' and dk' leave out what token t gives itself, as in the linear recurrence.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import torch
from torch import Tensor

from ..linear.cpu import fold_decay
from ..matrix_state import fold_decay_grad, new_state, state_dtype
from ..simd import BYTES, add, fma, fnma, jit, kernel, load, mul, splat, store, sub, total, zeros
from ..token_groups import (
    GROUP,
    as_array,
    blank,
    copy_block,
    decay_factors,
    fold_decay_rows,
    fold_decay_rows_twice,
    fresh,
    gather,
    gather_decay,
    load_state,
    overlap,
    padded,
    products,
    save_state,
    scatter,
    sequence_table,
    store_rows,
)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(o, final_state, error)``; error ``(B, T, H, V)`` is what a token did not yet predict."""
    dtype = state_dtype(v)
    sequences = sequence_table(cu_seqlens, q.shape[0], q.shape[1], reverse)
    o, error = fresh(v.shape, dtype), fresh(v.shape, dtype)
    final = new_state(v, len(sequences), q.shape[-1])
    initial = torch.zeros_like(final) if initial_state is None else initial_state
    _run_forward(
        len(sequences) * q.shape[2],
        as_array(q, dtype),
        as_array(k, dtype),
        as_array(v, dtype),
        as_array(beta[..., None], dtype),
        decay_factors(decay, q, dtype),
        scale,
        sequences,
        as_array(initial, dtype),
        o.numpy(),
        error.numpy(),
        final.numpy(),
    )
    return o.to(v.dtype), final, error


def backward(
    do: Tensor,
    dstate: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, beta, decay and initial_state."""
    dtype = state_dtype(v)
    sequences = sequence_table(cu_seqlens, q.shape[0], q.shape[1], reverse)
    dq, dk, dv, dbeta = (fresh(x.shape, dtype) for x in (q, k, v, beta[..., None]))
    dg = fresh(q.shape if decay is not None else (0, 0, 0, 0), dtype)
    dinitial = new_state(v, len(sequences), q.shape[-1])
    initial = torch.zeros_like(dinitial) if initial_state is None else initial_state
    _run_backward(
        len(sequences) * q.shape[2],
        as_array(do, dtype),
        as_array(dstate, dtype),
        as_array(error, dtype),
        as_array(q, dtype),
        as_array(k, dtype),
        as_array(beta[..., None], dtype),
        decay_factors(decay, q, dtype),
        scale,
        sequences,
        as_array(initial, dtype),
        dq.numpy(),
        dk.numpy(),
        dv.numpy(),
        dbeta.numpy(),
        dg.numpy(),
        dinitial.numpy(),
        decay is not None,
    )
    ddecay = None if decay is None else fold_decay_grad(dg, decay)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        dbeta[..., 0].to(beta.dtype, copy=True),
        ddecay,
        None if initial_state is None else dinitial.to(initial_state.dtype),
    )


@jit
def _gather_beta(b, beta, row, head, start, step, p, n):
    for m in range(GROUP):
        b[m] = beta[row, start + (p + m) * step, head, 0] if p + m < n else 0


@jit
def _forward_scan(query, key, value, beta, a, scale, walk, state, out, error, last):
    row, head, start, step, n = walk
    one = state.dtype.type(1)
    K, V = state.shape
    L, KP, VP = BYTES // state.itemsize, padded(K, state), padded(V, state)
    S = blank(K * VP, state)
    load_state(S, state, False)
    q, k, c, d = blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S)
    v, o, e = blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S)
    A, P, M, b = blank(KP, S), blank(10, S), blank(10, S), blank(GROUP, S)
    for p in range(0, n, GROUP):
        gather(q, KP, query, row, head, start, step, p, n, scale)
        gather(k, KP, key, row, head, start, step, p, n, one)
        gather(v, VP, value, row, head, start, step, p, n, one)
        gather_decay(d, KP, a, row, head, start, step, p, n, GROUP)
        _gather_beta(b, beta, row, head, start, step, p, n)
        fold_decay_rows_twice(P, M, q, k, c, d, A, KP)
        for j in range(0, VP, L):
            _forward_tile(S, j * K, K, q, k, c, A, KP, P, M, b, v, o, e, j, VP)
        scatter(out, row, head, start, step, p, n, o, VP)
        scatter(error, row, head, start, step, p, n, e, VP)
    save_state(last, S)


@jit
def _forward_tile(S, base, K, q, k, c, A, KP, P, M, b, v, o, e, j, VP):
    L = BYTES // S.itemsize
    o0 = o1 = o2 = o3 = r0 = r1 = r2 = r3 = zeros(S)
    for i in range(K):
        s = load(S, base + i * L)
        o0, o1 = fma(splat(q, i), s, o0), fma(splat(q, KP + i), s, o1)
        o2, o3 = fma(splat(q, 2 * KP + i), s, o2), fma(splat(q, 3 * KP + i), s, o3)
        r0, r1 = fma(splat(c, i), s, r0), fma(splat(c, KP + i), s, r1)
        r2, r3 = fma(splat(c, 2 * KP + i), s, r2), fma(splat(c, 3 * KP + i), s, r3)
    e0 = sub(load(v, j), r0)
    u0 = mul(splat(b, 0), e0)
    e1 = fnma(splat(M, 4), u0, sub(load(v, VP + j), r1))
    u1 = mul(splat(b, 1), e1)
    e2 = fnma(splat(M, 6), u1, fnma(splat(M, 5), u0, sub(load(v, 2 * VP + j), r2)))
    u2 = mul(splat(b, 2), e2)
    e3 = fnma(splat(M, 7), u0, sub(load(v, 3 * VP + j), r3))
    e3 = fnma(splat(M, 9), u2, fnma(splat(M, 8), u1, e3))
    u3 = mul(splat(b, 3), e3)
    o1 = fma(splat(P, 4), u0, o1)
    o2 = fma(splat(P, 5), u0, fma(splat(P, 6), u1, o2))
    o3 = fma(splat(P, 7), u0, fma(splat(P, 8), u1, fma(splat(P, 9), u2, o3)))
    o0, o1 = fma(splat(P, 0), u0, o0), fma(splat(P, 1), u1, o1)
    o2, o3 = fma(splat(P, 2), u2, o2), fma(splat(P, 3), u3, o3)
    store_rows(o, j, VP, o0, o1, o2, o3)
    store_rows(e, j, VP, e0, e1, e2, e3)
    for i in range(K):
        s = mul(splat(A, i), load(S, base + i * L))
        s = fma(splat(k, KP + i), u1, fma(splat(k, i), u0, s))
        s = fma(splat(k, 3 * KP + i), u3, fma(splat(k, 2 * KP + i), u2, s))
        store(S, base + i * L, s)


@jit
def _dv_scan(query, key, dout, error, beta, a, scale, walk, dlast, dvalue, dbeta, dfirst):
    """Walk backwards with D in rows K: w = dv of every token, and dβ."""
    row, head, start, step, n = walk
    one = dlast.dtype.type(1)
    K, V = dlast.shape
    L, KP, VP = BYTES // dlast.itemsize, padded(K, dlast), padded(V, dlast)
    S = blank(K * VP, dlast)
    load_state(S, dlast, False)
    q, k, c, d = blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S)
    x, y, w, e = blank(GROUP * KP, S), blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S)
    A, N, M, b, f = blank(KP, S), blank(10, S), blank(10, S), blank(GROUP, S), blank(GROUP * L, S)
    for p in range(0, n + 1, GROUP):
        gather(q, KP, query, row, head, start, step, p, n, scale)
        gather(k, KP, key, row, head, start, step, p, n, one)
        gather(y, VP, dout, row, head, start, step, p, n, one)
        gather(e, VP, error, row, head, start, step, p, n, one)
        gather_decay(d, KP, a, row, head, start, step, p - 1, n, GROUP)
        _gather_beta(b, beta, row, head, start, step, p, n)
        copy_block(c, k)
        copy_block(x, k)
        fold_decay_rows(N, c, q, d, A, KP)
        fold_decay_rows(M, x, k, d, A, KP)
        f[:] = 0
        for j in range(0, VP, L):
            _dv_tile(S, j * K, K, q, k, c, A, KP, N, M, b, y, w, e, f, j, VP)
        scatter(dvalue, row, head, start, step, p, n, w, VP)
        for m in range(min(GROUP, n - p)):
            dbeta[row, start + (p + m) * step, head, 0] = total(load(f, m * L))
    save_state(dfirst, S)


@jit
def _dv_tile(S, base, K, q, k, c, A, KP, N, M, b, y, w, e, f, j, VP):
    L = BYTES // S.itemsize
    x0 = x1 = x2 = x3 = zeros(S)
    for i in range(K):
        s = load(S, base + i * L)
        x0, x1 = fma(splat(c, i), s, x0), fma(splat(c, KP + i), s, x1)
        x2, x3 = fma(splat(c, 2 * KP + i), s, x2), fma(splat(c, 3 * KP + i), s, x3)
    y0, y1, y2, y3 = load(y, j), load(y, VP + j), load(y, 2 * VP + j), load(y, 3 * VP + j)
    x0 = fma(splat(N, 0), y0, x0)
    w0 = mul(splat(b, 0), x0)
    x1 = fma(splat(N, 1), y1, fma(splat(N, 4), y0, x1))
    x1 = fnma(splat(M, 4), w0, x1)
    w1 = mul(splat(b, 1), x1)
    x2 = fma(splat(N, 2), y2, fma(splat(N, 6), y1, fma(splat(N, 5), y0, x2)))
    x2 = fnma(splat(M, 6), w1, fnma(splat(M, 5), w0, x2))
    w2 = mul(splat(b, 2), x2)
    x3 = fma(splat(N, 3), y3, fma(splat(N, 9), y2, fma(splat(N, 8), y1, fma(splat(N, 7), y0, x3))))
    x3 = fnma(splat(M, 9), w2, fnma(splat(M, 8), w1, fnma(splat(M, 7), w0, x3)))
    w3 = mul(splat(b, 3), x3)
    store_rows(w, j, VP, w0, w1, w2, w3)
    store(f, 0, fma(x0, load(e, j), load(f, 0)))
    store(f, L, fma(x1, load(e, VP + j), load(f, L)))
    store(f, 2 * L, fma(x2, load(e, 2 * VP + j), load(f, 2 * L)))
    store(f, 3 * L, fma(x3, load(e, 3 * VP + j), load(f, 3 * L)))
    for i in range(K):
        s = mul(splat(A, i), load(S, base + i * L))
        s = fma(splat(q, KP + i), y1, fma(splat(q, i), y0, s))
        s = fma(splat(q, 3 * KP + i), y3, fma(splat(q, 2 * KP + i), y2, s))
        s = fnma(splat(k, KP + i), w1, fnma(splat(k, i), w0, s))
        s = fnma(splat(k, 3 * KP + i), w3, fnma(splat(k, 2 * KP + i), w2, s))
        store(S, base + i * L, s)


@jit
def _gather_update(u, width, error, b, beta, row, head, start, step, p, n):
    gather(u, width, error, row, head, start, step, p, n, error.dtype.type(1))
    _gather_beta(b, beta, row, head, start, step, p, n)
    for m in range(GROUP):
        for i in range(m * width, (m + 1) * width, BYTES // u.itemsize):
            store(u, i, mul(splat(b, m), load(u, i)))


@jit
def _dq_scan(query, key, dout, error, beta, a, scale, walk, S, V, dvalue, dquery, dkey, dg, need_dg):
    """Walk forwards with S in rows V: dq, −z into dkey, and what dg needs of both."""
    row, head, start, step, n = walk
    one = S.dtype.type(1)
    K = key.shape[3]
    L, KP, VP = BYTES // S.itemsize, padded(K, S), padded(V, S)
    q, k, o, z, g = (
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
    )
    y, w, u = blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S)
    d, P, Z, b = blank(GROUP * KP, S), blank(10, S), blank(10, S), blank(GROUP, S)
    for p in range(0, n, GROUP):
        gather(q, KP, query, row, head, start, step, p, n, one)
        gather(k, KP, key, row, head, start, step, p, n, one)
        gather(y, VP, dout, row, head, start, step, p, n, scale)
        gather(w, VP, dvalue, row, head, start, step, p, n, one)
        gather_decay(d, KP, a, row, head, start, step, p, n, GROUP)
        _gather_update(u, VP, error, b, beta, row, head, start, step, p, n)
        products(P, y, u, VP)
        products(Z, w, u, VP)
        for i in range(0, KP, L):
            _dq_tile(S, i * V, V, y, w, u, VP, P, Z, q, k, d, o, z, g, i, KP)
        scatter(dquery, row, head, start, step, p, n, o, KP)
        scatter(dkey, row, head, start, step, p, n, z, KP)
        if need_dg:
            scatter(dg, row, head, start, step, p, n, g, KP)


@jit
def _dq_tile(S, base, V, y, w, u, VP, P, Z, q, k, d, o, z, g, i, KP):
    k0, k1, k2, k3 = load(k, i), load(k, KP + i), load(k, 2 * KP + i), load(k, 3 * KP + i)
    a0, a1, a2, a3 = load(d, i), load(d, KP + i), load(d, 2 * KP + i), load(d, 3 * KP + i)
    L = BYTES // S.itemsize
    o0 = o1 = o2 = o3 = z0 = z1 = z2 = z3 = zeros(S)
    for j in range(V):
        s = load(S, base + j * L)
        o0, o1 = fma(splat(y, j), s, o0), fma(splat(y, VP + j), s, o1)
        o2, o3 = fma(splat(y, 2 * VP + j), s, o2), fma(splat(y, 3 * VP + j), s, o3)
        z0, z1 = fma(splat(w, j), s, z0), fma(splat(w, VP + j), s, z1)
        z2, z3 = fma(splat(w, 2 * VP + j), s, z2), fma(splat(w, 3 * VP + j), s, z3)
    k01, k12, k23 = mul(k0, a1), mul(k1, a2), mul(k2, a3)
    k02, k13 = mul(k01, a2), mul(k12, a3)
    k03 = mul(k02, a3)
    a01 = mul(a0, a1)
    a02 = mul(a01, a2)
    a03 = mul(a02, a3)
    o0, z0 = mul(a0, o0), mul(a0, z0)
    o1, z1 = fma(a01, o1, mul(splat(P, 4), k01)), fma(a01, z1, mul(splat(Z, 4), k01))
    o2 = fma(a02, o2, fma(splat(P, 5), k02, mul(splat(P, 6), k12)))
    z2 = fma(a02, z2, fma(splat(Z, 5), k02, mul(splat(Z, 6), k12)))
    o3 = fma(a03, o3, fma(splat(P, 7), k03, fma(splat(P, 8), k13, mul(splat(P, 9), k23))))
    z3 = fma(a03, z3, fma(splat(Z, 7), k03, fma(splat(Z, 8), k13, mul(splat(Z, 9), k23))))
    q0, q1, q2, q3 = load(q, i), load(q, KP + i), load(q, 2 * KP + i), load(q, 3 * KP + i)
    g0, g1 = fnma(k0, z0, mul(q0, o0)), fnma(k1, z1, mul(q1, o1))
    g2, g3 = fnma(k2, z2, mul(q2, o2)), fnma(k3, z3, mul(q3, o3))
    store_rows(g, i, KP, g0, g1, g2, g3)
    nothing = zeros(S)
    store_rows(z, i, KP, sub(nothing, z0), sub(nothing, z1), sub(nothing, z2), sub(nothing, z3))
    o0, o1 = fma(splat(P, 0), k0, o0), fma(splat(P, 1), k1, o1)
    o2, o3 = fma(splat(P, 2), k2, o2), fma(splat(P, 3), k3, o3)
    store_rows(o, i, KP, o0, o1, o2, o3)
    for j in range(V):
        s = mul(a03, load(S, base + j * L))
        s = fma(splat(u, VP + j), k13, fma(splat(u, j), k03, s))
        s = fma(splat(u, 3 * VP + j), k3, fma(splat(u, 2 * VP + j), k23, s))
        store(S, base + j * L, s)


@jit
def _dk_scan(query, key, dout, error, beta, a, scale, walk, S, V, dvalue, dkey, dg, carry, need_dg):
    """Walk backwards with D in rows V: add D_t u_t to dkey, and finish dg."""
    row, head, start, step, n = walk
    one = S.dtype.type(1)
    K = key.shape[3]
    L, KP, VP = BYTES // S.itemsize, padded(K, S), padded(V, S)
    q, k, o, g = blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S)
    y, w, u = blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S)
    d, P, Z, b = blank((GROUP + 1) * KP, S), blank(10, S), blank(10, S), blank(GROUP, S)
    side = blank(GROUP * KP, S)
    for p in range(0, n + 1, GROUP):
        gather(q, KP, query, row, head, start, step, p, n, scale)
        gather(k, KP, key, row, head, start, step, p, n, one)
        gather(o, KP, dkey, row, head, start, step, p, n, one)
        gather(y, VP, dout, row, head, start, step, p, n, one)
        gather(w, VP, dvalue, row, head, start, step, p, n, one)
        gather_decay(d, KP, a, row, head, start, step, p - 1, n, GROUP + 1)
        _gather_update(u, VP, error, b, beta, row, head, start, step, p, n)
        if need_dg:
            gather(g, KP, dg, row, head, start, step, p, n, one)
        copy_block(side, k)
        if p == 0:
            side[:KP] = 0  # the carry already leaves out what the last token gives the state
        products(P, u, y, VP)
        products(Z, u, w, VP)
        for i in range(0, KP, L):
            _dk_tile(S, i * V, V, y, w, u, VP, P, Z, q, k, side, d, o, g, carry, i, KP)
        scatter(dkey, row, head, start, step, p, n, o, KP)
        if need_dg:
            scatter(dg, row, head, start, step, p, n, g, KP)


@jit
def _dk_tile(S, base, V, y, w, u, VP, P, Z, q, k, side, d, o, g, carry, i, KP):
    q0, q1, q2, q3 = load(q, i), load(q, KP + i), load(q, 2 * KP + i), load(q, 3 * KP + i)
    k0, k1, k2, k3 = load(k, i), load(k, KP + i), load(k, 2 * KP + i), load(k, 3 * KP + i)
    a0, a1, a2, a3 = load(d, i), load(d, KP + i), load(d, 2 * KP + i), load(d, 3 * KP + i)
    L = BYTES // S.itemsize
    x0 = x1 = x2 = x3 = zeros(S)
    for j in range(V):
        s = load(S, base + j * L)
        x0, x1 = fma(splat(u, j), s, x0), fma(splat(u, VP + j), s, x1)
        x2, x3 = fma(splat(u, 2 * VP + j), s, x2), fma(splat(u, 3 * VP + j), s, x3)
    # What tokens 0 … t−1 of the group add to D before token t, decayed on the way.
    x0 = mul(a0, x0)
    x1 = mul(mul(a0, a1), x1)
    t0, s0 = mul(a1, q0), mul(a1, k0)
    x1 = fnma(splat(Z, 4), s0, fma(splat(P, 4), t0, x1))
    a01 = mul(a0, a1)
    x2 = mul(mul(a01, a2), x2)
    t0, s0, t1, s1 = mul(a2, t0), mul(a2, s0), mul(a2, q1), mul(a2, k1)
    x2 = fnma(splat(Z, 5), s0, fma(splat(P, 5), t0, x2))
    x2 = fnma(splat(Z, 6), s1, fma(splat(P, 6), t1, x2))
    a03 = mul(mul(a01, a2), a3)
    t0, s0, t1, s1 = mul(a3, t0), mul(a3, s0), mul(a3, t1), mul(a3, s1)
    t2, s2 = mul(a3, q2), mul(a3, k2)
    x3 = fnma(splat(Z, 7), s0, fma(splat(P, 7), t0, mul(a03, x3)))
    x3 = fnma(splat(Z, 8), s1, fma(splat(P, 8), t1, x3))
    x3 = fnma(splat(Z, 9), s2, fma(splat(P, 9), t2, x3))
    o0, o1 = add(load(o, i), fma(splat(P, 0), q0, x0)), add(load(o, KP + i), fma(splat(P, 1), q1, x1))
    o2 = add(load(o, 2 * KP + i), fma(splat(P, 2), q2, x2))
    o3 = add(load(o, 3 * KP + i), fma(splat(P, 3), q3, x3))
    store_rows(o, i, KP, o0, o1, o2, o3)
    fold_decay(g, side, x0, x1, x2, x3, d, carry, i, KP, 1)
    for j in range(V):
        s = mul(a03, load(S, base + j * L))
        s = fma(splat(y, VP + j), t1, fma(splat(y, j), t0, s))
        s = fma(splat(y, 3 * VP + j), q3, fma(splat(y, 2 * VP + j), t2, s))
        s = fnma(splat(w, VP + j), s1, fnma(splat(w, j), s0, s))
        s = fnma(splat(w, 3 * VP + j), k3, fnma(splat(w, 2 * VP + j), s2, s))
        store(S, base + j * L, s)


@jit
def _forward_task(task, q, k, v, beta, a, scale, sequences, initial, o, error, final):
    sequence, head = divmod(task, q.shape[2])
    row, start, step, n = sequences[sequence]
    walk = (row, head, start, step, n)
    state, last = initial[sequence, head], final[sequence, head]
    _forward_scan(q, k, v, beta, a, q.dtype.type(scale), walk, state, o, error, last)


@jit
def _backward_task(
    task,
    do,
    dstate,
    error,
    q,
    k,
    beta,
    a,
    scale,
    sequences,
    initial,
    dq,
    dk,
    dv,
    dbeta,
    dg,
    dinitial,
    need_dg,
):
    sequence, head = divmod(task, q.shape[2])
    row, start, step, n = sequences[sequence]
    back = (row, head, start + (n - 1) * step, -step, n)
    scale_ = q.dtype.type(scale)
    last = dstate[sequence, head]
    K, V = last.shape
    _dv_scan(q, k, do, error, beta, a, scale_, back, last, dv, dbeta, dinitial[sequence, head])
    S, carry = blank(padded(K, q) * V, q), blank(padded(K, q), q)
    load_state(S, initial[sequence, head], True)
    # dg of the last token starts from the state before it: beside what the token writes, little may be left.
    final = start + (n - 1) * step
    if n > 1:
        before = (row, head, start, step, n - 1)
        _dq_scan(q, k, do, error, beta, a, scale_, before, S, V, dv, dq, dk, dg, need_dg)
    if n > 0:
        overlap(carry, S, last, a, row, head, final)
        _dq_scan(q, k, do, error, beta, a, scale_, (row, head, final, step, 1), S, V, dv, dq, dk, dg, need_dg)
    load_state(S, last, True)
    _dk_scan(q, k, do, error, beta, a, scale_, back, S, V, dv, dk, dg, carry, need_dg)


@kernel("delta_rule")
def _run_forward(first, last, *args):
    for task in range(first, last):
        _forward_task(task, *args)


@kernel("the gradient of delta_rule")
def _run_backward(first, last, *args):
    for task in range(first, last):
        _backward_task(task, *args)
