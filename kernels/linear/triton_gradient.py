"""Triton kernel of the gradient of `linear_recurrence`, once the state on both sides of every chunk is known.

With S the state before a chunk, D the gradient of the state behind it, P_ij the decay from token j to token
i, and dA = scale · (do vᵀ) ∘ P below the diagonal,

    dq' = dA k + scale · start ∘ (do Sᵀ),   dk' = dAᵀ q,   dk'' = end ∘ (v Dᵀ),
    dv = scale · (q kᵀ ∘ P)ᵀ do + end ∘ (k D)
    dg_t = Σ_{i ≥ t} (q ∘ dq' − k ∘ dk')_i + Σ_{j < t} (k ∘ dk'')_j + whole ∘ (D ∘ S) 1.

What a token gives itself is left out of dq' and dk' and added afterwards: in dg the two are equal, and
leaving them out instead of subtracting them keeps dg accurate where the decay is strong. All sums of dg stay
within the chunk for the same reason.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from ..triton_blocks import (
    ZERO,
    base2,
    decay_sums,
    element_of,
    load_matrix,
    load_rows,
    pair_decay,
    row_of,
    rows,
    store_rows,
    sum_before,
    sum_from,
)
from .triton_channel import scores_gradient
from .triton_walk import C, log_decay


@triton.jit
def _keys_gradient(
    q, k, v, do, g, states, dstates, dq, dk, dg, start, first, n, here, head, chunk, scale, H, K_end, V_end,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    STEP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, dk and dg of a chunk, a decay a token: dA once, then a tile of K at a time."""
    EXACT: tl.constexpr = tl.float32 == OPERAND
    t = tl.arange(0, C)
    token, valid = rows(start, first + t, n, STEP)
    d = tl.zeros((C, C), tl.float32)
    for column in range(0, V_end, BV):
        v_c = load_rows(v, token, valid, head, H, column, V, BV).to(OPERAND)
        do_c = load_rows(do, token, valid, head, H, column, V, BV).to(OPERAND)
        d = tl.dot(do_c, tl.trans(v_c), d, input_precision=PRECISION)
    d *= scale
    if DECAY == "none":
        d = tl.where(t[:, None] >= t[None, :], d, 0.0).to(OPERAND)
    else:
        itself = tl.sum(tl.where(t[:, None] == t[None, :], d, 0.0), 1)
        l = log_decay(g, token, valid, head, H, DECAY)
        coarse, fine = decay_sums(l, EXACT)
        last, rest = element_of(coarse, C - 1, C), element_of(fine, C - 1, C)
        d *= pair_decay(coarse, fine, C, False, EXACT)
        d = tl.where(t[:, None] > t[None, :], d, 0.0).to(OPERAND)
        from_rows = tl.zeros((C,), tl.float32)
        to_end = tl.zeros((C,), tl.float32)
        through = tl.zeros((BK,), tl.float32)
    for row in range(0, K_end, BK):
        dq_c = tl.zeros((C, BK), tl.float32)
        dk_c = tl.zeros((C, BK), tl.float32)
        for column in range(0, V_end, BV):
            v_c = load_rows(v, token, valid, head, H, column, V, BV).to(OPERAND)
            do_c = load_rows(do, token, valid, head, H, column, V, BV).to(OPERAND)
            s = load_matrix(states, here, row, column, K, V, BK, BV)
            ds = load_matrix(dstates, here, row, column, K, V, BK, BV)
            dq_c = tl.dot(do_c, tl.trans(s), dq_c, input_precision=PRECISION)
            dk_c = tl.dot(v_c, tl.trans(ds), dk_c, input_precision=PRECISION)
            if DECAY != "none":
                through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
        q_c = load_rows(q, token, valid, head, H, row, K, BK).to(OPERAND)
        k_c = load_rows(k, token, valid, head, H, row, K, BK).to(OPERAND)
        dq_c *= scale
        if DECAY == "none":
            dq_c = tl.dot(d, k_c, dq_c, input_precision=PRECISION)
            dk_c = tl.dot(tl.trans(d), q_c, dk_c, input_precision=PRECISION)
        else:
            dq_c *= tl.exp2(coarse + fine)[:, None]
            dk_c *= tl.exp2((last - coarse) + (rest - fine))[:, None]
            dq_c = tl.dot(d, k_c, dq_c, input_precision=PRECISION)
            dk_in = tl.dot(tl.trans(d), q_c, input_precision=PRECISION)
            q_c, k_c = q_c.to(tl.float32), k_c.to(tl.float32)
            from_rows += tl.sum(q_c * dq_c - k_c * dk_in, 1)
            to_end += tl.sum(k_c * dk_c, 1)
            dq_c += itself[:, None] * k_c
            dk_c += dk_in + itself[:, None] * q_c
        store_rows(dq, dq_c, token, valid, head, H, row, K, BK)
        store_rows(dk, dk_c, token, valid, head, H, row, K, BK)
    if DECAY != "none":
        dg_c = sum_from(from_rows) + sum_before(to_end) + tl.exp2(last + rest) * tl.sum(through, 0)
        dg_c = tl.where(l > ZERO, dg_c, 0.0)
        if DECAY == "head":
            tl.store(dg + chunk * H + head, tl.sum(tl.where(valid, dg_c, 0.0), 0))
        else:
            tl.store(dg + token * H + head, dg_c, mask=valid)


