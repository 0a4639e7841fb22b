"""Linear recurrence on a CPU: Numba, one task for each head of each sequence, its state in first-level cache.

The backward pass keeps no state of any token. With D_t the gradient of S_t,

    dv_t = D_tᵀ k_t,  dk_t = D_t v_t,  D_{t-1} = Diag(a_t) D_t + q_{t-1} do_{t-1}ᵀ    (walking backwards)
    dq_t = S_t do_t                                                                   (walking forwards)
    dg_t = dg_{t+1} + q_t ∘ dq'_t − k_t ∘ dk'_t,

where dq' and dk' leave out what token t gives itself: those two terms are equal, and taking them out by
algebra instead of by subtraction keeps dg accurate where the decay is strong.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import torch
from torch import Tensor

from ..matrix_state import fold_decay_grad, new_state, state_dtype
from ..simd import BYTES, add, fma, jit, kernel, load, mul, splat, store, sub, where_nonzero, zeros
from ..token_groups import (
    GROUP,
    as_array,
    blank,
    decay_factors,
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
)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    dtype = state_dtype(v)
    sequences = sequence_table(cu_seqlens, q.shape[0], q.shape[1], reverse)
    o = fresh(v.shape, dtype)
    final = new_state(v, len(sequences), q.shape[-1])
    initial = torch.zeros_like(final) if initial_state is None else initial_state
    _run_forward(
        len(sequences) * q.shape[2],
        as_array(q, dtype),
        as_array(k, dtype),
        as_array(v, dtype),
        decay_factors(decay, q, dtype),
        scale,
        sequences,
        as_array(initial, dtype),
        o.numpy(),
        final.numpy(),
    )
    return o.to(v.dtype), final


def backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, decay and initial_state."""
    dtype = state_dtype(v)
    sequences = sequence_table(cu_seqlens, q.shape[0], q.shape[1], reverse)
    dq, dk, dv = (fresh(x.shape, dtype) for x in (q, k, v))
    dg = fresh(q.shape if decay is not None else (0, 0, 0, 0), dtype)
    dinitial = new_state(v, len(sequences), q.shape[-1])
    initial = torch.zeros_like(dinitial) if initial_state is None else initial_state
    _run_backward(
        len(sequences) * q.shape[2],
        as_array(do, dtype),
        as_array(dstate, dtype),
        as_array(q, dtype),
        as_array(k, dtype),
        as_array(v, dtype),
        decay_factors(decay, q, dtype),
        scale,
        sequences,
        as_array(initial, dtype),
        dq.numpy(),
        dk.numpy(),
        dv.numpy(),
        dg.numpy(),
        dinitial.numpy(),
        decay is not None,
    )
    ddecay = None if decay is None else fold_decay_grad(dg, decay)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        ddecay,
        None if initial_state is None else dinitial.to(initial_state.dtype),
    )


@jit
def _scan_rows(query, key, value, a, query_factor, key_factor, shift, walk, state, out, last):
    """Run ``S = Diag(a) S + key valueᵀ, out = Sᵀ query`` with the decays along the rows of S.

    With ``shift`` the decay of a position acts after its output instead of before it.
    """
    row, head, start, step, n = walk
    one = state.dtype.type(1)
    K, V = state.shape
    L, KP, VP = BYTES // state.itemsize, padded(K, state), padded(V, state)
    S = blank(K * VP, state)
    load_state(S, state, False)
    q, k, d = blank(GROUP * KP, state), blank(GROUP * KP, state), blank(GROUP * KP, state)
    v, o = blank(GROUP * VP, state), blank(GROUP * VP, state)
    A, P = blank(KP, state), blank(10, state)
    for p in range(0, n + shift, GROUP):
        gather(q, KP, query, row, head, start, step, p, n, query_factor)
        gather(k, KP, key, row, head, start, step, p, n, key_factor)
        gather(v, VP, value, row, head, start, step, p, n, one)
        gather_decay(d, KP, a, row, head, start, step, p - shift, n, GROUP)
        fold_decay_rows(P, q, k, d, A, KP)
        for j in range(0, VP, L):
            _rows_tile(S, j * K, K, q, k, A, KP, P, v, o, j, VP)
        scatter(out, row, head, start, step, p, n, o, VP)
    save_state(last, S)


