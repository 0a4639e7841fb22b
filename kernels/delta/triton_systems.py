"""First launch of the delta rule in Triton: what a chunk holds whatever state it starts from.

One program a chunk and head. With ``M_ij = Σ_k k_i k_j exp(g_{j+1} + … + g_i)`` for i > j it writes the
inverse of ``I + M Diag(β)`` and the scores that read what the chunk itself writes. Exponents are sums of g
and never differences of two sums that may both be −inf, but for the offset of the factored form, which is
finite.

Shapes: B batch, T tokens, H heads, K key size, C tokens a chunk, N chunks of all sequences.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_solve import invert_unit_lower

NONE: tl.constexpr = tl.constexpr(0)
HEAD: tl.constexpr = tl.constexpr(1)
CHANNEL: tl.constexpr = tl.constexpr(2)

# The factored form multiplies numbers as far apart as exp(±SPREAD / 2); float32 ends at exp(±88).
SPREAD: tl.constexpr = tl.constexpr(60.0)


@triton.jit
def load_rows(x, token, live, column, W: tl.constexpr):
    """Load ``(R, D)``: rows ``token (R,)`` and ``column (D,)`` of ``x (…, W)``, zero where nothing is."""
    mask = live[:, None] & (column < W)[None, :]
    return tl.load(x + token[:, None] * W + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, token, live, column, W: tl.constexpr, value):
    """Store ``value (R, D)`` to the rows ``token (R,)`` and ``column (D,)`` of ``x (…, W)``."""
    mask = live[:, None] & (column < W)[None, :]
    tl.store(x + token[:, None] * W + column[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def pair_decays(g, C: tl.constexpr):
    """Return ``exp(g_{j+1} + … + g_i)`` for i ≥ j and 0 elsewhere, ``(C, C)``, for log-decays ``g (C,)``."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    sums = tl.cumsum(tl.where(row > column, g[:, None], 0.0), 0)
    return tl.exp(tl.where(row >= column, sums, float("-inf")))


