"""Triton code of `linear_recurrence` for a decay of every key channel.

The scores of a chunk, ``A_ij = Σ_k q_ik k_jk exp2(l_{j+1} + … + l_i)_k`` for i ≥ j, are no product of two
matrices with a decay of each pair between them. Two ways make them one (Yang et al., arXiv:2312.06635, §4):

- While a tile of channels decays by less than 2^−`LIMIT` over the whole chunk, q and k take the decay to and
  from its middle: one product, and every kept term stays within range.
- Otherwise the chunk falls into blocks of 16. Pairs from two blocks meet at the start of the later one, so
  that both factors are at most 1. Pairs within a block are summed one by one, at distances 0 … 15, along
  shifted rows, with the decay between them as a sum of only its own terms: exact for any decay, −inf too.

The tile decides at run time, and both ways leave the same numbers behind.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from ..triton_blocks import base2, decay_sums, load_rows, row_of, rows, store_rows

C = tl.constexpr(64)
BLOCK = tl.constexpr(16)
LIMIT = tl.constexpr(-128.0)


@triton.jit
def _block_factors(coarse, fine, block):
    """Decays from the start of a block to its rows, and to it from every token before; elsewhere zero."""
    t = tl.arange(0, C)
    edge, rest = row_of(coarse, block * BLOCK - 1, C), row_of(fine, block * BLOCK - 1, C)
    sums = (coarse - edge[None, :]) + (fine - rest[None, :])
    inside = (t // BLOCK == block)[:, None]
    before = (t < block * BLOCK)[:, None]
    return tl.exp2(tl.where(inside, sums, float("-inf"))), tl.exp2(tl.where(before, -sums, float("-inf")))


@triton.jit
def _middle_factors(coarse, fine):
    """Decays from the middle of the chunk's decay to every token and back, each within 2^±64."""
    # A multiple of 1/256, like the sums: the difference is exact.
    middle = tl.floor(row_of(coarse, C - 1, C) * 0.5)[None, :]
    return tl.exp2((coarse - middle) + fine), tl.exp2((middle - coarse) - fine)


