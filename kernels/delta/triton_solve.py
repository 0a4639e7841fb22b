"""Inverse of a unit lower triangular matrix in a Triton program: the one solver of the delta-rule family.

By forward substitution in the 16×16 blocks of the diagonal, all of them at once, and then by merging blocks,

    ⎡ A 0 ⎤⁻¹   ⎡    A⁻¹       0  ⎤
    ⎣ M B ⎦   = ⎣ −B⁻¹ M A⁻¹  B⁻¹ ⎦ .

Both are exact to rounding whatever the keys are. Doubling, ``(I − M)(I + M²)(I + M⁴)…``, is not: where keys
repeat (silence, padding) the powers of M grow as binomials and cancel, and nothing is left of a chunk of
64.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def invert_unit_lower(m, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``(I + m)⁻¹ (C, C)`` in float32.

    Args:
        m: ``(C, C)`` float32; what is not strictly below the diagonal must be zero.
        C: 16, 32 or 64.
        PRECISION: ``input_precision`` of the products that merge blocks; ``"tf32x3"`` keeps float32's digits.
    """
    tl.static_assert(C == 16 or C == 32 or C == 64, "chunks have 16, 32 or 64 tokens")
    x = _diagonal(m, C // 16, 16)
    # All pieces are cut out before any is used, so that m need not be kept.
    if C == 64:
        below = _below(_diagonal(m, 2, 32), 2, 16)
        corner = _below(m, 1, 32)
        x = _merge(_merge(_substitute(x, 4), below, 2, 16, PRECISION), corner, 1, 32, PRECISION)
    elif C == 32:
        corner = _below(m, 1, 16)
        x = _merge(_substitute(x, 2), corner, 1, 16, PRECISION)
    else:
        x = _substitute(x, 1)
    return tl.reshape(x, (C, C))


@triton.jit
def _diagonal(m, N: tl.constexpr, R: tl.constexpr):
    """Cut the ``N`` blocks ``(R, R)`` out of the diagonal of ``m (N·R, N·R)``: ``(N, R, R)``."""
    block = tl.arange(0, N)
    on = block[:, None, None, None] == block[None, None, :, None]
    return tl.sum(tl.where(on, tl.reshape(m, (N, R, N, R)), 0.0), 2)


@triton.jit
def _substitute(m, N: tl.constexpr):
    """Invert ``I + m`` for N strictly lower blocks ``(N, 16, 16)`` by forward substitution."""
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    x = tl.where(row == column, 1.0, 0.0) + tl.zeros((N, 16, 16), tl.float32)
    for i in range(15):
        # Row i is solved by now, and what it adds to the rows below is taken off them.
        solved = tl.sum(tl.where(row == i, x, 0.0), 1)
        weight = tl.sum(tl.where(column == i, m, 0.0), 2)
        x -= weight[:, :, None] * solved[:, None, :]
    return x


@triton.jit
def _below(m, N: tl.constexpr, R: tl.constexpr):
    """Cut the lower left quarter ``(N, R, R)`` out of N matrices ``(N, 2R, 2R)``."""
    left, _ = tl.split(tl.permute(tl.reshape(m, (N, 2, R, 2, R)), (0, 1, 2, 4, 3)))
    _, below = tl.split(tl.permute(left, (0, 2, 3, 1)))
    return below


@triton.jit
def _merge(x, below, N: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """Merge inverted blocks two by two.

    Args:
        x: ``(2N, R, R)``, the inverses of neighbouring blocks.
        below: ``(N, R, R)``, what is to the left of each second block.
        N: number of merged blocks.
        R: rows of a block before merging.
        PRECISION: as in `invert_unit_lower`.

    Returns:
        ``(N, 2R, 2R)``.
    """
    first, second = tl.split(tl.permute(tl.reshape(x, (N, 2, R, R)), (0, 2, 3, 1)))
    if N == 1:
        a, b, m = tl.reshape(first, (R, R)), tl.reshape(second, (R, R)), tl.reshape(below, (R, R))
        corner = tl.dot(b, tl.dot(m, a, input_precision=PRECISION), input_precision=PRECISION)
        corner = tl.reshape(corner, (N, R, R))
    else:
        corner = tl.dot(second, tl.dot(below, first, input_precision=PRECISION), input_precision=PRECISION)
    top = tl.join(first, tl.zeros_like(first))
    bottom = tl.join(-corner, second)
    # (N, R, R, column of blocks, row of blocks)
    return tl.reshape(tl.permute(tl.join(top, bottom), (0, 4, 1, 3, 2)), (N, 2 * R, 2 * R))
