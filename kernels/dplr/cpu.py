"""Generalised delta rule on a CPU: Numba, one task for each head of each sequence, its state in the
first-level cache.

With ``r_t = S_{t-1}ᵀ a_t`` every place in time has two writers and two readers under the same decays:

    S_t = Diag(e^{g_t}) S_{t-1} + b_t r_tᵀ + k_t v_tᵀ,   o_t = S_tᵀ q_t,   r_{t+1} = S_tᵀ a_{t+1}.

It is the linear recurrence with two terms, one of which feeds back. A group of four tokens reads the state
once, finds its own r by forward substitution, and updates the state once. With D_t the gradient of S_t and
w_t that of r_t,

    D_t = Diag(e^{g_{t+1}}) D_{t+1} + a_{t+1} w_{t+1}ᵀ + q_t do_tᵀ
    w_t = D_tᵀ b_t,  dv_t = D_tᵀ k_t                                                     (walking backwards)
    dq_t = S_t do_t,  da_{t+1} = S_t w_{t+1}                                             (walking forwards)
    db_t = D_t r_t,  dk_t = D_t v_t                                                      (walking backwards)
    dg_t = dg_{t+1} + q_t ∘ dq'_t + a_{t+1} ∘ da'_{t+1} − b_t ∘ db'_t − k_t ∘ dk'_t,

where the primed leave out what the readers and writers of one place give each other. Only r of every token is
kept.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import torch
from torch import Tensor

from ..linear.cpu import fold_products
from ..matrix_state import fold_decay_grad, new_state, state_dtype
from ..simd import BYTES, fma, jit, kernel, load, mul, splat, store, zeros
from ..token_groups import (
    GROUP,
    as_array,
    blank,
    decay_factors,
    decayed_products,
    fold_decay_rows,
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
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(o, final_state, retrieved)``; retrieved ``(B, T, H, V)`` is ``r_t = S_{t-1}ᵀ a_t``."""
    dtype = state_dtype(v)
    sequences = sequence_table(cu_seqlens, q.shape[0], q.shape[1], reverse)
    o, retrieved = fresh(v.shape, dtype), fresh(v.shape, dtype)
    final = new_state(v, len(sequences), q.shape[-1])
    initial = torch.zeros_like(final) if initial_state is None else initial_state
    _run_forward(
        len(sequences) * q.shape[2],
        *(as_array(x, dtype) for x in (q, k, v, a, b)),
        decay_factors(decay, q, dtype),
        scale,
        sequences,
        as_array(initial, dtype),
        o.numpy(),
        retrieved.numpy(),
        final.numpy(),
    )
    return o.to(v.dtype), final, retrieved


