"""Delta rule in Triton, the part that is sequential: the state, from chunk to chunk.

One program a sequence, head and tile of value channels, which never meet. With the inverse A of ``I + M
Diag(β)`` and the scores P that `chunk_systems` made, a chunk that starts from state S is

    e = A (v − k_start S),   u = β e,   o = scale · q_start S + P u,   S ← Diag(whole) S + k_endᵀ u

and, going backwards with D the gradient of the state at the chunk's end,

    du = Pᵀ do + k_end D,   de = Aᵀ (β du) = dv,   D ← Diag(whole) D + scale · q_startᵀ do − k_startᵀ de.

Shapes: B batch, T tokens, H heads, K and V key and value sizes, C tokens a chunk, N chunks of all S
sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_systems import CHANNEL, HEAD, load_rows, store_rows


@triton.jit
def _decay_state(state, start, whole, chunk, key, K: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr):
    """Decay ``state (BK, BV)`` by a whole chunk."""
    if DECAY == HEAD:
        state *= tl.load(start + chunk * C + C - 1)
    if DECAY == CHANNEL:
        state *= tl.load(whole + chunk * K + key, mask=key < K, other=0.0)[:, None]
    return state


@triton.jit(do_not_specialize=["step", "H"])
def scan_forward(
    q_start, k_start, k_end, v, beta, inverse, scores, start, end, whole, initial, o, error, final, sequences,
    scale, step, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``o (B, T, H, V)``, ``error`` float32 of that shape and ``final`` float32 ``(S, H, K, V)``.

    Args:
        q_start: ``(B, T, H, K)``: q, decayed from the chunk's start where every channel decays on its own.
        k_start: likewise.
        k_end: ``(B, T, H, K)``: k, likewise decayed to the chunk's end.
        v: ``(B, T, H, V)``.
        beta: ``(B, T, H)``.
        inverse: ``(N, H, C, C)``.
        scores: ``(N, H, C, C)``.
        start: float32 ``(N, H, C)``, with one decay a head.
        end: float32 ``(N, H, C)``, with one decay a head.
        whole: float32 ``(N, H, K)``, with a decay a channel.
        initial: ``(S, H, K, V)``, or ``None`` for zeros.
        o: out.
        error: out.
        final: out.
        sequences: int32 ``(S, 4)``, as `ChunkTable` has it.
        scale: factor of o, already in ``scores``.
        step: 1, or −1 in reverse.
        H: heads.
        K: key size.
        V: value size.
        C: tokens a chunk.
        BK: K rounded up to a power of two.
        BV: value channels a program.
        DECAY: NONE, HEAD or CHANNEL.
        PRECISION: ``input_precision`` of the products.
    """
    tile = tl.program_id(0) % tl.cdiv(V, BV)
    place = tl.program_id(0) // tl.cdiv(V, BV)  # sequence and head
    head, sequence = place % H, place // H
    begin, n = tl.load(sequences + sequence * 4), tl.load(sequences + sequence * 4 + 1)
    first, count = tl.load(sequences + sequence * 4 + 2), tl.load(sequences + sequence * 4 + 3)
    row, key, value = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    keys = place.to(tl.int64) * K + key
    state = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        state = load_rows(initial, keys, key < K, value, V).to(tl.float32)
    for i in range(count):
        position = i * C + row
        live = position < n
        token = (begin + step * position).to(tl.int64) * H + head
        chunk = (first + i).to(tl.int64) * H + head
        square = chunk * (C * C) + row[:, None] * C + row[None, :]
        k_c = load_rows(k_start, token, live, key, K)
        q_c = load_rows(q_start, token, live, key, K)
        held = state.to(k_c.dtype)
        known = tl.dot(k_c, held, input_precision=PRECISION)
        read = tl.dot(q_c, held, input_precision=PRECISION) * scale
        if DECAY == HEAD:
            from_start = tl.load(start + chunk * C + row)[:, None]
            known *= from_start
            read *= from_start
        e = load_rows(v, token, live, value, V).to(tl.float32) - known
        e = tl.dot(tl.load(inverse + square), e.to(k_c.dtype), input_precision=PRECISION)
        store_rows(error, token, live, value, V, e)
        u = e * tl.load(beta + token, mask=live, other=0.0).to(tl.float32)[:, None]
        read = tl.dot(tl.load(scores + square), u.to(k_c.dtype), read, input_precision=PRECISION)
        store_rows(o, token, live, value, V, read)
        if DECAY == HEAD:
            u *= tl.load(end + chunk * C + row)[:, None]
        if DECAY == CHANNEL:
            k_c = load_rows(k_end, token, live, key, K)
        state = _decay_state(state, start, whole, chunk, key, K, C, DECAY)
        state = tl.dot(tl.trans(k_c), u.to(k_c.dtype), state, input_precision=PRECISION)
    store_rows(final, keys, key < K, value, V, state)


