"""Triton kernels of `linear_recurrence` that walk along a sequence with a tile of its state in registers.

A walk covers a whole sequence, or a segment of one where the sequences alone would not fill the chip: then
`walk_states` first finds what every segment adds to the state, and `join_segments` the state before each.

Letters: C = 64 tokens a chunk, K and V head sizes, BK and BV tiles of them, N chunks of all sequences.
``DECAY`` is ``"none"``, ``"head"`` (g (H,)), ``"token"`` (g (tokens, H)), or ``"channel"``, where the decays
are already in the operands (`triton_channel.py`).
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from ..triton_blocks import (
    base2,
    decay_sums,
    element_of,
    load_matrix,
    load_rows,
    pair_decay,
    rows,
    store_matrix,
    store_rows,
)

C = tl.constexpr(64)


@triton.jit
def log_decay(g, token, valid, head, H, DECAY: tl.constexpr):
    """Return the base-2 log-decays (C,) of these tokens, zero beyond the walk."""
    if DECAY == "head":
        return tl.where(valid, base2(tl.load(g + head)), 0.0)
    return base2(tl.load(g + token * H + head, mask=valid, other=0.0))


@triton.jit
def _span(sequences, segments, index, length, SPLIT: tl.constexpr):
    """Return start of the walk, first position and end of part ``index`` of it, and its first chunk."""
    sequence, begin = index, 0
    if SPLIT:
        sequence = tl.load(segments + 4 * index)
        begin = tl.load(segments + 4 * index + 1)
    start = tl.load(sequences + 4 * sequence)
    end = tl.load(sequences + 4 * sequence + 1)
    chunk = tl.load(sequences + 4 * sequence + 2) + begin // C
    if SPLIT:
        end = tl.minimum(end, begin + length)
    return start, begin, end, chunk


@triton.jit(do_not_specialize=("length",))
def walk_outputs(
    q,  # (tokens, H, K)
    k,
    v,  # (tokens, H, V)
    g,
    scores,  # (tokens, H, C), with "channel"
    whole,  # (N, H, K), with "channel"
    o,  # (tokens, H, V)
    initial,  # (sequences or segments, H, K, V), or None
    final,  # (sequences, H, K, V), or None with SPLIT
    sequences,
    segments,
    length,  # tokens a segment
    scale,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # ≥ K
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs and final state in one launch, chunk by chunk: ``o = tril(q kᵀ ∘ decay) v + (q ∘ start) S``."""
    EXACT: tl.constexpr = tl.float32 == OPERAND
    program = tl.program_id(0)
    tiles: tl.constexpr = (V + BV - 1) // BV
    column = program % tiles * BV
    head = program // tiles % H
    index = program // tiles // H
    start, begin, end, chunk = _span(sequences, segments, index, length, SPLIT)
    t = tl.arange(0, C)
    if initial is None:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_matrix(initial, index * H + head, 0, column, K, V, BK, BV).to(tl.float32)
    for p in range(begin, end, C):
        token, valid = rows(start, p + t, end, STEP)
        q_c = load_rows(q, token, valid, head, H, 0, K, BK).to(OPERAND)
        k_c = load_rows(k, token, valid, head, H, 0, K, BK).to(OPERAND)
        v_c = load_rows(v, token, valid, head, H, column, V, BV).to(OPERAND)
        o_c = tl.dot(q_c, state.to(OPERAND), input_precision=PRECISION)
        if DECAY == "channel":
            pairs = load_rows(scores, token, valid, head, H, 0, C, C)
            row = tl.arange(0, BK)
            at = whole + (chunk.to(tl.int64) * H + head) * K + row
            state *= tl.load(at, mask=row < K, other=0.0)[:, None]
            chunk += 1
        else:
            pairs = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
            if DECAY == "none":
                pairs = tl.where(t[:, None] >= t[None, :], pairs, 0.0)
            else:
                coarse, fine = decay_sums(log_decay(g, token, valid, head, H, DECAY), EXACT)
                last, rest = element_of(coarse, C - 1, C), element_of(fine, C - 1, C)
                pairs *= pair_decay(coarse, fine, C, False, EXACT)
                o_c *= tl.exp2(coarse + fine)[:, None]
                state *= tl.exp2(last + rest)
        o_c = tl.dot(pairs.to(OPERAND), v_c, o_c, input_precision=PRECISION)
        if DECAY == "head" or DECAY == "token":
            # The decay to the chunk's end goes to v: k, the larger, stays as it was loaded.
            v_c = (v_c * tl.exp2((last - coarse) + (rest - fine))[:, None]).to(OPERAND)
        state = tl.dot(tl.trans(k_c), v_c, state, input_precision=PRECISION)
        store_rows(o, o_c * scale, token, valid, head, H, column, V, BV)
    if final is not None:
        store_matrix(final, state, index * H + head, 0, column, K, V, BK, BV)