@jit
def _rows_tile(S, base, K, q, k, A, KP, P, v, o, j, VP):
    v0, v1, v2, v3 = load(v, j), load(v, VP + j), load(v, 2 * VP + j), load(v, 3 * VP + j)
    o0 = mul(splat(P, 0), v0)
    o1 = fma(splat(P, 4), v0, mul(splat(P, 1), v1))
    o2 = fma(splat(P, 5), v0, fma(splat(P, 6), v1, mul(splat(P, 2), v2)))
    o3 = fma(splat(P, 7), v0, fma(splat(P, 8), v1, fma(splat(P, 9), v2, mul(splat(P, 3), v3))))
    L = BYTES // S.itemsize
    for i in range(K):
        s = load(S, base + i * L)
        o0, o1 = fma(splat(q, i), s, o0), fma(splat(q, KP + i), s, o1)
        o2, o3 = fma(splat(q, 2 * KP + i), s, o2), fma(splat(q, 3 * KP + i), s, o3)
        s = fma(splat(k, i), v0, mul(splat(A, i), s))
        s = fma(splat(k, KP + i), v1, s)
        s = fma(splat(k, 2 * KP + i), v2, s)
        store(S, base + i * L, fma(splat(k, 3 * KP + i), v3, s))
    store(o, j, o0)
    store(o, VP + j, o1)
    store(o, 2 * VP + j, o2)
    store(o, 3 * VP + j, o3)


@jit
def _scan_lanes(
    query, value, key, a, query_factor, key_factor, shift, walk, S, V, out, side, dg, carry, need_dg
):
    """Run ``S = S Diag(a) + value keyᵀ, out = queryᵀ S`` with the decays along the lanes of S.

    Without ``shift`` also write ``side ∘ out'`` to dg; with ``shift`` finish dg, where ``carry`` enters as
    the part of the first position that comes from the state beyond it. out' leaves out what a position gives
    itself.
    """
    row, head, start, step, n = walk
    one = S.dtype.type(1)
    K = key.shape[3]
    L, KP, VP = BYTES // S.itemsize, padded(K, S), padded(V, S)
    k, o = blank(GROUP * KP, S), blank(GROUP * KP, S)
    y, g = blank(GROUP * KP, S), blank(GROUP * KP, S)
    q, v = blank(GROUP * VP, S), blank(GROUP * VP, S)
    d, P = blank((GROUP + 1) * KP, S), blank(10, S)
    for p in range(0, n + shift, GROUP):
        gather(q, VP, query, row, head, start, step, p, n, query_factor)
        gather(v, VP, value, row, head, start, step, p, n, one)
        gather(k, KP, key, row, head, start, step, p, n, key_factor)
        gather_decay(d, KP, a, row, head, start, step, p - shift, n, GROUP + shift)
        products(P, q, v, VP)
        if need_dg:
            gather(y, KP, side, row, head, start, step, p, n, one)
            if shift:
                if p == 0:
                    y[:KP] = 0  # the carry already leaves out what the last token gives the state
                gather(g, KP, dg, row, head, start, step, p, n, one)
        for i in range(0, KP, L):
            _lanes_tile(S, i * V, V, q, v, VP, P, k, d, o, y, g, carry, i, KP, shift)
        scatter(out, row, head, start, step, p, n, o, KP)
        if need_dg:
            scatter(dg, row, head, start, step, p, n, g, KP)


@jit
def _lanes_tile(S, base, V, q, v, VP, P, k, d, o, y, g, carry, i, KP, shift):
    k0, k1, k2, k3 = load(k, i), load(k, KP + i), load(k, 2 * KP + i), load(k, 3 * KP + i)
    a0, a1, a2, a3 = load(d, i), load(d, KP + i), load(d, 2 * KP + i), load(d, 3 * KP + i)
    k01, k12, k23 = mul(k0, a1), mul(k1, a2), mul(k2, a3)
    k02, k13 = mul(k01, a2), mul(k12, a3)
    k03 = mul(k02, a3)
    a01 = mul(a0, a1)
    a02 = mul(a01, a2)
    a03 = mul(a02, a3)
    o0 = o1 = o2 = o3 = zeros(S)
    L = BYTES // S.itemsize
    for j in range(V):
        s = load(S, base + j * L)
        o0, o1 = fma(splat(q, j), s, o0), fma(splat(q, VP + j), s, o1)
        o2, o3 = fma(splat(q, 2 * VP + j), s, o2), fma(splat(q, 3 * VP + j), s, o3)
        s = fma(splat(v, j), k03, mul(a03, s))
        s = fma(splat(v, VP + j), k13, s)
        s = fma(splat(v, 2 * VP + j), k23, s)
        store(S, base + j * L, fma(splat(v, 3 * VP + j), k3, s))
    o0 = mul(a0, o0)
    o1 = fma(a01, o1, mul(splat(P, 4), k01))
    o2 = fma(a02, o2, fma(splat(P, 5), k02, mul(splat(P, 6), k12)))
    o3 = fma(a03, o3, fma(splat(P, 7), k03, fma(splat(P, 8), k13, mul(splat(P, 9), k23))))
    store(o, i, fma(splat(P, 0), k0, o0))
    store(o, KP + i, fma(splat(P, 1), k1, o1))
    store(o, 2 * KP + i, fma(splat(P, 2), k2, o2))
    store(o, 3 * KP + i, fma(splat(P, 3), k3, o3))
    fold_decay(g, y, o0, o1, o2, o3, d, carry, i, KP, shift)