@triton.jit
def _channels_gradient(
    q, k, v, do, g, dscores, states, dstates, dq, dk, dg, start, first, n, here, head, row, scale, H, V_end,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STEP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, dk and dg of a tile of K of a chunk, where every channel has its decay."""
    EXACT: tl.constexpr = tl.float32 == OPERAND
    t = tl.arange(0, C)
    token, valid = rows(start, first + t, n, STEP)
    dq_c = tl.zeros((C, BK), tl.float32)
    dk_c = tl.zeros((C, BK), tl.float32)
    through = tl.zeros((BK,), tl.float32)
    for column in range(0, V_end, BV):
        v_c = load_rows(v, token, valid, head, H, column, V, BV).to(OPERAND)
        do_c = load_rows(do, token, valid, head, H, column, V, BV).to(OPERAND)
        s = load_matrix(states, here, row, column, K, V, BK, BV)
        ds = load_matrix(dstates, here, row, column, K, V, BK, BV)
        dq_c = tl.dot(do_c, tl.trans(s), dq_c, input_precision=PRECISION)
        dk_c = tl.dot(v_c, tl.trans(ds), dk_c, input_precision=PRECISION)
        through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
    q_c = load_rows(q, token, valid, head, H, row, K, BK).to(tl.float32)
    k_c = load_rows(k, token, valid, head, H, row, K, BK).to(tl.float32)
    l = base2(load_rows(g, token, valid, head, H, row, K, BK))
    coarse, fine = decay_sums(l, EXACT)
    last, rest = row_of(coarse, C - 1, C), row_of(fine, C - 1, C)
    dq_c *= scale * tl.exp2(coarse + fine)
    dk_c *= tl.exp2((last[None, :] - coarse) + (rest[None, :] - fine))
    dq_in, dk_in = scores_gradient(
        dscores, q_c, k_c, q, k, g, coarse, fine, start, first, n, head, H, row,
        K, BK, STEP, OPERAND, PRECISION,
    )  # fmt: skip
    dq_c += dq_in
    dg_c = sum_from(q_c * dq_c - k_c * dk_in) + sum_before(k_c * dk_c)
    dg_c = tl.where(l > ZERO, dg_c + (tl.exp2(last + rest) * through)[None, :], 0.0)
    store_rows(dg, dg_c, token, valid, head, H, row, K, BK)
    itself = tl.load(dscores + (token * H + head) * C + t, mask=valid, other=0.0).to(tl.float32)[:, None]
    store_rows(dq, dq_c + itself * k_c, token, valid, head, H, row, K, BK)
    store_rows(dk, dk_c + dk_in + itself * q_c, token, valid, head, H, row, K, BK)


@triton.jit
def _chunk_rows(
    x, y, z, g, scores, states, out, start, first, n, here, head, column, scale, H, K_end,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    STEP: tl.constexpr, BACKWARD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of V of ``o = scale · ((q kᵀ ∘ P) v + start ∘ (q S))``, with (x, y, z) = (q, k, v).

    ``BACKWARD`` turns time round: ``dv = scale · (k qᵀ ∘ Pᵀ) do + end ∘ (k D)``, with (k, q, do).
    """
    EXACT: tl.constexpr = tl.float32 == OPERAND
    t = tl.arange(0, C)
    token, valid = rows(start, first + t, n, STEP)
    z_c = load_rows(z, token, valid, head, H, column, V, BV).to(OPERAND)
    out_c = tl.zeros((C, BV), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    for row in range(0, K_end, BK):
        x_c = load_rows(x, token, valid, head, H, row, K, BK).to(OPERAND)
        if DECAY != "channel":
            y_c = load_rows(y, token, valid, head, H, row, K, BK).to(OPERAND)
            pairs = tl.dot(x_c, tl.trans(y_c), pairs, input_precision=PRECISION)
        s = load_matrix(states, here, row, column, K, V, BK, BV)
        out_c = tl.dot(x_c, s, out_c, input_precision=PRECISION)
    if not BACKWARD:
        out_c *= scale
    if DECAY == "channel":
        pairs = load_rows(scores, token, valid, head, H, 0, C, C)
        if BACKWARD:
            pairs = tl.trans(pairs)
        out_c += scale * tl.dot(pairs, z_c, input_precision=PRECISION)
    else:
        pairs *= scale
        if DECAY == "none":
            below = t[:, None] <= t[None, :] if BACKWARD else t[:, None] >= t[None, :]
            pairs = tl.where(below, pairs, 0.0)
        else:
            coarse, fine = decay_sums(log_decay(g, token, valid, head, H, DECAY), EXACT)
            last, rest = element_of(coarse, C - 1, C), element_of(fine, C - 1, C)
            pairs *= pair_decay(coarse, fine, C, BACKWARD, EXACT)
            sums = (last - coarse) + (rest - fine) if BACKWARD else coarse + fine
            out_c *= tl.exp2(sums)[:, None]
        out_c = tl.dot(pairs.to(OPERAND), z_c, out_c, input_precision=PRECISION)
    store_rows(out, out_c, token, valid, head, H, column, V, BV)


@triton.jit
def chunk_outputs(
    q,  # (tokens, H, K); decayed from the chunk's start with "channel"
    k,
    v,  # (tokens, H, V)
    g,
    scores,  # (tokens, H, C), with "channel"
    states,  # (N, H, K, V): S, in the type of the operands
    o,
    chunks,
    scale,
    H,
    K_end,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of one chunk of one head: one program a tile of V."""
    program = tl.program_id(0)
    tiles: tl.constexpr = (V + BV - 1) // BV
    here = program // tiles
    head = here % H
    chunk = here // H
    first = tl.load(chunks + 4 * chunk + 1)
    start = tl.load(chunks + 4 * chunk + 2)
    n = tl.load(chunks + 4 * chunk + 3)
    _chunk_rows(
        q, k, v, g, scores, states, o, start, first, n, here, head, program % tiles * BV, scale, H, K_end,
        K, V, BK, BV, DECAY, STEP, False, OPERAND, PRECISION,
    )  # fmt: skip


@triton.jit
def chunk_gradient(
    q,  # (tokens, H, K)
    k,
    v,  # (tokens, H, V)
    do,
    g,
    keys,  # (tokens, H, K): k decayed to the chunk's end, with "channel"
    scores,  # (tokens, H, C), with "channel"
    dscores,
    states,  # (N, H, K, V): S, in the type of the operands
    dstates,  # (N, H, K, V): D
    dq,
    dk,
    dv,
    dg,  # (tokens, H, K) with "channel", (tokens, H) with "token", a sum a chunk (N, H) with "head"
    chunks,
    scale,
    H,
    K_end,  # K and V once more: the compiler keeps a loop, and its pipeline, where it cannot count the turns
    V_end,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one chunk of one head: programs for dq, dk and dg, and one a tile of V for dv.

    The former are one a tile of K with "channel", and otherwise one, which sums dg over all of K.
    """
    program = tl.program_id(0)
    row_tiles: tl.constexpr = (K + BK - 1) // BK if DECAY == "channel" else 1
    tiles: tl.constexpr = row_tiles + (V + BV - 1) // BV
    part = program % tiles
    here = program // tiles
    head = here % H
    chunk = here // H
    first = tl.load(chunks + 4 * chunk + 1)
    start = tl.load(chunks + 4 * chunk + 2)
    n = tl.load(chunks + 4 * chunk + 3)
    if part >= row_tiles:
        _chunk_rows(
            keys, q, do, g, scores, dstates, dv, start, first, n, here, head, (part - row_tiles) * BV, scale,
            H, K_end, K, V, BK, BV, DECAY, STEP, True, OPERAND, PRECISION,
        )  # fmt: skip
    elif DECAY == "channel":
        _channels_gradient(
            q, k, v, do, g, dscores, states, dstates, dq, dk, dg, start, first, n, here, head, part * BK,
            scale, H, V_end, K, V, BK, BV, STEP, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        _keys_gradient(
            q, k, v, do, g, states, dstates, dq, dk, dg, start, first, n, here, head, chunk, scale, H, K_end,
            V_end, K, V, BK, BV, DECAY, STEP, OPERAND, PRECISION,
        )  # fmt: skip