def backward(
    do: Tensor,
    dstate: Tensor,
    retrieved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, a, b, decay and initial_state."""
    dtype = state_dtype(v)
    sequences = sequence_table(cu_seqlens, q.shape[0], q.shape[1], reverse)
    inputs = (q, k, v, a, b)
    gradients = [fresh(x.shape, dtype) for x in inputs]
    dretrieved = fresh(retrieved.shape, dtype)
    dg = fresh(q.shape if decay is not None else (0, 0, 0, 0), dtype)
    dinitial = new_state(v, len(sequences), q.shape[-1])
    initial = torch.zeros_like(dinitial) if initial_state is None else initial_state
    _run_backward(
        len(sequences) * q.shape[2],
        *(as_array(x, dtype) for x in (do, dstate, retrieved, *inputs)),
        decay_factors(decay, q, dtype),
        scale,
        sequences,
        as_array(initial, dtype),
        *(x.numpy() for x in gradients),
        dretrieved.numpy(),
        dg.numpy(),
        dinitial.numpy(),
        decay is not None,
    )
    dq, dk, dv, da, db = (dx.to(x.dtype) for dx, x in zip(gradients, inputs))
    ddecay = None if decay is None else fold_decay_grad(dg, decay)
    return dq, dk, dv, da, db, ddecay, None if initial_state is None else dinitial.to(initial_state.dtype)


@jit
def _read(S, rows, x, out):
    """Write ``Σ x_i S_i`` over the rows of S to the first row of the block ``out``."""
    L = BYTES // S.itemsize
    for j in range(0, S.size // rows, L):
        y = zeros(S)
        for i in range(rows):
            y = fma(splat(x, i), load(S, j * rows + i * L), y)
        store(out, j, y)


@jit
def _scan_rows(
    query, ahead, other, key, value, a, query_factor, key_factor, shift, walk, S, K, carry, out, found
):
    """Run ``S = Diag(a) S + other foundᵀ + key valueᵀ, out = Sᵀ query, found = Sᵀ ahead`` with rows K.

    ``found`` of a position is written by ``other`` of the next; ``carry`` is what the first position writes.
    Without ``shift`` the position after p lends its ``ahead`` to p; with ``shift`` the decay and ``other`` of
    the position before act at p.
    """
    row, head, start, step, n = walk
    one = S.dtype.type(1)
    L, KP, VP = BYTES // S.itemsize, padded(K, S), carry.size
    q, x, b, k, d = (
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
        blank(GROUP * KP, S),
    )
    v, o, r, A = blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S), blank(KP, S)
    QB, QK, XB, XK = blank(10, S), blank(10, S), blank(10, S), blank(10, S)
    for p in range(0, n + shift, GROUP):
        gather(q, KP, query, row, head, start, step, p, n, query_factor)
        gather(x, KP, ahead, row, head, start, step, p + 1 - shift, n, one)
        gather(b, KP, other, row, head, start, step, p - shift, n, one)
        gather(k, KP, key, row, head, start, step, p, n, key_factor)
        gather(v, VP, value, row, head, start, step, p, n, one)
        gather_decay(d, KP, a, row, head, start, step, p - shift, n, GROUP)
        decayed_products(QK, q, k, d, KP)
        decayed_products(XB, x, b, d, KP)
        fold_decay_rows(QB, q, b, d, A, KP)
        fold_decay_rows(XK, x, k, d, A, KP)
        for j in range(0, VP, L):
            _rows_tile(S, j * K, K, q, x, b, k, A, KP, QB, QK, XB, XK, v, o, r, carry, j, VP)
        scatter(out, row, head, start, step, p, n, o, VP)
        scatter(found, row, head, start, step, p + 1 - shift, n, r, VP)


@jit
def _rows_tile(S, base, K, q, x, b, k, A, KP, QB, QK, XB, XK, v, o, r, carry, j, VP):
    L = BYTES // S.itemsize
    o0 = o1 = o2 = o3 = r0 = r1 = r2 = r3 = zeros(S)
    for i in range(K):
        s = load(S, base + i * L)
        o0, o1 = fma(splat(q, i), s, o0), fma(splat(q, KP + i), s, o1)
        o2, o3 = fma(splat(q, 2 * KP + i), s, o2), fma(splat(q, 3 * KP + i), s, o3)
        r0, r1 = fma(splat(x, i), s, r0), fma(splat(x, KP + i), s, r1)
        r2, r3 = fma(splat(x, 2 * KP + i), s, r2), fma(splat(x, 3 * KP + i), s, r3)
    v0, v1, v2, v3 = load(v, j), load(v, VP + j), load(v, 2 * VP + j), load(v, 3 * VP + j)
    r0 = fma(splat(XK, 0), v0, r0)
    r1 = fma(splat(XK, 4), v0, fma(splat(XK, 1), v1, r1))
    r2 = fma(splat(XK, 5), v0, fma(splat(XK, 6), v1, fma(splat(XK, 2), v2, r2)))
    r3 = fma(splat(XK, 7), v0, fma(splat(XK, 8), v1, fma(splat(XK, 9), v2, fma(splat(XK, 3), v3, r3))))
    # What position m writes is what was found at m−1.
    u0 = load(carry, j)
    u1 = fma(splat(XB, 0), u0, r0)
    u2 = fma(splat(XB, 1), u1, fma(splat(XB, 4), u0, r1))
    u3 = fma(splat(XB, 2), u2, fma(splat(XB, 6), u1, fma(splat(XB, 5), u0, r2)))
    r3 = fma(splat(XB, 9), u2, fma(splat(XB, 8), u1, fma(splat(XB, 7), u0, r3)))
    r3 = fma(splat(XB, 3), u3, r3)
    store_rows(r, j, VP, u1, u2, u3, r3)
    store(carry, j, r3)
    o0 = fma(splat(QB, 0), u0, fma(splat(QK, 0), v0, o0))
    o1 = fma(splat(QB, 4), u0, fma(splat(QK, 4), v0, o1))
    o1 = fma(splat(QB, 1), u1, fma(splat(QK, 1), v1, o1))
    o2 = fma(splat(QB, 5), u0, fma(splat(QK, 5), v0, o2))
    o2 = fma(splat(QB, 6), u1, fma(splat(QK, 6), v1, o2))
    o2 = fma(splat(QB, 2), u2, fma(splat(QK, 2), v2, o2))
    o3 = fma(splat(QB, 7), u0, fma(splat(QK, 7), v0, o3))
    o3 = fma(splat(QB, 8), u1, fma(splat(QK, 8), v1, o3))
    o3 = fma(splat(QB, 9), u2, fma(splat(QK, 9), v2, o3))
    o3 = fma(splat(QB, 3), u3, fma(splat(QK, 3), v3, o3))
    store_rows(o, j, VP, o0, o1, o2, o3)
    for i in range(K):
        s = mul(splat(A, i), load(S, base + i * L))
        s = fma(splat(k, KP + i), v1, fma(splat(k, i), v0, s))
        s = fma(splat(k, 3 * KP + i), v3, fma(splat(k, 2 * KP + i), v2, s))
        s = fma(splat(b, KP + i), u1, fma(splat(b, i), u0, s))
        s = fma(splat(b, 3 * KP + i), u3, fma(splat(b, 2 * KP + i), u2, s))
        store(S, base + i * L, s)


@jit
def _scan_lanes(
    readers, values, writers, outs, sides, a, factor, shift, more, walk, S, V, dg, carry, need_dg
):
    """Run ``S = S Diag(a) + Σ values writersᵀ, outs = readersᵀ S`` with the decays along the lanes of S.

    Of each pair the second reader (without ``shift``) is that of the next position, of which there is one
    beyond n with ``more``; with ``shift`` the decay, and the second writer and value, are those of the
    position before. Without ``shift`` also write ``Σ sides ∘ outs'`` to dg; with ``shift`` finish dg, where
    ``carry`` enters as the part of the first position that comes from the state beyond it.
    """
    row, head, start, step, n = walk
    one = S.dtype.type(1)
    K = sides[0].shape[3]
    L, KP, VP = BYTES // S.itemsize, padded(K, S), padded(V, S)
    y, z, v, u = blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S), blank(GROUP * VP, S)
    k, b, o, r = blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S)
    e, f, g, d = blank(GROUP * KP, S), blank(GROUP * KP, S), blank(GROUP * KP, S), blank((GROUP + 1) * KP, S)
    YV, YU, ZV, ZU = blank(10, S), blank(10, S), blank(10, S), blank(10, S)
    for p in range(0, n, GROUP):
        behind, ahead = p - shift, p + 1 - shift
        gather(y, VP, readers[0], row, head, start, step, p, n, one)
        gather(z, VP, readers[1], row, head, start, step, ahead, n + more, one)
        gather(v, VP, values[0], row, head, start, step, p, n, one)
        gather(u, VP, values[1], row, head, start, step, behind, n, one)
        gather(k, KP, writers[0], row, head, start, step, p, n, one)
        gather(b, KP, writers[1], row, head, start, step, behind, n, one)
        gather_decay(d, KP, a, row, head, start, step, behind, n, GROUP + shift)
        # The scale of the output goes where do is: a reader, or a value.
        _scale(v if shift else y, factor)
        products(YV, y, v, VP)
        products(YU, y, u, VP)
        products(ZV, z, v, VP)
        products(ZU, z, u, VP)
        if need_dg:
            gather(e, KP, sides[0], row, head, start, step, p, n, one)
            gather(f, KP, sides[1], row, head, start, step, ahead, n + more, one)
            if shift:
                if p == 0:
                    # The carry already leaves out what the last token gives the state.
                    e[:KP] = 0
                    f[:KP] = 0
                gather(g, KP, dg, row, head, start, step, p, n, one)
        for i in range(0, KP, L):
            _lanes_tile(
                S, i * V, V, y, z, v, u, VP, YV, YU, ZV, ZU, k, b, d, o, r, e, f, g, carry, i, KP, shift
            )
        scatter(outs[0], row, head, start, step, p, n, o, KP)
        scatter(outs[1], row, head, start, step, ahead, n + more, r, KP)
        if need_dg:
            scatter(dg, row, head, start, step, p, n, g, KP)


@jit
def _scale(block, factor):
    for i in range(block.size):
        block[i] *= factor


@jit
def _lanes_tile(S, base, V, y, z, v, u, VP, YV, YU, ZV, ZU, k, b, d, o, r, e, f, g, carry, i, KP, shift):
    L = BYTES // S.itemsize
    a0, a1, a2, a3 = load(d, i), load(d, KP + i), load(d, 2 * KP + i), load(d, 3 * KP + i)
    k0, k1, k2, k3 = load(k, i), load(k, KP + i), load(k, 2 * KP + i), load(k, 3 * KP + i)
    b0, b1, b2, b3 = load(b, i), load(b, KP + i), load(b, 2 * KP + i), load(b, 3 * KP + i)
    o0 = o1 = o2 = o3 = r0 = r1 = r2 = r3 = zeros(S)
    for j in range(V):
        s = load(S, base + j * L)
        o0, o1 = fma(splat(y, j), s, o0), fma(splat(y, VP + j), s, o1)
        o2, o3 = fma(splat(y, 2 * VP + j), s, o2), fma(splat(y, 3 * VP + j), s, o3)
        r0, r1 = fma(splat(z, j), s, r0), fma(splat(z, VP + j), s, r1)
        r2, r3 = fma(splat(z, 2 * VP + j), s, r2), fma(splat(z, 3 * VP + j), s, r3)
    k01, k12, k23 = mul(k0, a1), mul(k1, a2), mul(k2, a3)
    k02, k13 = mul(k01, a2), mul(k12, a3)
    k03 = mul(k02, a3)
    b01, b12, b23 = mul(b0, a1), mul(b1, a2), mul(b2, a3)
    b02, b13 = mul(b01, a2), mul(b12, a3)
    b03 = mul(b02, a3)
    a01 = mul(a0, a1)
    a02 = mul(a01, a2)
    a03 = mul(a02, a3)
    o0, r0 = mul(a0, o0), mul(a0, r0)
    o1 = fma(a01, o1, fma(splat(YV, 4), k01, mul(splat(YU, 4), b01)))
    r1 = fma(a01, r1, fma(splat(ZV, 4), k01, mul(splat(ZU, 4), b01)))
    o2 = fma(a02, o2, fma(splat(YV, 5), k02, mul(splat(YU, 5), b02)))
    r2 = fma(a02, r2, fma(splat(ZV, 5), k02, mul(splat(ZU, 5), b02)))
    o2 = fma(splat(YV, 6), k12, fma(splat(YU, 6), b12, o2))
    r2 = fma(splat(ZV, 6), k12, fma(splat(ZU, 6), b12, r2))
    o3 = fma(a03, o3, fma(splat(YV, 7), k03, mul(splat(YU, 7), b03)))
    r3 = fma(a03, r3, fma(splat(ZV, 7), k03, mul(splat(ZU, 7), b03)))
    o3 = fma(splat(YV, 8), k13, fma(splat(YU, 8), b13, o3))
    r3 = fma(splat(ZV, 8), k13, fma(splat(ZU, 8), b13, r3))
    o3 = fma(splat(YV, 9), k23, fma(splat(YU, 9), b23, o3))
    r3 = fma(splat(ZV, 9), k23, fma(splat(ZU, 9), b23, r3))
    g0 = fma(load(f, i), r0, mul(load(e, i), o0))
    g1 = fma(load(f, KP + i), r1, mul(load(e, KP + i), o1))
    g2 = fma(load(f, 2 * KP + i), r2, mul(load(e, 2 * KP + i), o2))
    g3 = fma(load(f, 3 * KP + i), r3, mul(load(e, 3 * KP + i), o3))
    fold_products(g, g0, g1, g2, g3, d, carry, i, KP, shift)
    o0, o1 = fma(splat(YV, 0), k0, o0), fma(splat(YV, 1), k1, o1)
    o2, o3 = fma(splat(YV, 2), k2, o2), fma(splat(YV, 3), k3, o3)
    o0, o1 = fma(splat(YU, 0), b0, o0), fma(splat(YU, 1), b1, o1)
    o2, o3 = fma(splat(YU, 2), b2, o2), fma(splat(YU, 3), b3, o3)
    store_rows(o, i, KP, o0, o1, o2, o3)
    r0, r1 = fma(splat(ZV, 0), k0, r0), fma(splat(ZV, 1), k1, r1)
    r2, r3 = fma(splat(ZV, 2), k2, r2), fma(splat(ZV, 3), k3, r3)
    r0, r1 = fma(splat(ZU, 0), b0, r0), fma(splat(ZU, 1), b1, r1)
    r2, r3 = fma(splat(ZU, 2), b2, r2), fma(splat(ZU, 3), b3, r3)
    store_rows(r, i, KP, r0, r1, r2, r3)
    for j in range(V):
        s = mul(a03, load(S, base + j * L))
        s = fma(splat(v, VP + j), k13, fma(splat(v, j), k03, s))
        s = fma(splat(v, 3 * VP + j), k3, fma(splat(v, 2 * VP + j), k23, s))
        s = fma(splat(u, VP + j), b13, fma(splat(u, j), b03, s))
        s = fma(splat(u, 3 * VP + j), b3, fma(splat(u, 2 * VP + j), b23, s))
        store(S, base + j * L, s)


@jit
def _first(block, width, x, row, head, start, n):
    """Gather the first token of the walk alone."""
    gather(block, width, x, row, head, start, 0, 0, min(n, 1), x.dtype.type(1))


@jit
def _forward_task(task, q, k, v, a, b, decay, scale, sequences, initial, o, retrieved, final):
    sequence, head = divmod(task, q.shape[2])
    row, start, step, n = sequences[sequence]
    walk = (row, head, start, step, n)
    one, factor = q.dtype.type(1), q.dtype.type(scale)
    K, V = final[sequence, head].shape
    KP, VP = padded(K, q), padded(V, q)
    S, x, r = blank(K * VP, q), blank(GROUP * KP, q), blank(VP, q)
    load_state(S, initial[sequence, head], False)
    _first(x, KP, a, row, head, start, n)
    _read(S, K, x, r)
    scatter(retrieved, row, head, start, step, 0, min(n, 1), r, VP)
    _scan_rows(q, a, b, k, v, decay, factor, one, 0, walk, S, K, r, o, retrieved)
    save_state(final[sequence, head], S)


@jit
def _backward_task(
    task,
    do,
    dstate,
    retrieved,
    q,
    k,
    v,
    a,
    b,
    decay,
    scale,
    sequences,
    initial,
    dq,
    dk,
    dv,
    da,
    db,
    dr,
    dg,
    dinitial,
    need_dg,
):
    sequence, head = divmod(task, q.shape[2])
    row, start, step, n = sequences[sequence]
    final = start + (n - 1) * step
    back = (row, head, final, -step, n)
    one, factor = q.dtype.type(1), q.dtype.type(scale)
    last = dstate[sequence, head]
    K, V = last.shape
    KP, VP = padded(K, q), padded(V, q)
    D = blank(K * VP, q)
    load_state(D, last, False)
    _scan_rows(k, b, a, q, do, decay, one, factor, 1, back, D, K, blank(VP, q), dv, dr)
    save_state(dinitial[sequence, head], D)
    S, carry, w, x = blank(KP * V, q), blank(KP, q), blank(GROUP * VP, q), blank(KP, q)
    load_state(S, initial[sequence, head], True)
    _first(w, VP, dr, row, head, start, n)
    _read(S, V, w, x)
    scatter(da, row, head, start, step, 0, min(n, 1), x, KP)
    readers, values, writers, outs, sides = (do, dr), (v, retrieved), (k, b), (dq, da), (q, a)
    # dg of the last token starts from the state before it: beside what the token writes, little may be left.
    if n > 1:
        walk = (row, head, start, step, n - 1)
        _scan_lanes(
            readers, values, writers, outs, sides, decay, factor, 0, 1, walk, S, V, dg, carry, need_dg
        )
    if n > 0:
        walk = (row, head, final, step, 1)
        overlap(carry, S, last, decay, row, head, final)
        _scan_lanes(
            readers, values, writers, outs, sides, decay, factor, 0, 0, walk, S, V, dg, carry, need_dg
        )
    load_state(S, last, True)
    _scan_lanes(
        (v, retrieved),
        (do, dr),
        (q, a),
        (dk, db),
        (k, b),
        decay,
        factor,
        1,
        0,
        back,
        S,
        V,
        dg,
        carry,
        need_dg,
    )


@kernel("generalized_delta_rule")
def _run_forward(first, last, *args):
    for task in range(first, last):
        _forward_task(task, *args)


@kernel("the gradient of generalized_delta_rule")
def _run_backward(first, last, *args):
    for task in range(first, last):
        _backward_task(task, *args)
