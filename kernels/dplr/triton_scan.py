"""Generalised delta rule in Triton, the part that is sequential: the state, from chunk to chunk.

One program a sequence, head and tile of value channels, which never meet. With what `chunk_systems` made, a
chunk that starts from state S is

    r = (I − AB)⁻¹ (a_start S + AK v),   o = scale · q_start S + QB r + QK v,
    S ← Diag(whole) S + b_endᵀ r + k_endᵀ v

and, going backwards with D the gradient of the state at the chunk's end and w that of r,

    w = (I − AB)⁻ᵀ (QBᵀ do + b_end D),   dv = QKᵀ do + AKᵀ w + k_end D,
    D ← Diag(whole) D + scale · q_startᵀ do + a_startᵀ w.

Shapes: B batch, T tokens, H heads, K and V key and value sizes, C tokens a chunk, N chunks of all S
sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

import triton
import triton.language as tl

from ..delta.triton_systems import load_rows, store_rows


@triton.jit
def _load_keys(x, token, live, key, K: tl.constexpr):
    """Load the rows ``token (C,)`` of ``x (…, K)``, channels ``key (G, D)`` in groups: ``(G, C, D)``."""
    mask = live[None, :, None] & (key < K)[:, None, :]
    return tl.load(x + token[None, :, None] * K + key[:, None, :], mask=mask, other=0.0)


@triton.jit
def _state_at(x, place, key, value, K: tl.constexpr, V: tl.constexpr):
    """Return pointers and mask of a tile ``(G, D, BV)`` of the matrix ``place`` of ``x (…, K, V)``."""
    at = x + (place.to(tl.int64) * K + key)[:, :, None] * V + value[None, None, :]
    return at, (key < K)[:, :, None] & (value < V)[None, None, :]


@triton.jit
def _load_state(x, place, key, value, K: tl.constexpr, V: tl.constexpr):
    at, mask = _state_at(x, place, key, value, K, V)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_state(x, place, key, value, state, K: tl.constexpr, V: tl.constexpr):
    at, mask = _state_at(x, place, key, value, K, V)
    tl.store(at, state.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _decayed(state, whole, chunk, key, K: tl.constexpr):
    """Decay ``state (G, D, BV)`` by a whole chunk."""
    return state * tl.load(whole + chunk * K + key, mask=key < K, other=0.0)[:, :, None]


@triton.jit
def _read(x, state, PRECISION: tl.constexpr):
    """Read ``state (G, D, BV)`` by ``x (G, C, D)``: ``(C, BV)``."""
    return tl.sum(tl.dot(x, state.to(x.dtype), input_precision=PRECISION), 0)


@triton.jit
def _written(state, x, u, PRECISION: tl.constexpr):
    """Add ``xᵀ u`` of ``x (G, C, D)`` and ``u (C, BV)`` to ``state (G, D, BV)``."""
    u = tl.broadcast_to(u.to(x.dtype)[None, :, :], (x.shape[0], u.shape[0], u.shape[1]))
    return tl.dot(tl.trans(x, 0, 2, 1), u, state, input_precision=PRECISION)


@triton.jit(do_not_specialize=["step", "H"])
def scan_forward(
    q_start, a_start, b_end, k_end, v, inverse, taken, scores_b, scores_k, whole, initial, o, retrieved,
    final, sequences, scale, step, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``o (B, T, H, V)``, ``retrieved`` float32 of that shape and ``final`` float32 ``(S, H, K, V)``.

    Args:
        q_start: ``(B, T, H, K)``, as `chunk_systems` wrote it.
        a_start: likewise.
        b_end: likewise.
        k_end: likewise.
        v: ``(B, T, H, V)``.
        inverse: ``(N, H, C, C)``, as `chunk_systems` wrote it.
        taken: likewise.
        scores_b: likewise.
        scores_k: likewise.
        whole: float32 ``(N, H, K)``.
        initial: ``(S, H, K, V)``, or ``None`` for zeros.
        o: out.
        retrieved: out.
        final: out.
        sequences: int32 ``(S, 4)``, as `ChunkTable` has it.
        scale: factor of o, already in the scores.
        step: 1, or −1 in reverse.
        H: heads.
        K: key size.
        V: value size.
        C: tokens a chunk.
        BK: K rounded up to a power of two.
        D: key channels of a product. The groups of so many lie on different warps, so that none holds a whole
        row. BV: value channels a program. PRECISION: ``input_precision`` of the products.
    """
    tile = tl.program_id(0) % tl.cdiv(V, BV)
    place = tl.program_id(0) // tl.cdiv(V, BV)  # sequence and head
    head, sequence = place % H, place // H
    begin, n = tl.load(sequences + sequence * 4), tl.load(sequences + sequence * 4 + 1)
    first, count = tl.load(sequences + sequence * 4 + 2), tl.load(sequences + sequence * 4 + 3)
    row, value = tl.arange(0, C), tile * BV + tl.arange(0, BV)
    key = tl.arange(0, BK // D)[:, None] * D + tl.arange(0, D)[None, :]
    state = tl.zeros((BK // D, D, BV), tl.float32)
    if initial is not None:
        state = _load_state(initial, place, key, value, K, V)
    for i in range(count):
        position = i * C + row
        live = position < n
        token = (begin + step * position).to(tl.int64) * H + head
        chunk = (first + i).to(tl.int64) * H + head
        square = chunk * (C * C) + row[:, None] * C + row[None, :]
        x = _load_keys(a_start, token, live, key, K)
        r = _read(x, state, PRECISION)
        x = _load_keys(q_start, token, live, key, K)
        read = _read(x, state, PRECISION) * scale
        v_c = load_rows(v, token, live, value, V).to(x.dtype)
        r = tl.dot(tl.load(taken + square), v_c, r, input_precision=PRECISION)
        r = tl.dot(tl.load(inverse + square), r.to(x.dtype), input_precision=PRECISION)
        store_rows(retrieved, token, live, value, V, r)
        read = tl.dot(tl.load(scores_k + square), v_c, read, input_precision=PRECISION)
        read = tl.dot(tl.load(scores_b + square), r.to(x.dtype), read, input_precision=PRECISION)
        store_rows(o, token, live, value, V, read)
        state = _decayed(state, whole, chunk, key, K)
        x = _load_keys(k_end, token, live, key, K)
        state = _written(state, x, v_c, PRECISION)
        x = _load_keys(b_end, token, live, key, K)
        state = _written(state, x, r, PRECISION)
    _store_state(final, place, key, value, state, K, V)


@triton.jit
def _replay_states(
    b_end, k_end, v, retrieved, whole, initial, states, begin, n, first, count, tile, head, place, step, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, value = tl.arange(0, C), tile * BV + tl.arange(0, BV)
    key = tl.arange(0, BK // D)[:, None] * D + tl.arange(0, D)[None, :]
    state = tl.zeros((BK // D, D, BV), tl.float32)
    if initial is not None:
        state = _load_state(initial, place, key, value, K, V)
    for i in range(count):
        position = i * C + row
        live = position < n
        token = (begin + step * position).to(tl.int64) * H + head
        chunk = (first + i).to(tl.int64) * H + head
        _store_state(states, chunk, key, value, state, K, V)
        state = _decayed(state, whole, chunk, key, K)
        x = _load_keys(k_end, token, live, key, K)
        state = _written(state, x, load_rows(v, token, live, value, V), PRECISION)
        x = _load_keys(b_end, token, live, key, K)
        state = _written(state, x, load_rows(retrieved, token, live, value, V), PRECISION)


@triton.jit
def _scan_gradients(
    q_start, a_start, b_end, k_end, do, inverse, taken, scores_b, scores_k, whole, dstate, dstates, dv,
    dretrieved, dinitial, begin, n, first, count, tile, head, place, scale, step, H, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, value = tl.arange(0, C), tile * BV + tl.arange(0, BV)
    key = tl.arange(0, BK // D)[:, None] * D + tl.arange(0, D)[None, :]
    d = _load_state(dstate, place, key, value, K, V)
    for back in range(count):
        i = count - 1 - back
        position = i * C + row
        live = position < n
        token = (begin + step * position).to(tl.int64) * H + head
        chunk = (first + i).to(tl.int64) * H + head
        square = chunk * (C * C) + row[:, None] * C + row[None, :]
        _store_state(dstates, chunk, key, value, d, K, V)
        x = _load_keys(b_end, token, live, key, K)
        do_c = load_rows(do, token, live, value, V).to(x.dtype)
        w = _read(x, d, PRECISION)
        w = tl.dot(tl.trans(tl.load(scores_b + square)), do_c, w, input_precision=PRECISION)
        w = tl.dot(tl.trans(tl.load(inverse + square)), w.to(x.dtype), input_precision=PRECISION)
        store_rows(dretrieved, token, live, value, V, w)
        x = _load_keys(k_end, token, live, key, K)
        u = _read(x, d, PRECISION)
        u = tl.dot(tl.trans(tl.load(scores_k + square)), do_c, u, input_precision=PRECISION)
        u = tl.dot(tl.trans(tl.load(taken + square)), w.to(x.dtype), u, input_precision=PRECISION)
        store_rows(dv, token, live, value, V, u)
        d = _decayed(d, whole, chunk, key, K)
        x = _load_keys(q_start, token, live, key, K)
        d = _written(d, x, scale * do_c.to(tl.float32), PRECISION)
        x = _load_keys(a_start, token, live, key, K)
        d = _written(d, x, w, PRECISION)
    if dinitial is not None:
        _store_state(dinitial, place, key, value, d, K, V)


@triton.jit(do_not_specialize=["step", "H"])
def scan_backward(
    q_start, a_start, b_end, k_end, v, retrieved, do, inverse, taken, scores_b, scores_k, whole, initial,
    dstate, states, dstates, dv, dretrieved, dinitial, sequences, scale, step, H, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write every chunk's first state and last state's gradient, and the gradients of v, r and the initial
    state.

    Both scans are one launch: of two neighbouring programs one goes forwards and one backwards.

    Args:
        retrieved: float32 ``(B, T, H, V)`` of the forward pass.
        do: gradient of o ``(B, T, H, V)``.
        dstate: gradient of the final state ``(S, H, K, V)``.
        states: out ``(N, H, K, V)``: state at each chunk's start.
        dstates: out ``(N, H, K, V)``: gradient of the state at each chunk's end.
        dv: out ``(B, T, H, V)``.
        dretrieved: out float32 ``(B, T, H, V)``.
        dinitial: out ``(S, H, K, V)``, or ``None``.

    The other arguments are those of `scan_forward`.
    """
    program = tl.program_id(0) // 2
    tile, place = program % tl.cdiv(V, BV), program // tl.cdiv(V, BV)
    head, sequence = place % H, place // H
    begin, n = tl.load(sequences + sequence * 4), tl.load(sequences + sequence * 4 + 1)
    first, count = tl.load(sequences + sequence * 4 + 2), tl.load(sequences + sequence * 4 + 3)
    if tl.program_id(0) % 2 == 0:
        _scan_gradients(
            q_start, a_start, b_end, k_end, do, inverse, taken, scores_b, scores_k, whole, dstate, dstates,
            dv, dretrieved, dinitial, begin, n, first, count, tile, head, place, scale, step, H, K, V, C, BK,
            D, BV, PRECISION,
        )  # fmt: skip
    else:
        _replay_states(
            b_end, k_end, v, retrieved, whole, initial, states, begin, n, first, count, tile, head, place,
            step, H, K, V, C, BK, D, BV, PRECISION,
        )  # fmt: skip
