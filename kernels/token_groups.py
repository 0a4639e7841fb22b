"""Groups of four tokens for the Numba kernels: how they enter and leave a kernel's scratch memory.

A kernel passes over its state once for every `GROUP` tokens. Within a group the decays meet only as products
of at most four factors ≤ 1, so nothing is ever divided by a decay and a decay of zero is exact.

Scratch blocks are flat: ``GROUP`` rows of ``width`` numbers, ``width`` a whole number of vectors, the rest
zeros. A walk takes position p to token ``start + p · step``, so that both directions run on the same code.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .matrix_state import token_decay
from .sequences import spans
from .simd import BYTES, fma, jit, load, mul, prefetch, repeat, store, total, zeros

GROUP = 4


def as_array(x: Tensor, dtype: torch.dtype) -> Any:
    """View ``x`` as a contiguous NumPy array of ``dtype``, copying only where it is not one."""
    return x.detach().to(dtype).contiguous().numpy()


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor on the CPU.

    NumPy asks the system for large pages, which PyTorch does not; with small ones the first touch of a long
    output takes as long as the scan that fills it.
    """
    return torch.from_numpy(np.empty(tuple(shape), str(dtype).removeprefix("torch.")))


def decay_factors(decay: Tensor | None, q: Tensor, dtype: torch.dtype) -> Any:
    """Array of ``exp(decay)``, ``(B, T, H, 1)`` or ``(B, T, H, K)``."""
    g = token_decay(decay, q)
    if g is None:
        return np.ones((*q.shape[:3], 1), dtype=np.float64 if dtype == torch.float64 else np.float32)
    return as_array(g.detach().to(dtype).exp(), dtype)


def sequence_table(cu_seqlens: Tensor | None, batch: int, length: int, reverse: bool) -> Any:
    """Table ``(S, 4)`` of row, first token of the walk, step, and number of tokens of each sequence."""
    table = [
        (row, end - 1, -1, end - begin) if reverse else (row, begin, 1, end - begin)
        for row, begin, end in spans(cu_seqlens, batch, length)
    ]
    return np.array(table, dtype=np.int64).reshape(-1, 4)


@jit
def padded(size, array):
    """Round ``size`` up to whole vectors of the type of ``array``."""
    lanes = BYTES // array.itemsize
    return (size + lanes - 1) // lanes * lanes


@jit
def blank(size, array):
    """Zeros of the type of ``array``."""
    return np.zeros(size, array.dtype)