@triton.jit
def _replay_states(
    k_end, beta, error, start, end, whole, initial, states, begin, n, first, count, tile, head, place, step,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, key, value = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        state = load_rows(initial, place.to(tl.int64) * K + key, key < K, value, V).to(tl.float32)
    for i in range(count):
        position = i * C + row
        live = position < n
        token = (begin + step * position).to(tl.int64) * H + head
        chunk = (first + i).to(tl.int64) * H + head
        store_rows(states, chunk * K + key, key < K, value, V, state)
        k_c = load_rows(k_end, token, live, key, K)
        weight = tl.load(beta + token, mask=live, other=0.0).to(tl.float32)
        if DECAY == HEAD:
            weight *= tl.load(end + chunk * C + row)
        u = load_rows(error, token, live, value, V) * weight[:, None]
        state = _decay_state(state, start, whole, chunk, key, K, C, DECAY)
        state = tl.dot(tl.trans(k_c), u.to(k_c.dtype), state, input_precision=PRECISION)


@triton.jit
def _scan_gradients(
    q_start, k_start, k_end, beta, do, inverse, scores, start, end, whole, dstate, dstates, dv, dinitial,
    begin, n, first, count, tile, head, place, scale, step, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, key, value = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    keys = place.to(tl.int64) * K + key
    d = load_rows(dstate, keys, key < K, value, V).to(tl.float32)
    for back in range(count):
        i = count - 1 - back
        position = i * C + row
        live = position < n
        token = (begin + step * position).to(tl.int64) * H + head
        chunk = (first + i).to(tl.int64) * H + head
        square = chunk * (C * C) + row[:, None] * C + row[None, :]
        store_rows(dstates, chunk * K + key, key < K, value, V, d)
        k_c = load_rows(k_end, token, live, key, K)
        do_c = load_rows(do, token, live, value, V)
        du = tl.dot(k_c, d.to(k_c.dtype), input_precision=PRECISION)
        if DECAY == HEAD:
            du *= tl.load(end + chunk * C + row)[:, None]
        du = tl.dot(tl.trans(tl.load(scores + square)), do_c.to(k_c.dtype), du, input_precision=PRECISION)
        du *= tl.load(beta + token, mask=live, other=0.0).to(tl.float32)[:, None]
        de = tl.dot(tl.trans(tl.load(inverse + square)), du.to(k_c.dtype), input_precision=PRECISION)
        store_rows(dv, token, live, value, V, de)
        from_start = scale * do_c.to(tl.float32)
        if DECAY == HEAD:
            decays = tl.load(start + chunk * C + row)[:, None]
            from_start *= decays
            de *= decays
        if DECAY == CHANNEL:
            k_c = load_rows(k_start, token, live, key, K)
        q_c = load_rows(q_start, token, live, key, K)
        d = _decay_state(d, start, whole, chunk, key, K, C, DECAY)
        d = tl.dot(tl.trans(q_c), from_start.to(k_c.dtype), d, input_precision=PRECISION)
        d = tl.dot(tl.trans(k_c), (-de).to(k_c.dtype), d, input_precision=PRECISION)
    if dinitial is not None:
        store_rows(dinitial, keys, key < K, value, V, d)


@triton.jit(do_not_specialize=["step", "H"])
def scan_backward(
    q_start, k_start, k_end, beta, error, do, inverse, scores, start, end, whole, initial, dstate, states,
    dstates, dv, dinitial, sequences, scale, step, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the states at the chunks' starts, the gradients of those at their ends, and the scan's gradients.

    Both scans are one launch: of two neighbouring programs one goes forwards and one backwards.

    Args:
        error: float32 ``(B, T, H, V)`` of the forward pass.
        do: gradient of o ``(B, T, H, V)``.
        dstate: gradient of the final state ``(S, H, K, V)``.
        states: out ``(N, H, K, V)``: state at each chunk's start.
        dstates: out ``(N, H, K, V)``: gradient of the state at each chunk's end.
        dv: out ``(B, T, H, V)``.
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
            q_start, k_start, k_end, beta, do, inverse, scores, start, end, whole, dstate, dstates, dv,
            dinitial, begin, n, first, count, tile, head, place, scale, step, H, K, V, C, BK, BV, DECAY,
            PRECISION,
        )  # fmt: skip
    else:
        _replay_states(
            k_end, beta, error, start, end, whole, initial, states, begin, n, first, count, tile, head,
            place, step, H, K, V, C, BK, BV, DECAY, PRECISION,
        )  # fmt: skip
