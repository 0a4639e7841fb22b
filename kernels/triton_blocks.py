"""What the Triton kernels of a matrix state share: rows of tokens, decays within a chunk, sums along it.

Token p of a walk is row ``start + p · STEP`` of a flat ``(B·T, H, size)`` tensor (`chunk_table`). A tile is
padded to a power of two; what lies outside the walk or the head size is loaded as zero and never stored.

Decays are base-2 logarithms. A pair of tokens of one chunk decays by ``exp2(Σ l)`` over what lies between
them, and a difference of running sums would lose the digits of that sum, or be −inf − −inf. So every l is at
least `FLOOR`, whose power is zero in float32, and its running sum is kept in two parts (``EXACT``): multiples
of 1/256, whose sums and differences are exact, and a remainder below 1/256 a token. Where products round to
bfloat16 one part is enough: 64 tokens at `FLOOR` leave a pair an error of 2^−11, and bfloat16 one of 2^−9.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-160.0)
ZERO = tl.constexpr(-150.0)
"""At or below this base-2 logarithm a decay is zero in float32, and its gradient with it."""


@triton.jit
def rows(start, position, n, STEP: tl.constexpr):
    """Return the flat tokens (int64) at positions of the walk, and which of them lie in ``0 … n − 1``."""
    return start.to(tl.int64) + position.to(tl.int64) * STEP, (position >= 0) & (position < n)


@triton.jit
def load_rows(x, token, valid, head, H, column, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Load columns ``column … column + TILE − 1`` of these tokens from ``(tokens, H, SIZE)``."""
    at = column + tl.arange(0, TILE)
    x += (token * H + head)[:, None] * SIZE + at[None, :]
    if SIZE % TILE == 0:
        return tl.load(x, mask=valid[:, None], other=0.0)
    return tl.load(x, mask=valid[:, None] & (at < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(x, tile, token, valid, head, H, column, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Store what `load_rows` loads."""
    at = column + tl.arange(0, TILE)
    x += (token * H + head)[:, None] * SIZE + at[None, :]
    if SIZE % TILE == 0:
        tl.store(x, tile, mask=valid[:, None])
    else:
        tl.store(x, tile, mask=valid[:, None] & (at < SIZE)[None, :])


@triton.jit
def matrix_at(x, index, row, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Return pointers and mask of a ``(BK, BV)`` tile of matrix ``index`` in ``(…, K, V)``."""
    i, j = row + tl.arange(0, BK), column + tl.arange(0, BV)
    at = x + index.to(tl.int64) * (K * V) + i[:, None] * V + j[None, :]
    return at, (i < K)[:, None] & (j < V)[None, :]


@triton.jit
def load_matrix(x, index, row, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Load a ``(BK, BV)`` tile of matrix ``index`` in ``(…, K, V)``."""
    at, inside = matrix_at(x, index, row, column, K, V, BK, BV)
    if K % BK == 0 and V % BV == 0:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_matrix(
    x, tile, index, row, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Store what `load_matrix` loads."""
    at, inside = matrix_at(x, index, row, column, K, V, BK, BV)
    if K % BK == 0 and V % BV == 0:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=inside)


@triton.jit
def base2(g):
    """Turn natural log-decays, possibly −inf, into base-2 ones that are finite."""
    return tl.maximum(g.to(tl.float32) * LOG2E, FLOOR)


@triton.jit
def decay_sums(l, EXACT: tl.constexpr):
    """Sum l along the chunk (dimension 0) in two parts; without ``EXACT`` the second is zero."""
    if EXACT:
        coarse = tl.floor(l * 256.0) * 0.00390625
        return tl.cumsum(coarse, 0), tl.cumsum(l - coarse, 0)
    return tl.cumsum(l, 0), tl.zeros_like(l)


@triton.jit
def pair_decay(coarse, fine, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr):
    """Return ``exp2(l_{j+1} + … + l_i)`` at ``(i, j)``, zero where i < j; at ``(j, i)`` if ``TRANSPOSED``.

    ``coarse`` and ``fine`` are the `decay_sums` of a ``(ROWS,)``.
    """
    t = tl.arange(0, ROWS)
    sums = coarse[:, None] - coarse[None, :]
    if EXACT:
        sums += fine[:, None] - fine[None, :]
    if TRANSPOSED:
        return tl.exp2(tl.where(t[:, None] <= t[None, :], -sums, float("-inf")))
    return tl.exp2(tl.where(t[:, None] >= t[None, :], sums, float("-inf")))


@triton.jit
def row_of(x, index, ROWS: tl.constexpr):
    """Return row ``index`` of a tile ``(ROWS, columns)``."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == index)[:, None], x, 0.0), 0)


@triton.jit
def element_of(x, index, ROWS: tl.constexpr):
    """Return element ``index`` of ``(ROWS,)``."""
    return tl.sum(tl.where(tl.arange(0, ROWS) == index, x, 0.0), 0)


@triton.jit
def _append(before, last, before_next, last_next):
    return before + last + before_next, last_next


@triton.jit
def sum_before(x):
    """Sum, along dimension 0, of what lies before each element.

    The element itself is never added and taken away again: beside it the sum may be small.
    """
    before, _ = tl.associative_scan((tl.zeros_like(x), x), 0, _append)
    return before


@triton.jit
def sum_from(x):
    """Sum, along dimension 0, of each element and all after it."""
    return tl.cumsum(x, 0, reverse=True)
