"""First launch of the generalised delta rule in Triton: what a chunk holds that does not depend on its first
state.

One program a chunk and head. With ``P_ij = exp(g_{j+1} + … + g_i)`` a channel, a token i reads what token j ≤
i wrote by ``Σ_k q_i P_ij b_j`` and ``Σ_k q_i P_ij k_j``, and what it retrieves, ``r_i = S_{i-1}ᵀ a_i``, comes
from j < i by the same sums with a_i and P_{i-1,j}: (I − AB) r = what the chunk's first state and the values
give. The inverse is written, so that the rest is products.

Shapes: B batch, T tokens, H heads, K key size, C tokens a chunk, N chunks of all sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

import triton
import triton.language as tl

from ..delta.triton_solve import invert_unit_lower
from ..delta.triton_systems import SPREAD, load_rows, store_rows


@triton.jit
def chunk_factors(g, g_next):
    """Factor the decays between two tokens of a chunk, a channel at a time: ``P_ij = left_i · right_j`` for i
    ≥ j.

    The exponents are taken from the middle of the chunk's decay, which no channel may let fall below
    exp(−SPREAD); RWKV-7's never do. Otherwise nothing is above one, and nothing right.

    Args:
        g: log-decays ``(C, D)``.
        g_next: of the token after each, 0 behind the chunk's last.

    Returns:
        ``left (C, D)``, ``right (C, D)``, and whether they serve.
    """
    total = tl.sum(g, 0)
    safe = tl.min(total, 0) >= -SPREAD
    middle = tl.where(safe, 0.5 * total, 0.0)[None, :]
    return tl.exp(tl.cumsum(g, 0) - middle), tl.exp(tl.cumsum(g_next, 0, reverse=True) - middle), safe


@triton.jit
def row_of(x, place):
    """Return the row of ``x (C, D)`` where ``place (C,)`` is true."""
    return tl.sum(tl.where(place[:, None], x, 0.0), 0)


@triton.jit
def _scores(
    q, a, b, k, decay, token, live, after, ahead, K: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores ``(C, C)`` of q_i with b_j and k_j, and of a_{i+1} with them, zero above the diagonal."""
    # Factors are as large as exp(SPREAD / 2), which float16 does not hold.
    wide: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float16 else q.dtype.element_ty
    row = tl.arange(0, C)
    qb = tl.zeros((C, C), tl.float32)
    qk = tl.zeros((C, C), tl.float32)
    ab = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        g = load_rows(decay, token, live, key, K).to(tl.float32)
        left, right, safe = chunk_factors(g, load_rows(decay, token + ahead, after, key, K).to(tl.float32))
        q_c = load_rows(q, token, live, key, K).to(tl.float32)
        a_c = load_rows(a, token + ahead, after, key, K).to(tl.float32)
        b_c = load_rows(b, token, live, key, K).to(tl.float32)
        k_c = load_rows(k, token, live, key, K).to(tl.float32)
        if safe:
            q_left, a_left = (q_c * left).to(wide), (a_c * left).to(wide)
            b_right, k_right = tl.trans((b_c * right).to(wide)), tl.trans((k_c * right).to(wide))
            qb = tl.dot(q_left, b_right, qb, input_precision=PRECISION)
            qk = tl.dot(q_left, k_right, qk, input_precision=PRECISION)
            ab = tl.dot(a_left, b_right, ab, input_precision=PRECISION)
            ak = tl.dot(a_left, k_right, ak, input_precision=PRECISION)
        else:
            sums = tl.zeros((C, BK), tl.float32)  # from behind token j through each row
            for back in range(C):
                place = row == C - 1 - back
                below = (row >= C - 1 - back)[:, None]
                decays = tl.exp(tl.where(below, sums, float("-inf")))
                from_b, from_k = decays * row_of(b_c, place)[None, :], decays * row_of(k_c, place)[None, :]
                qb += tl.where(place[None, :], tl.sum(q_c * from_b, 1)[:, None], 0.0)
                qk += tl.where(place[None, :], tl.sum(q_c * from_k, 1)[:, None], 0.0)
                ab += tl.where(place[None, :], tl.sum(a_c * from_b, 1)[:, None], 0.0)
                ak += tl.where(place[None, :], tl.sum(a_c * from_k, 1)[:, None], 0.0)
                sums += tl.where(below, row_of(g, place)[None, :], 0.0)
    lower = row[:, None] >= row[None, :]
    return (
        tl.where(lower, qb, 0.0),
        tl.where(lower, qk, 0.0),
        tl.where(lower, ab, 0.0),
        tl.where(lower, ak, 0.0),
    )