@jit
def fold_decay(g, y, o0, o1, o2, o3, d, carry, i, KP, shift):
    """Write ``y ∘ o'`` to g; with ``shift`` turn ``q ∘ dq'`` in g into dg, of which ``carry`` is the last."""
    o0, o1 = mul(load(y, i), o0), mul(load(y, KP + i), o1)
    o2, o3 = mul(load(y, 2 * KP + i), o2), mul(load(y, 3 * KP + i), o3)
    fold_products(g, o0, o1, o2, o3, d, carry, i, KP, shift)


@jit
def fold_products(g, o0, o1, o2, o3, d, carry, i, KP, shift):
    """Do what `fold_decay` does with ``y ∘ o'`` itself."""
    if shift:
        # Where nothing survives the decay its gradient is exactly zero, and the sum starts afresh.
        c = load(carry, i)
        o0 = c = where_nonzero(load(d, KP + i), add(c, sub(load(g, i), o0)))
        o1 = c = where_nonzero(load(d, 2 * KP + i), add(c, sub(load(g, KP + i), o1)))
        o2 = c = where_nonzero(load(d, 3 * KP + i), add(c, sub(load(g, 2 * KP + i), o2)))
        o3 = c = where_nonzero(load(d, 4 * KP + i), add(c, sub(load(g, 3 * KP + i), o3)))
        store(carry, i, c)
    store(g, i, o0)
    store(g, KP + i, o1)
    store(g, 2 * KP + i, o2)
    store(g, 3 * KP + i, o3)


@jit
def _forward_task(task, q, k, v, a, scale, sequences, initial, o, final):
    sequence, head = divmod(task, q.shape[2])
    row, start, step, n = sequences[sequence]
    walk = (row, head, start, step, n)
    factor = q.dtype.type(scale)
    _scan_rows(
        q, k, v, a, factor, q.dtype.type(1), 0, walk, initial[sequence, head], o, final[sequence, head]
    )


@jit
def _backward_task(
    task, do, dstate, q, k, v, a, scale, sequences, initial, dq, dk, dv, dg, dinitial, need_dg
):
    sequence, head = divmod(task, q.shape[2])
    row, start, step, n = sequences[sequence]
    back = (row, head, start + (n - 1) * step, -step, n)
    one, factor = q.dtype.type(1), q.dtype.type(scale)
    last = dstate[sequence, head]
    K, V = last.shape
    KP = padded(K, q)
    _scan_rows(k, q, do, a, one, factor, 1, back, last, dv, dinitial[sequence, head])
    S, carry = blank(KP * V, q), blank(KP, q)
    load_state(S, initial[sequence, head], True)
    # dg of the last token starts from the state before it: beside what the token writes, little may be left.
    final = start + (n - 1) * step
    if n > 1:
        before = (row, head, start, step, n - 1)
        _scan_lanes(do, v, k, a, factor, one, 0, before, S, V, dq, q, dg, carry, need_dg)
    if n > 0:
        overlap(carry, S, last, a, row, head, final)
        _scan_lanes(do, v, k, a, factor, one, 0, (row, head, final, step, 1), S, V, dq, q, dg, carry, need_dg)
    load_state(S, last, True)
    _scan_lanes(v, do, q, a, one, factor, 1, back, S, V, dk, k, dg, carry, need_dg)


@kernel("linear_recurrence")
def _run_forward(first, last, *args):
    for task in range(first, last):
        _forward_task(task, *args)


@kernel("the gradient of linear_recurrence")
def _run_backward(first, last, *args):
    for task in range(first, last):
        _backward_task(task, *args)
