"""Gradients of the delta rule in Triton where every key channel decays on its own.

The equations are those of `triton_gradient`, in two launches: the gradients of the scores, which sum over
value channels, and then what sums over pairs of tokens, in rows of 16 tokens as `triton_systems` makes the
scores.

Shapes: B batch, T tokens, H heads, K and V key and value sizes, C tokens a chunk, N chunks of all sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from ..triton_blocks import sum_before, sum_from
from .triton_gradient import pair_gradients, state_gradients
from .triton_systems import behind_in_rows, load_rows, pair_factors, store_rows


@triton.jit(do_not_specialize=["step", "H"])
def score_gradients(
    error, do, dv, dqk, dkk, itself, chunks, scale, step, H,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what `pair_gradients` returns.

    Args:
        error: float32 ``(B, T, H, V)`` of the forward pass.
        do: gradient of o ``(B, T, H, V)``.
        dv: gradient of v ``(B, T, H, V)``.
        dqk: out ``(N, H, C, C)``.
        dkk: out ``(N, H, C, C)``.
        itself: out float32 ``(N, H, C)``.
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
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, C)
    live = position + row < n
    token = (begin + step * (position + row)).to(tl.int64) * H + tl.program_id(0) % H
    dtype: tl.constexpr = do.dtype.element_ty
    dqk_c, dkk_c, itself_c = pair_gradients(do, dv, error, token, live, scale, V, C, BV, dtype, PRECISION)
    tile = chunk * (C * C) + row[:, None] * C + row[None, :]
    tl.store(dqk + tile, dqk_c.to(dqk.dtype.element_ty))
    tl.store(dkk + tile, dkk_c.to(dkk.dtype.element_ty))
    tl.store(itself + chunk * C + row, itself_c)


@triton.jit
def _pair_sums(
    q, k, beta, decay, dqk, dkk, chunk, begin, position, n, step, head, H, key, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs of tokens give, where every key channel decays on its own.

    Args:
        dqk: ``(N, H, C, C)`` of `score_gradients`.
        dkk: likewise.

    Returns:
        For q, for k as the left of a pair, and for ``β k`` as the right of a pair: ``(C, BK)`` each; and
        the log-decay from behind each token to the chunk's end.
    """
    wide: tl.constexpr = dqk.dtype.element_ty
    block = tl.arange(0, C // 16)[:, None, None]
    row, sub = tl.arange(0, C), tl.arange(0, 16)
    live = position + row < n
    token = (begin + step * (position + row)).to(tl.int64) * H + head
    after = (position + row + 1 < n) & (row + 1 < C)
    behind = behind_in_rows(load_rows(decay, token + step * H, after, key, K).to(tl.float32), C, BK)
    weight = tl.load(beta + token, mask=live, other=0.0).to(tl.float32)
    written = load_rows(k, token, live, key, K).to(tl.float32) * weight[:, None]
    dq = tl.zeros((C // 16, 16, BK), tl.float32)
    dk = tl.zeros((C // 16, 16, BK), tl.float32)
    dwritten = tl.zeros((C, BK), tl.float32)
    for i in range(C // 16):
        here = position + i * 16 + sub
        rows = (begin + step * here).to(tl.int64) * H + head
        q_rows = load_rows(q, rows, here < n, key, K).to(tl.float32)
        k_rows = load_rows(k, rows, here < n, key, K).to(tl.float32)
        g_rows = load_rows(decay, rows, here < n, key, K).to(tl.float32)
        left, right, safe, behind = pair_factors(g_rows, behind, row, i * 16)
        tile = (chunk * C + i * 16 + sub) * C
        dqk_rows = tl.load(dqk + tile[:, None] + row[None, :])
        dkk_rows = tl.load(dkk + tile[:, None] + row[None, :])
        operand = (written * right).to(wide)
        dq_rows = tl.dot(dqk_rows, operand, input_precision=PRECISION) * left
        dk_rows = tl.dot(dkk_rows, operand, input_precision=PRECISION) * left
        from_rows = tl.dot(tl.trans(dqk_rows), (q_rows * left).to(wide), input_precision=PRECISION)
        from_rows = tl.dot(tl.trans(dkk_rows), (k_rows * left).to(wide), from_rows, input_precision=PRECISION)
        dwritten += from_rows * right
        if not safe:
            sums = tl.zeros((16, BK), tl.float32)  # from behind token j through each row
            for back in range(16):
                j = 15 - back
                there = position + i * 16 + j
                at = (begin + step * there).to(tl.int64) * H + head
                inside = key < tl.where(there < n, K, 0)
                g_j = tl.load(decay + at * K + key, mask=inside, other=0.0).to(tl.float32)
                k_j = tl.load(k + at * K + key, mask=inside, other=0.0).to(tl.float32)
                k_j *= tl.load(beta + at, mask=there < n, other=0.0).to(tl.float32)
                pairs = tl.exp(tl.where((sub > j)[:, None], sums, float("-inf")))
                place = row == i * 16 + j
                at = tile + i * 16 + j
                dqk_j = tl.load(dqk + at).to(tl.float32)[:, None] * pairs
                dkk_j = tl.load(dkk + at).to(tl.float32)[:, None] * pairs
                dq_rows += dqk_j * k_j[None, :]
                dk_rows += dkk_j * k_j[None, :]
                from_j = tl.sum(dqk_j * q_rows + dkk_j * k_rows, 0)
                dwritten += tl.where(place[:, None], from_j[None, :], 0.0)
                sums += tl.where((sub >= j)[:, None], g_j[None, :], 0.0)
        dq = tl.where(block == i, dq_rows[None, :, :], dq)
        dk = tl.where(block == i, dk_rows[None, :, :], dk)
    return tl.reshape(dq, (C, BK)), tl.reshape(dk, (C, BK)), dwritten, behind


@triton.jit(do_not_specialize=["step", "H"])
def channel_gradients(
    q, k, beta, decay, error, do, dv, states, dstates, whole, dqk, dkk, itself, dq, dk, dbeta, ddecay, chunks,
    scale, step, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``dq``, ``dk`` and ``ddecay (B, T, H, K)`` and ``dbeta (B, T, H)``.

    Args:
        decay: ``(B, T, H, K)``.
        whole: float32 ``(N, H, K)``, as `chunk_systems` wrote it.
        dqk: ``(N, H, C, C)``, as `score_gradients` wrote it.
        dkk: likewise.
        itself: float32 ``(N, H, C)``, likewise.

    The other arguments are those of `chunk_gradients`.
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
    alone = tl.load(itself + chunk * C + row)[:, None]
    to_beta = tl.zeros((C,), tl.float32)
    for b in range(0, K, BK):
        key = b + tl.arange(0, BK)
        pair_q, pair_k, from_pairs, to_end = _pair_sums(
            q, k, beta, decay, dqk, dkk, chunk, begin, position, n, step, head, H, key, K, C, BK, PRECISION
        )
        to_q, to_k, to_write, through = state_gradients(
            states, dstates, do, dv, error, token, live, chunk, key, K, V, C, BK, BV, dtype, PRECISION
        )
        log_decay = load_rows(decay, token, live, key, K).to(tl.float32)
        from_start = tl.exp(tl.cumsum(log_decay, 0))
        to_q *= scale * from_start
        to_k *= from_start
        to_write *= tl.exp(to_end)
        to_q += pair_q
        to_k += pair_k
        q_b = load_rows(q, token, live, key, K).to(tl.float32)
        k_b = load_rows(k, token, live, key, K).to(tl.float32)
        written = k_b * weight[:, None]
        through *= tl.load(whole + chunk * K + key, mask=key < K, other=0.0)
        crossing = sum_from(q_b * to_q + k_b * to_k - written * from_pairs) + through[None, :]
        crossing += sum_before(written * to_write)
        log_decay = load_rows(decay, token, live, key, K).to(tl.float32)
        crossing = tl.where(tl.exp(log_decay) == 0.0, 0.0, crossing)
        store_rows(ddecay, token, live, key, K, crossing)
        store_rows(dq, token, live, key, K, to_q + alone * written)
        to_write += from_pairs + alone * q_b
        to_beta += tl.sum(k_b * to_write, 1)
        store_rows(dk, token, live, key, K, to_k + weight[:, None] * to_write)
    tl.store(dbeta + token, to_beta.to(dbeta.dtype.element_ty), mask=live)