@jit
def gather(block, width, x, row, head, start, step, p, n, factor):
    """Copy ``factor · x`` of positions p … p+3 into ``block``; zeros outside 0 … n−1."""
    _, T, H, size = x.shape
    whole = size - size % (BYTES // x.itemsize)
    f = repeat(factor)
    # The next group lies on other pages of memory, where the processor does not look by itself.
    ahead = GROUP * step * H * size
    for m in range(GROUP):
        to = m * width
        if p + m >= 0 and p + m < n:
            t = start + (p + m) * step
            at = ((row * T + t) * H + head) * size
            for i in range(0, whole, BYTES // x.itemsize):
                store(block, to + i, mul(f, load(x, at + i)))
                prefetch(x, at + ahead + i)
            for i in range(whole, size):
                block[to + i] = x[row, t, head, i] * factor
        else:
            for i in range(0, width, BYTES // x.itemsize):
                store(block, to + i, zeros(x))


@jit
def gather_decay(block, width, a, row, head, start, step, p, n, count):
    """Copy the decays of positions p … p+count−1 into ``block``; ones outside 0 … n−1."""
    _, T, H, size = a.shape
    whole = size - size % (BYTES // a.itemsize) if size > 1 else 0
    one = a.dtype.type(1)
    ahead = GROUP * step * H * size
    for m in range(count):
        to, t = m * width, start + (p + m) * step
        inside = p + m >= 0 and p + m < n
        if size > 1 and inside:
            at = ((row * T + t) * H + head) * size
            for i in range(0, whole, BYTES // a.itemsize):
                store(block, to + i, load(a, at + i))
                prefetch(a, at + ahead + i)
            for i in range(whole, size):
                block[to + i] = a[row, t, head, i]
        else:
            factor = repeat(a[row, t, head, 0] if inside else one)
            for i in range(0, width, BYTES // a.itemsize):
                store(block, to + i, factor)


@jit
def scatter(x, row, head, start, step, p, n, block, width):
    """Copy ``block`` to positions p … p+3 of ``x``."""
    _, T, H, size = x.shape
    whole = size - size % (BYTES // x.itemsize)
    for m in range(min(GROUP, n - p)):
        t = start + (p + m) * step
        at = ((row * T + t) * H + head) * size
        for i in range(0, whole, BYTES // x.itemsize):
            store(x, at + i, load(block, m * width + i))
        for i in range(whole, size):
            x[row, t, head, i] = block[m * width + i]


@jit
def load_state(S, state, transposed):
    """Copy ``state (K, V)`` into tiles of one vector: rows K and lanes V, or the other way round."""
    lanes = BYTES // S.itemsize
    K, V = state.shape
    S[:] = 0
    for i in range(K):
        for j in range(V):
            if transposed:
                S[i // lanes * lanes * V + j * lanes + i % lanes] = state[i, j]
            else:
                S[j // lanes * lanes * K + i * lanes + j % lanes] = state[i, j]


@jit
def save_state(state, S):
    """Copy tiles with rows K and lanes V into ``state (K, V)``."""
    lanes = BYTES // S.itemsize
    K, V = state.shape
    for i in range(K):
        for j in range(V):
            state[i, j] = S[j // lanes * lanes * K + i * lanes + j % lanes]


@jit
def overlap(carry, S, state, a, row, head, t):
    """Sum ``Diag(a_t) S ∘ state`` over V into ``carry (K,)``; S has rows V and lanes K."""
    lanes = BYTES // S.itemsize
    K, V = state.shape
    for i in range(K):
        sum_ = carry[i] * 0
        for j in range(V):
            sum_ += S[i // lanes * lanes * V + j * lanes + i % lanes] * state[i, j]
        carry[i] = sum_ * a[row, t, head, i if a.shape[3] > 1 else 0]


@jit
def products(P, x, y, width):
    """Write the lower triangle of ``x yᵀ`` of two blocks: P[0…3] diagonal, then 10, 20, 21, 30, 31, 32."""
    p00 = p11 = p22 = p33 = p10 = p20 = p21 = p30 = p31 = p32 = zeros(x)
    for i in range(0, width, BYTES // x.itemsize):
        x0, x1, x2, x3 = load(x, i), load(x, width + i), load(x, 2 * width + i), load(x, 3 * width + i)
        y0, y1, y2, y3 = load(y, i), load(y, width + i), load(y, 2 * width + i), load(y, 3 * width + i)
        p00, p11, p22, p33 = fma(x0, y0, p00), fma(x1, y1, p11), fma(x2, y2, p22), fma(x3, y3, p33)
        p10, p20, p21 = fma(x1, y0, p10), fma(x2, y0, p20), fma(x2, y1, p21)
        p30, p31, p32 = fma(x3, y0, p30), fma(x3, y1, p31), fma(x3, y2, p32)
    _put(P, p00, p11, p22, p33, p10, p20, p21, p30, p31, p32)


@jit
def fold_decay_rows(P, q, k, a, A, width):
    """Put the decays of a group into its queries and keys, in place.

    Afterwards ``P_ts = Σ q_t k_s a_{s+1} ⋯ a_t`` in the layout of `products`, q_t holds ``q_t a_0 ⋯ a_t``
    (decayed from the group's start), k_s holds ``k_s a_{s+1} ⋯ a_3`` (to its end), and A is the whole decay.
    """
    p00 = p11 = p22 = p33 = p10 = p20 = p21 = p30 = p31 = p32 = zeros(q)
    for i in range(0, width, BYTES // q.itemsize):
        q0, q1, q2, q3 = load(q, i), load(q, width + i), load(q, 2 * width + i), load(q, 3 * width + i)
        k0, k1, k2, k3 = load(k, i), load(k, width + i), load(k, 2 * width + i), load(k, 3 * width + i)
        a0, a1, a2, a3 = load(a, i), load(a, width + i), load(a, 2 * width + i), load(a, 3 * width + i)
        p00, p11, p22, p33 = fma(q0, k0, p00), fma(q1, k1, p11), fma(q2, k2, p22), fma(q3, k3, p33)
        k0 = mul(k0, a1)
        p10 = fma(q1, k0, p10)
        k0, k1 = mul(k0, a2), mul(k1, a2)
        p20, p21 = fma(q2, k0, p20), fma(q2, k1, p21)
        k0, k1, k2 = mul(k0, a3), mul(k1, a3), mul(k2, a3)
        p30, p31, p32 = fma(q3, k0, p30), fma(q3, k1, p31), fma(q3, k2, p32)
        a1 = mul(a0, a1)
        a2 = mul(a1, a2)
        a3 = mul(a2, a3)
        store_rows(q, i, width, mul(q0, a0), mul(q1, a1), mul(q2, a2), mul(q3, a3))
        store_rows(k, i, width, k0, k1, k2, k3)
        store(A, i, a3)
    _put(P, p00, p11, p22, p33, p10, p20, p21, p30, p31, p32)


@jit
def decayed_products(P, q, k, a, width):
    """Write the ``P_ts`` of `fold_decay_rows` and leave the queries and keys as they are."""
    p00 = p11 = p22 = p33 = p10 = p20 = p21 = p30 = p31 = p32 = zeros(q)
    for i in range(0, width, BYTES // q.itemsize):
        q0, q1, q2, q3 = load(q, i), load(q, width + i), load(q, 2 * width + i), load(q, 3 * width + i)
        k0, k1, k2, k3 = load(k, i), load(k, width + i), load(k, 2 * width + i), load(k, 3 * width + i)
        a1, a2, a3 = load(a, width + i), load(a, 2 * width + i), load(a, 3 * width + i)
        p00, p11, p22, p33 = fma(q0, k0, p00), fma(q1, k1, p11), fma(q2, k2, p22), fma(q3, k3, p33)
        k0 = mul(k0, a1)
        p10 = fma(q1, k0, p10)
        k0, k1 = mul(k0, a2), mul(k1, a2)
        p20, p21 = fma(q2, k0, p20), fma(q2, k1, p21)
        k0, k1, k2 = mul(k0, a3), mul(k1, a3), mul(k2, a3)
        p30, p31, p32 = fma(q3, k0, p30), fma(q3, k1, p31), fma(q3, k2, p32)
    _put(P, p00, p11, p22, p33, p10, p20, p21, p30, p31, p32)


@jit
def store_rows(block, i, width, x0, x1, x2, x3):
    """Write one vector to each row of ``block``."""
    store(block, i, x0)
    store(block, width + i, x1)
    store(block, 2 * width + i, x2)
    store(block, 3 * width + i, x3)


@jit
def _put(P, p00, p11, p22, p33, p10, p20, p21, p30, p31, p32):
    P[0], P[1], P[2], P[3] = total(p00), total(p11), total(p22), total(p33)
    P[4], P[5], P[6] = total(p10), total(p20), total(p21)
    P[7], P[8], P[9] = total(p30), total(p31), total(p32)


@jit
def fold_decay_rows_twice(P, M, q, k, ahead, a, A, width):
    """Do what `fold_decay_rows` does with two queries: q, and the keys themselves.

    ``M_ts = Σ k_t k_s a_{s+1} ⋯ a_t``, and ``ahead`` becomes ``k_t a_0 ⋯ a_t``.
    """
    m00 = m11 = m22 = m33 = m10 = m20 = m21 = m30 = m31 = m32 = zeros(q)
    for i in range(0, width, BYTES // q.itemsize):
        k0, k1, k2, k3 = load(k, i), load(k, width + i), load(k, 2 * width + i), load(k, 3 * width + i)
        a0, a1, a2, a3 = load(a, i), load(a, width + i), load(a, 2 * width + i), load(a, 3 * width + i)
        b0 = mul(k0, a1)
        m10 = fma(k1, b0, m10)
        b0, b1 = mul(b0, a2), mul(k1, a2)
        m20, m21 = fma(k2, b0, m20), fma(k2, b1, m21)
        b0, b1, b2 = mul(b0, a3), mul(b1, a3), mul(k2, a3)
        m30, m31, m32 = fma(k3, b0, m30), fma(k3, b1, m31), fma(k3, b2, m32)
        a1 = mul(a0, a1)
        a2 = mul(a1, a2)
        a3 = mul(a2, a3)
        store_rows(ahead, i, width, mul(k0, a0), mul(k1, a1), mul(k2, a2), mul(k3, a3))
    _put(M, m00, m11, m22, m33, m10, m20, m21, m30, m31, m32)
    fold_decay_rows(P, q, k, a, A, width)


@jit
def copy_block(to, block):
    """Copy a whole block."""
    for i in range(0, block.size, BYTES // block.itemsize):
        store(to, i, load(block, i))