@triton.jit
def _a_row_later(x, C: tl.constexpr):
    """Move every row of ``x (C, C)`` one place down: by a product, as a tile has no other way."""
    row = tl.arange(0, C)
    move = tl.where(row[:, None] == row[None, :] + 1, 1.0, 0.0)
    return tl.dot(move, x, input_precision="tf32x3")


@triton.jit(do_not_specialize=["step", "H"])
def chunk_systems(
    q, k, a, b, decay, inverse, taken, scores_b, scores_k, whole, q_start, a_start, b_end, k_end, chunks,
    scale, step, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what a chunk's tokens are to each other.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        a: ``(B, T, H, K)``.
        b: ``(B, T, H, K)``.
        decay: ``(B, T, H, K)``.
        inverse: out ``(N, H, C, C)``: the inverse of ``I − AB``.
        taken: out ``(N, H, C, C)``: what r takes of each v.
        scores_b: out ``(N, H, C, C)``: what the output takes of each r, scaled.
        scores_k: out ``(N, H, C, C)``: what the output takes of each v, scaled.
        whole: out float32 ``(N, H, K)``: decay of the whole chunk.
        q_start: out ``(B, T, H, K)``: q decayed from the chunk's start.
        a_start: out ``(B, T, H, K)``: a likewise, up to the token before.
        b_end: out ``(B, T, H, K)``: b decayed to the chunk's end.
        k_end: out ``(B, T, H, K)``: k likewise.
        chunks: int32 ``(N, 4)``, as `ChunkTable` has it.
        scale: factor of the scores.
        step: 1, or −1 in reverse.
        H: heads.
        K: key size.
        C: tokens a chunk.
        BK: key channels at a time.
        PRECISION: ``input_precision`` of the products with q, k, a and b.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    position, begin = tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    n = tl.load(chunks + chunk * 4 + 3)
    row = tl.arange(0, C)
    live = position + row < n
    token = (begin + step * (position + row)).to(tl.int64) * H + head
    tile = tl.program_id(0).to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
    after, ahead = (position + row + 1 < n) & (row + 1 < C), step * H
    qb, qk, ab, ak = _scores(q, a, b, k, decay, token, live, after, ahead, K, C, BK, PRECISION)
    tl.store(scores_b + tile, (qb * scale).to(scores_b.dtype.element_ty))
    tl.store(scores_k + tile, (qk * scale).to(scores_k.dtype.element_ty))
    tl.store(taken + tile, _a_row_later(ak, C).to(taken.dtype.element_ty))
    ab = invert_unit_lower(-_a_row_later(ab, C), C, "tf32x3")
    tl.store(inverse + tile, ab.to(inverse.dtype.element_ty))
    before = live & (row > 0)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        g = load_rows(decay, token, live, key, K).to(tl.float32)
        g_before = load_rows(decay, token - ahead, before, key, K).to(tl.float32)
        g_next = load_rows(decay, token + ahead, after, key, K).to(tl.float32)
        x = load_rows(q, token, live, key, K).to(tl.float32)
        store_rows(q_start, token, live, key, K, x * tl.exp(tl.cumsum(g, 0)))
        x = load_rows(a, token, live, key, K).to(tl.float32)
        store_rows(a_start, token, live, key, K, x * tl.exp(tl.cumsum(g_before, 0)))
        to_end = tl.exp(tl.cumsum(g_next, 0, reverse=True))
        store_rows(b_end, token, live, key, K, load_rows(b, token, live, key, K).to(tl.float32) * to_end)
        store_rows(k_end, token, live, key, K, load_rows(k, token, live, key, K).to(tl.float32) * to_end)
        at = whole + tl.program_id(0).to(tl.int64) * K + key
        tl.store(at, tl.exp(tl.sum(g, 0)), mask=key < K)
