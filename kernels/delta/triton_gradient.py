"""Last launch of the delta rule's backward pass in Triton: all but the scan, for all chunks at once.

One program a chunk and head. With S the state at the chunk's start, D the gradient of the one at its end, P
the decay between two tokens, do' = scale · do, and, below the diagonal, the gradients of the scores of q
with k and of k with k, dqk = do' eᵀ and dkk = −dv eᵀ (β stays with the k that is written),

    r_j  = Σ_i P_ij (dqk_ij q_i + dkk_ij k_i) + (D e_j decayed to the end) + (do'_j · e_j) q_j
    dq_i = Σ_j P_ij dqk_ij β_j k_j + (S do'_i decayed from the start) + (do'_i · e_i) β_i k_i
    dk_i = β_i r_i + Σ_j P_ij dkk_ij β_j k_j − (S dv_i decayed from the start),   dβ_j = k_j · r_j.

The gradient of g_t sums what crosses token t: what tokens from t on take from before it, what tokens before
t give to the state at the chunk's end, and what the state carries across. What a token gives itself is left
out of it, so that strong decays keep their digits.

Shapes: B batch, T tokens, H heads, K and V key and value sizes, C tokens a chunk, N chunks of all sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_systems import HEAD, load_rows, pair_decays, store_rows


@triton.jit
def pair_gradients(
    do, dv, error, token, live, scale, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``do' eᵀ`` and ``−dv eᵀ`` below the diagonal ``(C, C)``, and the former's diagonal ``(C,)``."""
    row = tl.arange(0, C)
    dqk = tl.zeros((C, C), tl.float32)
    dkk = tl.zeros((C, C), tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        e = tl.trans(load_rows(error, token, live, value, V).to(dtype))
        dqk = tl.dot(load_rows(do, token, live, value, V).to(dtype), e, dqk, input_precision=PRECISION)
        dkk = tl.dot(load_rows(dv, token, live, value, V).to(dtype), e, dkk, input_precision=PRECISION)
    itself = tl.sum(tl.where(row[:, None] == row[None, :], dqk, 0.0), 1) * scale
    strict = row[:, None] > row[None, :]
    return tl.where(strict, dqk * scale, 0.0), tl.where(strict, -dkk, 0.0), itself


@triton.jit
def state_gradients(
    states, dstates, do, dv, error, token, live, chunk, key, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``do Sᵀ``, ``−dv Sᵀ`` and ``e Dᵀ`` ``(C, BK)``, and the diagonal of ``S Dᵀ`` ``(BK,)``."""
    to_q = tl.zeros((C, BK), tl.float32)
    to_k = tl.zeros((C, BK), tl.float32)
    to_write = tl.zeros((C, BK), tl.float32)
    through = tl.zeros((BK,), tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        s = load_rows(states, chunk * K + key, key < K, value, V)
        d = load_rows(dstates, chunk * K + key, key < K, value, V)
        through += tl.sum(s.to(tl.float32) * d.to(tl.float32), 1)
        s, d = tl.trans(s), tl.trans(d)
        to_q = tl.dot(load_rows(do, token, live, value, V).to(dtype), s, to_q, input_precision=PRECISION)
        to_k = tl.dot(load_rows(dv, token, live, value, V).to(dtype), s, to_k, input_precision=PRECISION)
        e = load_rows(error, token, live, value, V).to(dtype)
        to_write = tl.dot(e, d, to_write, input_precision=PRECISION)
    return to_q, -to_k, to_write, through


@triton.jit(do_not_specialize=["step", "H"])
def chunk_gradients(
    q, k, beta, decay, error, do, dv, states, dstates, start, end, dqk, dkk, itself, dq, dk, dbeta, ddecay,
    chunks, scale, step, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``dq`` and ``dk (B, T, H, K)``, ``dbeta (B, T, H)`` and, unless ``None``, ``ddecay`` as decay is.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        beta: ``(B, T, H)``.
        decay: ``None`` or ``(B, T, H)``, as ``DECAY`` says.
        error: float32 ``(B, T, H, V)`` of the forward pass.
        do: gradient of o ``(B, T, H, V)``.
        dv: gradient of v ``(B, T, H, V)``.
        states: ``(N, H, K, V)``: state at each chunk's start.
        dstates: ``(N, H, K, V)``: gradient of the state at each chunk's end.
        start: float32 ``(N, H, C)``, as `chunk_systems` wrote it.
        end: likewise.
        dqk: ``(N, H, C, C)``, as `score_gradients` wrote it, or ``None``, and it is made here.
        dkk: likewise.
        itself: float32 ``(N, H, C)``, likewise.
        dq: out.
        dk: out.
        dbeta: out.
        ddecay: out.
        chunks: int32 ``(N, 4)``, as `ChunkTable` has it.
        scale: factor of o.
        step: 1, or −1 in reverse.
        H: heads.
        K: key size.
        V: value size.
        C: tokens a chunk.
        BK: key channels at a time.
        BV: value channels at a time.
        DECAY: NONE or HEAD.
        PRECISION: ``input_precision`` of the products.
    """
    dtype: tl.constexpr = k.dtype.element_ty
    head = tl.program_id(0) % H
    at = chunks + tl.program_id(0) // H * 4
    position, begin, n = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, C)
    live = position + row < n
    token = (begin + step * (position + row)).to(tl.int64) * H + head
    weight = tl.load(beta + token, mask=live, other=0.0).to(tl.float32)
    if itself is None:
        dqk_c, dkk_c, alone = pair_gradients(do, dv, error, token, live, scale, V, C, BV, dtype, PRECISION)
    else:
        alone = tl.load(itself + chunk * C + row)
    if DECAY == HEAD:
        log_decay = tl.load(decay + token, mask=live, other=0.0).to(tl.float32)
        pairs = pair_decays(log_decay, C)
        if itself is None:
            dqk_c *= pairs
            dkk_c *= pairs
        from_start = tl.load(start + chunk * C + row)[:, None]
        to_end = tl.load(end + chunk * C + row)[:, None]
        taken = tl.zeros((C,), tl.float32)
        given = tl.zeros((C,), tl.float32)
        carried = 0.0
    if itself is None:
        dqk_c, dkk_c = dqk_c.to(dtype), dkk_c.to(dtype)
    to_beta = tl.zeros((C,), tl.float32)
    for b in range(0, K, BK):
        key = b + tl.arange(0, BK)
        to_q, to_k, to_write, through = state_gradients(
            states, dstates, do, dv, error, token, live, chunk, key, K, V, C, BK, BV, dtype, PRECISION
        )
        to_q *= scale
        if DECAY == HEAD:
            to_q *= from_start
            to_k *= from_start
            to_write *= to_end
        if itself is not None:
            # Loaded anew each time: kept as operands they would fill the registers.
            tile = chunk * (C * C) + row[:, None] * C + row[None, :]
            dqk_c, dkk_c = tl.load(dqk + tile), tl.load(dkk + tile)
            if DECAY == HEAD:
                dqk_c *= pairs
                dkk_c *= pairs
            dqk_c, dkk_c = dqk_c.to(dtype), dkk_c.to(dtype)
        q_b = load_rows(q, token, live, key, K)
        k_b = load_rows(k, token, live, key, K)
        written = k_b.to(tl.float32) * weight[:, None]
        to_q = tl.dot(dqk_c, written.to(dtype), to_q, input_precision=PRECISION)
        to_k = tl.dot(dkk_c, written.to(dtype), to_k, input_precision=PRECISION)
        from_pairs = tl.dot(tl.trans(dqk_c), q_b, input_precision=PRECISION)
        from_pairs = tl.dot(tl.trans(dkk_c), k_b, from_pairs, input_precision=PRECISION)
        q_b, k_b = q_b.to(tl.float32), k_b.to(tl.float32)
        if DECAY == HEAD:
            taken += tl.sum(q_b * to_q + k_b * to_k - written * from_pairs, 1)
            given += tl.sum(written * to_write, 1)
            carried += tl.sum(through, 0)
        store_rows(dq, token, live, key, K, to_q + alone[:, None] * written)
        to_write += from_pairs + alone[:, None] * q_b
        to_beta += tl.sum(k_b * to_write, 1)
        store_rows(dk, token, live, key, K, to_k + weight[:, None] * to_write)
    tl.store(dbeta + token, to_beta.to(dbeta.dtype.element_ty), mask=live)
    if DECAY == HEAD:
        before = tl.sum(tl.where(row[:, None] > row[None, :], given[None, :], 0.0), 1)
        before += tl.cumsum(taken, 0, reverse=True) + carried * tl.load(start + chunk * C + C - 1)
        before = tl.where(tl.exp(log_decay) == 0.0, 0.0, before)
        tl.store(ddecay + token, before.to(ddecay.dtype.element_ty), mask=live)