@triton.jit
def _scores(
    q_c, k_c, k, g, coarse, fine, start, first, n, head, H, column,
    K: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (C, C) of one tile of channels; above the diagonal they mean nothing."""
    t = tl.arange(0, C)
    if tl.min(row_of(coarse, C - 1, C), 0) >= LIMIT:
        down, up = _middle_factors(coarse, fine)
        x, y = (q_c * down).to(OPERAND), (k_c * up).to(OPERAND)
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        scores = tl.zeros((C, C), tl.float32)
        for block in range(1, C // BLOCK):
            to, back = _block_factors(coarse, fine, block)
            x, y = (q_c * to).to(OPERAND), (k_c * back).to(OPERAND)
            scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
        inside = first + t < n
        sums = tl.zeros((C, BK), tl.float32)
        for distance in range(BLOCK):
            # Each row beside the one `distance` before it, and the decay between the two.
            token, valid = rows(start, first + t - distance, n, STEP)
            valid = valid & inside & (t % BLOCK >= distance)
            if distance > 0:
                after, _ = rows(start, first + t - distance + 1, n, STEP)
                sums += base2(load_rows(g, after, valid, head, H, column, K, BK))
            other = load_rows(k, token, valid, head, H, column, K, BK).to(tl.float32)
            pairs = tl.sum(q_c * other * tl.exp2(sums), 1)
            scores += tl.where(t[None, :] == (t - distance)[:, None], pairs[:, None], 0.0)
    return scores


@triton.jit
def channel_scores(
    q,  # (tokens, H, K)
    k,
    g,
    v,  # (tokens, H, V), or None: no gradients
    do,
    queries,  # (tokens, H, K): q decayed from the chunk's start
    keys,  # (tokens, H, K): k decayed to the chunk's end
    scores,  # (tokens, H, C): row i, column the position j in the chunk of i
    dscores,  # (tokens, H, C): gradient of the scores, zero where i < j
    whole,  # (N, H, K): decay of the chunk
    chunks,
    scale,
    H,
    K_end,  # K and V once more: the compiler keeps a loop, and its pipeline, where it cannot count the turns
    V_end,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Put the decays of a chunk into its queries, keys and scores, once for every kernel that follows.

    For gradients also write ``scale · do vᵀ``.
    """
    EXACT: tl.constexpr = tl.float32 == OPERAND
    program = tl.program_id(0)
    head = program % H
    chunk = program // H
    first = tl.load(chunks + 4 * chunk + 1)
    start = tl.load(chunks + 4 * chunk + 2)
    n = tl.load(chunks + 4 * chunk + 3)
    t = tl.arange(0, C)
    token, valid = rows(start, first + t, n, STEP)
    total = tl.zeros((C, C), tl.float32)
    for column in range(0, K_end, BK):
        q_c = load_rows(q, token, valid, head, H, column, K, BK).to(tl.float32)
        k_c = load_rows(k, token, valid, head, H, column, K, BK).to(tl.float32)
        coarse, fine = decay_sums(base2(load_rows(g, token, valid, head, H, column, K, BK)), EXACT)
        last, rest = row_of(coarse, C - 1, C), row_of(fine, C - 1, C)
        at = column + tl.arange(0, BK)
        place = whole + program.to(tl.int64) * K + at
        tl.store(place, tl.exp2(last + rest), mask=at < K)
        from_start = tl.exp2(coarse + fine)
        to_end = tl.exp2((last[None, :] - coarse) + (rest[None, :] - fine))
        store_rows(queries, q_c * from_start, token, valid, head, H, column, K, BK)
        store_rows(keys, k_c * to_end, token, valid, head, H, column, K, BK)
        total += _scores(
            q_c, k_c, k, g, coarse, fine, start, first, n, head, H, column, K, BK, STEP, OPERAND, PRECISION
        )
    total = tl.where(t[:, None] >= t[None, :], total, 0.0)
    store_rows(scores, total, token, valid, head, H, 0, C, C)
    if do is not None:
        total = tl.zeros((C, C), tl.float32)
        for column in range(0, V_end, BV):
            v_c = load_rows(v, token, valid, head, H, column, V, BV).to(OPERAND)
            do_c = load_rows(do, token, valid, head, H, column, V, BV).to(OPERAND)
            total = tl.dot(do_c, tl.trans(v_c), total, input_precision=PRECISION)
        total = tl.where(t[:, None] >= t[None, :], total * scale, 0.0)
        store_rows(dscores, total, token, valid, head, H, 0, C, C)


@triton.jit
def _distant(dscores, token, valid, head, H, column):
    """Load element ``column`` of each row of ``dscores``."""
    return tl.load(dscores + (token * H + head) * C + column, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def scores_gradient(
    dscores, q_c, k_c, q, k, g, coarse, fine, start, first, n, head, H, column,
    K: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of channels of q and k from their scores, what a token gives itself left out."""
    t = tl.arange(0, C)
    here, inside = rows(start, first + t, n, STEP)
    if tl.min(row_of(coarse, C - 1, C), 0) >= LIMIT:
        d = load_rows(dscores, here, inside, head, H, 0, C, C)
        d = tl.where(t[:, None] > t[None, :], d, 0.0)
        down, up = _middle_factors(coarse, fine)
        dq = tl.dot(d, (k_c * up).to(OPERAND), input_precision=PRECISION) * down
        dk = tl.dot(tl.trans(d), (q_c * down).to(OPERAND), input_precision=PRECISION) * up
    else:
        dq = tl.zeros((C, BK), tl.float32)
        dk = tl.zeros((C, BK), tl.float32)
        for block in range(1, C // BLOCK):
            d = load_rows(dscores, here, inside, head, H, 0, C, C)
            to, back = _block_factors(coarse, fine, block)
            dq += tl.dot(d, (k_c * back).to(OPERAND), input_precision=PRECISION) * to
            dk += tl.dot(tl.trans(d), (q_c * to).to(OPERAND), input_precision=PRECISION) * back
        sums = tl.zeros((C, BK), tl.float32)
        for distance in range(1, BLOCK):
            token, valid = rows(start, first + t - distance, n, STEP)
            after, _ = rows(start, first + t - distance + 1, n, STEP)
            valid = valid & inside & (t % BLOCK >= distance)
            sums += base2(load_rows(g, after, valid, head, H, column, K, BK))
            d_c = _distant(dscores, here, valid, head, H, t - distance)
            other = load_rows(k, token, valid, head, H, column, K, BK).to(tl.float32)
            dq += d_c[:, None] * other * tl.exp2(sums)
        sums = tl.zeros((C, BK), tl.float32)
        for distance in range(1, BLOCK):
            # The same pairs once more, now each row beside the one `distance` behind it.
            token, valid = rows(start, first + t + distance, n, STEP)
            valid = valid & (t % BLOCK + distance < BLOCK)
            sums += base2(load_rows(g, token, valid, head, H, column, K, BK))
            d_c = _distant(dscores, token, valid, head, H, t)
            other = load_rows(q, token, valid, head, H, column, K, BK).to(tl.float32)
            dk += d_c[:, None] * other * tl.exp2(sums)
    return dq, dk
