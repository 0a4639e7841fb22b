"""Last two launches of the generalised delta rule's backward pass in Triton: gradients of q, k, a, b and
decay.

`chunk_products` has one program a chunk and head, `chunk_gradients` one a tile of key channels of that. Token
i of a chunk has two readers, q_i and a_{i+1}, whose outputs' gradients are ``scale · do_i`` and w_{i+1}, and
two writers, b_i and k_i, whose values are r_i and v_i. With ``P_ij`` the decay from token j through i, S the
state at the chunk's start and D the gradient of the one at its end, a reader x with output gradient y and a
writer z with value u give

    dx_i = Σ_j P_ij (y_i · u_j) z_j + start_i (S y_i),   dz_j = Σ_i P_ij (y_i · u_j) x_i + end_j (D u_j),

and the gradient of g_t sums what crosses token t: what readers from t on take from before it, what writers
before t give to the state at the chunk's end, and what the state carries across. What readers and writers of
one token give each other is left out of it, so that strong decays keep their digits.

Shapes: B batch, T tokens, H heads, K and V key and value sizes, C tokens a chunk, N chunks of all sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

import triton
import triton.language as tl

from ..delta.triton_systems import load_rows, store_rows
from .triton_systems import chunk_factors, row_of


@triton.jit
def _products(
    do, dretrieved, values, f_out, g_out, token, live, after, ahead, scale, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``do' uᵀ`` and ``w uᵀ`` of the next token, zero above the diagonal."""
    dtype: tl.constexpr = do.dtype.element_ty
    row = tl.arange(0, C)
    f = tl.zeros((C, C), tl.float32)
    g = tl.zeros((C, C), tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        u = tl.trans(load_rows(values, token, live, value, V).to(dtype))
        f = tl.dot(load_rows(do, token, live, value, V), u, f, input_precision=PRECISION)
        w = load_rows(dretrieved, token + ahead, after, value, V).to(dtype)
        g = tl.dot(w, u, g, input_precision=PRECISION)
    lower = row[:, None] >= row[None, :]
    at = tl.program_id(0).to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
    tl.store(f_out + at, tl.where(lower, f * scale, 0.0).to(f_out.dtype.element_ty))
    tl.store(g_out + at, tl.where(lower, g, 0.0).to(g_out.dtype.element_ty))


@triton.jit(do_not_specialize=["step", "H"])
def chunk_products(
    do, dretrieved, retrieved, v, fb, gb, fk, gk, chunks, scale, step, H, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what reader i makes of writer j: the products of the gradients of its output with the writer's
    values.

    Args:
        do: gradient of o ``(B, T, H, V)``.
        dretrieved: float32 ``(B, T, H, V)``, as `scan_backward` wrote it.
        retrieved: float32 ``(B, T, H, V)`` of the forward pass.
        v: ``(B, T, H, V)``.
        fb: out ``(N, H, C, C)``: of q_i and b_j.
        gb: out: of a_{i+1} and b_j.
        fk: out: of q_i and k_j.
        gk: out: of a_{i+1} and k_j.
        chunks: int32 ``(N, 4)``, as `ChunkTable` has it.
        scale: factor of o.
        step: 1, or −1 in reverse.
        H: heads.
        V: value size.
        C: tokens a chunk.
        BV: value channels at a time.
        PRECISION: ``input_precision`` of the products.
    """
    at = chunks + tl.program_id(0) // H * 4
    position, begin, n = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    row = tl.arange(0, C)
    live = position + row < n
    after = (position + row + 1 < n) & (row + 1 < C)
    token = (begin + step * (position + row)).to(tl.int64) * H + tl.program_id(0) % H
    _products(do, dretrieved, retrieved, fb, gb, token, live, after, step * H, scale, V, C, BV, PRECISION)
    _products(do, dretrieved, v, fk, gk, token, live, after, step * H, scale, V, C, BV, PRECISION)


@triton.jit
def _pairs(
    q_c, a_c, z_c, decay, f, g, token, live, after, ahead, key, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what pairs of different tokens give q, the next token's a, and a writer z: ``(C, BK)`` each."""
    row = tl.arange(0, C)
    log_decay = load_rows(decay, token, live, key, K).to(tl.float32)
    left, right, safe = chunk_factors(
        log_decay, load_rows(decay, token + ahead, after, key, K).to(tl.float32)
    )
    strict = row[:, None] > row[None, :]
    f, g = tl.where(strict, f, 0.0), tl.where(strict, g, 0.0)
    dq = tl.zeros((C, BK), tl.float32)
    da = tl.zeros((C, BK), tl.float32)
    dz = tl.zeros((C, BK), tl.float32)
    if safe:
        x = (z_c * right).to(f.dtype)
        dq = tl.dot(f, x, input_precision=PRECISION) * left
        da = tl.dot(g, x, input_precision=PRECISION) * left
        dz = tl.dot(tl.trans(f), (q_c * left).to(f.dtype), input_precision=PRECISION)
        dz = tl.dot(tl.trans(g), (a_c * left).to(f.dtype), dz, input_precision=PRECISION) * right
    else:
        sums = tl.zeros((C, BK), tl.float32)  # from behind token j through each row
        for back in range(C):
            place = row == C - 1 - back
            decays = tl.exp(tl.where((row > C - 1 - back)[:, None], sums, float("-inf")))
            z_j = row_of(z_c, place)[None, :]
            f_j = tl.sum(tl.where(place[None, :], f.to(tl.float32), 0.0), 1)[:, None] * decays
            g_j = tl.sum(tl.where(place[None, :], g.to(tl.float32), 0.0), 1)[:, None] * decays
            dq += f_j * z_j
            da += g_j * z_j
            dz += tl.where(place[:, None], tl.sum(f_j * q_c + g_j * a_c, 0)[None, :], 0.0)
            sums += tl.where((row >= C - 1 - back)[:, None], row_of(log_decay, place)[None, :], 0.0)
    return dq, da, dz


@triton.jit
def _diagonal(x, C: tl.constexpr):
    """Return the diagonal of ``x (C, C)`` in float32 as a column ``(C, 1)``."""
    row = tl.arange(0, C)
    return tl.sum(tl.where(row[:, None] == row[None, :], x.to(tl.float32), 0.0), 1)[:, None]


@triton.jit
def _of_writer(
    q_c, a_c, dq, da, rows, columns, writer, values, dwriter, dstates, decay, f, g, token, live, after,
    ahead, chunk, key, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one writer; add to those of the readers and to what the gradient of the decay
    sums.
    """
    row = tl.arange(0, C)
    at = chunk * (C * C) + row[:, None] * C + row[None, :]
    f, g = tl.load(f + at), tl.load(g + at)
    z_c = load_rows(writer, token, live, key, K).to(tl.float32)
    pair_q, pair_a, dz = _pairs(
        q_c, a_c, z_c, decay, f, g, token, live, after, ahead, key, K, C, BK, PRECISION
    )
    own_f, own_g = _diagonal(f, C), _diagonal(g, C)
    rows += q_c * pair_q + a_c * pair_a - z_c * dz
    dq += pair_q + own_f * z_c
    da += pair_a + own_g * z_c
    dz += own_f * q_c + own_g * a_c
    to_end = tl.zeros((C, BK), tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        d = load_rows(dstates, chunk * K + key, key < K, value, V)
        u = load_rows(values, token, live, value, V).to(dtype)
        to_end = tl.dot(u, tl.trans(d), to_end, input_precision=PRECISION)
    to_end *= tl.exp(
        tl.cumsum(load_rows(decay, token + ahead, after, key, K).to(tl.float32), 0, reverse=True)
    )
    store_rows(dwriter, token, live, key, K, dz + to_end)
    return dq, da, rows, columns + z_c * to_end


@triton.jit
def _of_state(
    states, dstates, do, dretrieved, token, live, after, ahead, chunk, key, scale, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``do' Sᵀ`` and ``w Sᵀ`` of the next token ``(C, BK)``, ``S w`` of the chunk's first token and
    the diagonal of ``S Dᵀ`` ``(BK,)``.
    """
    row = tl.arange(0, C)
    to_q = tl.zeros((C, BK), tl.float32)
    to_a = tl.zeros((C, BK), tl.float32)
    first = tl.zeros((BK,), tl.float32)
    through = tl.zeros((BK,), tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        s = load_rows(states, chunk * K + key, key < K, value, V)
        d = load_rows(dstates, chunk * K + key, key < K, value, V)
        through += tl.sum(s.to(tl.float32) * d.to(tl.float32), 1)
        w = load_rows(dretrieved, token, live & (row == 0), value, V).to(tl.float32)
        first += tl.sum(s.to(tl.float32) * tl.sum(w, 0)[None, :], 1)
        s = tl.trans(s)
        to_q = tl.dot(load_rows(do, token, live, value, V).to(dtype), s, to_q, input_precision=PRECISION)
        w = load_rows(dretrieved, token + ahead, after, value, V).to(dtype)
        to_a = tl.dot(w, s, to_a, input_precision=PRECISION)
    return to_q * scale, to_a, first, through


@triton.jit(do_not_specialize=["step", "H"])
def chunk_gradients(
    q, k, v, a, b, decay, retrieved, do, dretrieved, fb, gb, fk, gk, states, dstates, whole, dq, dk, da, db,
    dg, chunks, scale, step, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``dq``, ``dk``, ``da`` and ``db (B, T, H, K)`` and, unless it is ``None``, ``dg`` float32 of that
    shape.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        v: ``(B, T, H, V)``.
        a: ``(B, T, H, K)``.
        b: ``(B, T, H, K)``.
        decay: ``(B, T, H, K)``.
        retrieved: float32 ``(B, T, H, V)`` of the forward pass.
        do: gradient of o ``(B, T, H, V)``.
        dretrieved: float32 ``(B, T, H, V)``, as `scan_backward` wrote it.
        fb: ``(N, H, C, C)``, as `chunk_products` wrote it.
        gb: likewise.
        fk: likewise.
        gk: likewise.
        states: ``(N, H, K, V)``: state at each chunk's start.
        dstates: ``(N, H, K, V)``: gradient of the state at each chunk's end.
        whole: float32 ``(N, H, K)``, as `chunk_systems` wrote it.
        dq: out.
        dk: out.
        da: out.
        db: out.
        dg: out.
        chunks: int32 ``(N, 4)``, as `ChunkTable` has it.
        scale: factor of o.
        step: 1, or −1 in reverse.
        H: heads.
        K: key size.
        V: value size.
        C: tokens a chunk.
        BK: key channels a program.
        BV: value channels at a time.
        PRECISION: ``input_precision`` of the products.
    """
    dtype: tl.constexpr = k.dtype.element_ty
    tile, place = (
        tl.program_id(0) % tl.cdiv(K, BK),
        tl.program_id(0) // tl.cdiv(K, BK),
    )  # place: chunk and head
    at = chunks + place // H * 4
    position, begin, n = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    chunk = place.to(tl.int64)
    row = tl.arange(0, C)
    live = position + row < n
    after = (position + row + 1 < n) & (row + 1 < C)
    token = (begin + step * (position + row)).to(tl.int64) * H + place % H
    ahead = step * H
    key = tile * BK + tl.arange(0, BK)
    to_q, to_a, first, through = _of_state(
        states, dstates, do, dretrieved, token, live, after, ahead, chunk, key, scale, K, V, C, BK, BV,
        dtype, PRECISION,
    )  # fmt: skip
    store_rows(da, token, live & (row == 0), key, K, tl.where((row == 0)[:, None], first[None, :], 0.0))
    decays = tl.exp(tl.cumsum(load_rows(decay, token, live, key, K).to(tl.float32), 0))
    to_q *= decays
    to_a *= decays
    q_c = load_rows(q, token, live, key, K).to(tl.float32)
    a_c = load_rows(a, token + ahead, after, key, K).to(tl.float32)
    rows, columns = q_c * to_q + a_c * to_a, tl.zeros((C, BK), tl.float32)
    to_q, to_a, rows, columns = _of_writer(
        q_c, a_c, to_q, to_a, rows, columns, b, retrieved, db, dstates, decay, fb, gb, token, live, after,
        ahead, chunk, key, K, V, C, BK, BV, dtype, PRECISION,
    )  # fmt: skip
    to_q, to_a, rows, columns = _of_writer(
        q_c, a_c, to_q, to_a, rows, columns, k, v, dk, dstates, decay, fk, gk, token, live, after, ahead,
        chunk, key, K, V, C, BK, BV, dtype, PRECISION,
    )  # fmt: skip
    store_rows(dq, token, live, key, K, to_q)
    store_rows(da, token + ahead, after, key, K, to_a)
    if dg is not None:
        # Sums of what lies before, by a product: taking a token off its running sum would cost the digits.
        before = tl.where(row[:, None] > row[None, :], 1.0, 0.0)
        through *= tl.load(whole + chunk * K + key, mask=key < K, other=0.0)
        rows = tl.cumsum(rows, 0, reverse=True) + through[None, :]
        rows = tl.dot(before, columns, rows, input_precision="tf32x3")
        log_decay = load_rows(decay, token, live, key, K).to(tl.float32)
        store_rows(dg, token, live, key, K, tl.where(tl.exp(log_decay) == 0.0, 0.0, rows))