@triton.jit
def _walk_state(
    x,
    y,
    g,
    whole,
    initial,
    states,
    final,
    total,
    sequences,
    segments,
    length,
    scale,
    H,
    program,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run ``S ← whole ∘ S + scale · xᵀ y`` over the chunks; keep the S before each, and the last."""
    EXACT: tl.constexpr = tl.float32 == OPERAND
    row_tiles: tl.constexpr = (K + BK - 1) // BK
    tiles: tl.constexpr = (V + BV - 1) // BV * row_tiles
    row = program % row_tiles * BK
    column = program % tiles // row_tiles * BV
    head = program // tiles % H
    index = program // tiles // H
    start, begin, end, chunk = _span(sequences, segments, index, length, SPLIT)
    if initial is None:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_matrix(initial, index * H + head, row, column, K, V, BK, BV).to(tl.float32)
    t = tl.arange(0, C)
    at = row + tl.arange(0, BK)
    product = tl.full((BK,), 1.0, tl.float32) if DECAY == "channel" else 1.0
    count = (end - begin + C - 1) // C
    for i in range(count):
        c = i
        if BACKWARD:
            c = count - 1 - i
        token, valid = rows(start, begin + c * C + t, end, STEP)
        x_c = load_rows(x, token, valid, head, H, row, K, BK).to(OPERAND)
        y_c = load_rows(y, token, valid, head, H, column, V, BV).to(OPERAND)
        here = (chunk + c) * H + head
        if states is not None:
            store_matrix(states, state, here, row, column, K, V, BK, BV)
        if DECAY == "channel":
            through = tl.load(whole + here.to(tl.int64) * K + at, mask=at < K, other=0.0)
            state *= through[:, None]
            product *= through
        elif DECAY != "none":
            coarse, fine = decay_sums(log_decay(g, token, valid, head, H, DECAY), EXACT)
            last, rest = element_of(coarse, C - 1, C), element_of(fine, C - 1, C)
            sums = coarse + fine if BACKWARD else (last - coarse) + (rest - fine)
            y_c = (y_c * tl.exp2(sums)[:, None]).to(OPERAND)
            state *= tl.exp2(last + rest)
            product *= tl.exp2(last + rest)
        if BACKWARD:
            state += scale * tl.dot(tl.trans(x_c), y_c, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(x_c), y_c, state, input_precision=PRECISION)
    if final is not None:
        store_matrix(final, state, index * H + head, row, column, K, V, BK, BV)
    if total is not None:
        if DECAY == "channel":
            if column == 0:
                tl.store(total + (index * H + head).to(tl.int64) * K + at, product, mask=at < K)
        elif DECAY != "none" and row + column == 0:
            tl.store(total + index * H + head, product)


@triton.jit(do_not_specialize=("length",))
def walk_states(
    k,  # (tokens, H, K)
    v,  # (tokens, H, V)
    q,  # (tokens, H, K), or None: states alone
    do,  # (tokens, H, V)
    g,
    whole,  # (N, H, K), with "channel"
    initial,  # (sequences or segments, H, K, V), or None
    dfinal,
    states,  # (N, H, K, V), or None
    dstates,
    final,  # (sequences or segments, H, K, V), or None
    dinitial,
    total,  # (segments, H) or (segments, H, K): decay of a segment, or None
    sequences,
    segments,
    length,
    scale,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each chunk, walking forwards; its gradient behind each, walking backwards, at once.

    Neither needs the other, so every other program takes one: twice the programs and half the launches.
    """
    program = tl.program_id(0)
    if q is None:
        _walk_state(
            k, v, g, whole, initial, states, final, total, sequences, segments, length, 1.0, H, program,
            K, V, BK, BV, DECAY, STEP, SPLIT, False, OPERAND, PRECISION,
        )  # fmt: skip
    elif program % 2 == 0:
        _walk_state(
            k, v, g, whole, initial, states, final, total, sequences, segments, length, 1.0, H, program // 2,
            K, V, BK, BV, DECAY, STEP, SPLIT, False, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        _walk_state(
            q, do, g, whole, dfinal, dstates, dinitial, None, sequences, segments, length, scale, H,
            program // 2, K, V, BK, BV, DECAY, STEP, SPLIT, True, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def _join(
    parts,
    total,
    initial,
    final,
    sequences,
    H,
    program,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    row_tiles: tl.constexpr = (K + BK - 1) // BK
    tiles: tl.constexpr = (V + BV - 1) // BV * row_tiles
    row = program % row_tiles * BK
    column = program % tiles // row_tiles * BV
    head = program // tiles % H
    sequence = program // tiles // H
    first = tl.load(sequences + 4 * sequence + 2)
    count = tl.load(sequences + 4 * sequence + 3)
    if initial is None:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_matrix(initial, sequence * H + head, row, column, K, V, BK, BV).to(tl.float32)
    at = row + tl.arange(0, BK)
    for i in range(count):
        index = first + i
        if BACKWARD:
            index = first + count - 1 - i
        here = index * H + head
        part = load_matrix(parts, here, row, column, K, V, BK, BV)
        store_matrix(parts, state, here, row, column, K, V, BK, BV)
        if DECAY == "channel":
            state *= tl.load(total + here.to(tl.int64) * K + at, mask=at < K, other=0.0)[:, None]
        elif DECAY != "none":
            state *= tl.load(total + here)
        state += part
    if final is not None:
        store_matrix(final, state, sequence * H + head, row, column, K, V, BK, BV)


@triton.jit
def join_segments(
    parts,  # (segments, H, K, V): in, what a segment adds; out, the state before it
    dparts,  # the same of the gradient, or None
    total,
    initial,  # (sequences, H, K, V), or None
    dfinal,
    final,  # (sequences, H, K, V), or None
    dinitial,
    sequences,  # their segments
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
):
    """Turn what every segment adds to the state into the state before it, and likewise the gradient's."""
    program = tl.program_id(0)
    if dparts is None:
        _join(parts, total, initial, final, sequences, H, program, K, V, BK, BV, DECAY, False)
    elif program % 2 == 0:
        _join(parts, total, initial, final, sequences, H, program // 2, K, V, BK, BV, DECAY, False)
    else:
        _join(dparts, total, dfinal, dinitial, sequences, H, program // 2, K, V, BK, BV, DECAY, True)