@triton.jit
def behind_in_rows(g_next, C: tl.constexpr, BK: tl.constexpr):
    """Log-decay from behind each token to the end of its 16 rows ``(C, BK)``.

    ``g_next`` is the log-decay of the token after each, 0 behind the chunk's last.
    """
    last = (tl.arange(0, C) % 16 == 15)[:, None]
    blocks = tl.reshape(tl.where(last, 0.0, g_next), (C // 16, 16, BK))
    return tl.reshape(tl.cumsum(blocks, 1, reverse=True), (C, BK))


@triton.jit
def pair_factors(g_rows, behind, row, first):
    """Factor the decays between 16 rows of a chunk and what lies before them, a key channel at a time.

    The decay from token j to row i is ``left_i · right_j``. The references are the start of the 16 rows,
    where no exponent is above 0, or the middle of their decay, so that pairs within the 16 rows are right
    too. The latter is taken where every channel's decay over the rows is at least exp(−SPREAD).

    Args:
        g_rows: log-decays of the rows ``(16, D)``.
        behind: log-decay from behind each token to the end of its 16 rows ``(C, D)``; for the tokens before
            these rows, to the start of these rows.
        row: ``arange(C)``.
        first: place of the first of the 16 rows.

    Returns:
        ``left (16, D)``; ``right (C, D)``, zero for the tokens that it does not serve; whether it serves
        the pairs within the rows; and ``behind`` for the next 16 rows.
    """
    total = tl.sum(g_rows, 0)
    safe = tl.min(total, 0) >= -SPREAD
    middle = tl.where(safe, 0.5 * total, 0.0)[None, :]
    before = (row < first)[:, None]
    served = (row < tl.where(safe, first + 16, first))[:, None]
    right = tl.exp(tl.where(served, behind + tl.where(before, middle, -middle), float("-inf")))
    left = tl.exp(tl.cumsum(g_rows, 0) - middle)
    return left, right, safe, behind + tl.where(before, total[None, :], 0.0)


@triton.jit
def _channel_scores(
    q, k, decay, k_end, begin, position, n, step, head, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of k and of q with k ``(C, C)`` with a decay a channel, right on and below the diagonal."""
    # Factors are as large as exp(SPREAD / 2), which float16 does not hold.
    wide: tl.constexpr = tl.float32 if k.dtype.element_ty == tl.float16 else k.dtype.element_ty
    block = tl.arange(0, C // 16)[:, None, None]
    row, sub = tl.arange(0, C), tl.arange(0, 16)
    live = position + row < n
    token = (begin + step * (position + row)).to(tl.int64) * H + head
    after = (position + row + 1 < n) & (row + 1 < C)
    kk = tl.zeros((C // 16, 16, C), tl.float32)
    qk = tl.zeros((C // 16, 16, C), tl.float32)
    for b in range(0, K, BK):
        key = b + tl.arange(0, BK)
        behind = behind_in_rows(load_rows(decay, token + step * H, after, key, K).to(tl.float32), C, BK)
        k_b = load_rows(k, token, live, key, K).to(tl.float32)
        for i in range(C // 16):
            here = position + i * 16 + sub
            rows = (begin + step * here).to(tl.int64) * H + head
            q_rows = load_rows(q, rows, here < n, key, K).to(tl.float32)
            k_rows = load_rows(k, rows, here < n, key, K).to(tl.float32)
            g_rows = load_rows(decay, rows, here < n, key, K).to(tl.float32)
            left, right, safe, behind = pair_factors(g_rows, behind, row, i * 16)
            right = tl.trans((k_b * right).to(wide))
            kk_rows = tl.dot((k_rows * left).to(wide), right, input_precision=PRECISION)
            qk_rows = tl.dot((q_rows * left).to(wide), right, input_precision=PRECISION)
            if not safe:
                sums = tl.zeros((16, BK), tl.float32)  # from behind token j through each row
                for back in range(16):
                    j = 15 - back
                    there = position + i * 16 + j
                    at = (begin + step * there).to(tl.int64) * H + head
                    inside = key < tl.where(there < n, K, 0)
                    k_j = tl.load(k + at * K + key, mask=inside, other=0.0).to(tl.float32)
                    g_j = tl.load(decay + at * K + key, mask=inside, other=0.0).to(tl.float32)
                    pairs = k_j[None, :] * tl.exp(tl.where((sub >= j)[:, None], sums, float("-inf")))
                    place = (row == i * 16 + j)[None, :]
                    kk_rows += tl.where(place, tl.sum(k_rows * pairs, 1)[:, None], 0.0)
                    qk_rows += tl.where(place, tl.sum(q_rows * pairs, 1)[:, None], 0.0)
                    sums += tl.where((sub >= j)[:, None], g_j[None, :], 0.0)
            kk += tl.where(block == i, kk_rows[None, :, :], 0.0)
            qk += tl.where(block == i, qk_rows[None, :, :], 0.0)
        # By now behind reaches to the chunk's end.
        store_rows(k_end, token, live, key, K, k_b * tl.exp(behind))
    return tl.reshape(kk, (C, C)), tl.reshape(qk, (C, C))


@triton.jit(do_not_specialize=["step", "H"])
def chunk_systems(
    q, k, beta, decay, inverse, scores, start, end, whole, q_start, k_start, k_end, chunks, scale, step, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what a chunk's tokens are to each other.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        beta: ``(B, T, H)``.
        decay: ``None``, ``(B, T, H)`` or ``(B, T, H, K)``, as ``DECAY`` says.
        inverse: out ``(N, H, C, C)``: the inverse of ``I + M Diag(β)``.
        scores: out ``(N, H, C, C)``: ``scale · Σ_k q_i k_j exp(g_{j+1} + … + g_i)`` for i ≥ j.
        start: out float32 ``(N, H, C)``: decay from the chunk's start through each token, with one decay a
            head.
        end: out float32 ``(N, H, C)``: decay from behind each token to the chunk's end, with one decay a
            head.
        whole: out float32 ``(N, H, K)``: decay of the whole chunk, with a decay a channel.
        q_start: out ``(B, T, H, K)``: q decayed from the chunk's start, with a decay a channel.
        k_start: out ``(B, T, H, K)``: k decayed from the chunk's start, with a decay a channel.
        k_end: out ``(B, T, H, K)``: k decayed to the chunk's end, with a decay a channel.
        chunks: int32 ``(N, 4)``, as `ChunkTable` has it.
        scale: factor of the scores.
        step: 1, or −1 in reverse.
        H: heads.
        K: key size.
        C: tokens a chunk.
        BK: key channels at a time.
        DECAY: NONE, HEAD or CHANNEL.
        PRECISION: ``input_precision`` of the products with q and k.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    position, begin = tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    n = tl.load(chunks + chunk * 4 + 3)
    row = tl.arange(0, C)
    live = position + row < n
    token = (begin + step * (position + row)).to(tl.int64) * H + head
    after = (position + row + 1 < n) & (row + 1 < C)
    if DECAY == CHANNEL:
        kk, qk = _channel_scores(q, k, decay, k_end, begin, position, n, step, head, H, K, C, BK, PRECISION)
        for b in range(0, K, BK):
            key = b + tl.arange(0, BK)
            g = load_rows(decay, token, live, key, K).to(tl.float32)
            q_b = load_rows(q, token, live, key, K).to(tl.float32)
            k_b = load_rows(k, token, live, key, K).to(tl.float32)
            from_start = tl.exp(tl.cumsum(g, 0))
            store_rows(q_start, token, live, key, K, q_b * from_start)
            store_rows(k_start, token, live, key, K, k_b * from_start)
            at = whole + tl.program_id(0).to(tl.int64) * K + key
            tl.store(at, tl.exp(tl.sum(g, 0)), mask=key < K)
    else:
        kk = tl.zeros((C, C), tl.float32)
        qk = tl.zeros((C, C), tl.float32)
        for b in range(0, K, BK):
            key = b + tl.arange(0, BK)
            k_b = load_rows(k, token, live, key, K)
            q_b = load_rows(q, token, live, key, K)
            kk = tl.dot(k_b, tl.trans(k_b), kk, input_precision=PRECISION)
            qk = tl.dot(q_b, tl.trans(k_b), qk, input_precision=PRECISION)
        if DECAY == HEAD:
            g = tl.load(decay + token, mask=live, other=0.0).to(tl.float32)
            g_next = tl.load(decay + token + step * H, mask=after, other=0.0).to(tl.float32)
            pairs = pair_decays(g, C)
            kk *= pairs
            qk *= pairs
            at = tl.program_id(0).to(tl.int64) * C + row
            tl.store(start + at, tl.exp(tl.cumsum(g, 0)))
            tl.store(end + at, tl.exp(tl.cumsum(g_next, 0, reverse=True)))
    b = tl.load(beta + token, mask=live, other=0.0).to(tl.float32)
    tile = tl.program_id(0).to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
    lower = row[:, None] >= row[None, :]
    tl.store(scores + tile, tl.where(lower, qk * scale, 0.0).to(scores.dtype.element_ty))
    m = tl.where(row[:, None] > row[None, :], kk * b[None, :], 0.0)
    tl.store(inverse + tile, invert_unit_lower(m, C, "tf32x3").to(inverse.dtype.element_ty))
