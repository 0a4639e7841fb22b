"""Gated recurrent cells on a CPU: Numba, one task for a head of up to 32 sequences of about one length.

The matrix of a head is read once a step for all sequences of a task, from panels that lie in the order in
which they are read; four sequences by four vectors of outputs stay in registers. In the backward the same
product runs over the gates, and what needs no order, the gradient of the matrix, is left to one product over
all tokens.

Arrays are flat. Rows of scratch memory are whole vectors, the rest zeros. Position p of a walk is token
``start + p · step``, so that both directions run on the same code.
"""
# Numba ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sequences import spans
from ..simd import BYTES, add, fma, jit, kernel, load, prefetch, splat, store, zeros
from ..token_groups import as_array, fresh, padded
from .cells import CELLS
from .vector_cells import backward_row, forward_row, get, put

ROWS = 32
"""Most sequences of one task: at 16 the product is no longer bound by reading the matrix."""

_KIND = {name: kind for kind, name in enumerate(CELLS)}


def forward(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(h, final_state, gates)``; the gates ``(H, B·T, kept·D)``, for `backward`, need ``keep``."""
    B, T, _, H, D = x.shape
    walks, tasks = _plan(cu_seqlens, B, T, reverse, H)
    h, final = fresh((B, T, H, D), state.dtype), fresh(state.shape, state.dtype)
    gates = fresh((H, B * T, CELLS[cell].kept * D), state.dtype) if keep else state.new_empty(0)
    panels = _panels(R.to(state.dtype).permute(1, 3, 0, 2), state.dtype)
    arrays = [as_array(y, state.dtype).reshape(-1) for y in (x, b, state, h, final, gates)]
    sizes = (_KIND[cell], B * T, CELLS[cell].gates, CELLS[cell].states, CELLS[cell].kept, H, D)
    _forward(len(tasks), tasks, walks, sizes, panels, *arrays)
    return h.to(x.dtype), final, gates


def backward(
    dh: Tensor,
    dstate: Tensor,
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dR, db, dinitial)``."""
    (B, T, H, D), G = dh.shape, R.shape[0]
    walks, tasks = _plan(cu_seqlens, B, T, reverse, H)
    dgates = fresh((B * T, G + (cell == "gru"), H, D), state.dtype)
    before, dinitial = fresh((B * T, H, D), state.dtype), fresh(state.shape, state.dtype)
    panels = _panels(_rows_of_vectors(R.to(state.dtype).transpose(0, 1)), state.dtype)
    arrays = [
        as_array(y, state.dtype).reshape(-1) for y in (dh, dstate, gates, state, dgates, before, dinitial)
    ]
    sizes = (_KIND[cell], B * T, G, CELLS[cell].states, CELLS[cell].kept, H, D)
    _backward(len(tasks), tasks, walks, sizes, panels, *arrays)
    # (G', H, D, P) by (H, P, D), a gate at a time: the views are what a product of matrices reads as they
    # lie.
    recurrent = dgates[:, :G]
    dR = torch.stack([g.permute(1, 2, 0) @ before.transpose(0, 1) for g in recurrent.unbind(1)])
    dx = dgates if cell != "gru" else dgates[:, [0, 1, 3]]
    dx = dx.view(B, T, G, H, D).to(dh.dtype)
    return dx, dR.to(R.dtype), recurrent.sum(0).to(b.dtype), dinitial


def _plan(cu_seqlens: Tensor | None, batch: int, length: int, reverse: bool, heads: int) -> tuple[Any, Any]:
    """Sequences from the longest to the shortest, and the tasks.

    Returns:
        ``walks (S, 4)``: first token, step, number of tokens, and place in the batch; ``tasks (N, 3)``: head,
        first and last walk. The tasks that take longest are dealt out to all threads' pieces before the
        shorter.
    """
    table = [
        (row * length + (end - 1 if reverse else begin), -1 if reverse else 1, end - begin, place)
        for place, (row, begin, end) in enumerate(spans(cu_seqlens, batch, length))
    ]
    table.sort(key=lambda walk: -walk[2])
    threads = torch.get_num_threads()
    # Four tasks a thread where there is enough to do, in whole blocks of four sequences.
    share = -(-len(table) * heads // (4 * threads)) if threads > 1 else len(table)
    rows = min(ROWS, max(4, -(-share // 4) * 4))
    tasks = [
        (head, begin, min(begin + rows, len(table)))
        for begin in range(0, len(table), rows)
        for head in range(heads)
    ]
    pieces = max(1, min(len(tasks), 4 * threads))
    dealt = [task for piece in range(pieces) for task in tasks[piece::pieces]]
    return np.array(table, np.int64).reshape(-1, 4), np.array(dealt, np.int64).reshape(-1, 3)


def _rows_of_vectors(R: Tensor) -> Tensor:
    """Pad the outputs of each gate to whole vectors: ``(H, G, D, D)`` to ``(H, G·DP, D, 1)``."""
    lanes = BYTES // R.element_size()
    return torch.nn.functional.pad(R, (0, 0, 0, -R.shape[2] % lanes)).flatten(1, 2).unsqueeze(2)


def _panels(M: Tensor, dtype: torch.dtype) -> Any:
    """Bring matrices ``(H, K, G, D)`` to the order in which `accumulate` reads them, ``(H, K·G·DP)``.

    Rows are ``G·DP`` numbers. Panels of four vectors come first, then panels of one.
    """
    lanes = BYTES // M.element_size()
    M = torch.nn.functional.pad(M, (0, -M.shape[3] % lanes)).flatten(2)
    wide = M.shape[2] // (4 * lanes) * 4 * lanes
    parts = (M[:, :, :wide].unflatten(2, (-1, 4 * lanes)), M[:, :, wide:].unflatten(2, (-1, lanes)))
    return as_array(torch.cat([part.transpose(1, 2).flatten(1) for part in parts], 1), dtype)


@jit
def accumulate(out, width, a, stride, depth, M, rows):
    """Add ``a (rows, depth)`` times the panels M to ``out (rows, width)``; rows of a are ``stride`` apart."""
    lanes = BYTES // out.itemsize
    wide = width // (4 * lanes) * 4 * lanes
    for j in range(0, wide, 4 * lanes):
        m = j * depth
        r = 0
        while r + 4 <= rows:
            _four_by_four(out, r * width + j, width, a, r * stride, stride, depth, M, m)
            r += 4
        while r < rows:
            _one_by_four(out, r * width + j, a, r * stride, depth, M, m)
            r += 1
    for j in range(wide, width, lanes):
        m = j * depth
        r = 0
        while r + 4 <= rows:
            _four_by_one(out, r * width + j, width, a, r * stride, stride, depth, M, m)
            r += 4
        while r < rows:
            _one_by_one(out, r * width + j, a, r * stride, depth, M, m)
            r += 1


@jit
def _four_by_four(out, o, width, a, i, stride, depth, M, m):
    lanes = BYTES // out.itemsize
    o1, o2, o3 = o + width, o + 2 * width, o + 3 * width
    i1, i2, i3 = i + stride, i + 2 * stride, i + 3 * stride
    v1, v2, v3 = lanes, 2 * lanes, 3 * lanes
    c00, c01, c02, c03 = load(out, o), load(out, o + v1), load(out, o + v2), load(out, o + v3)
    c10, c11, c12, c13 = load(out, o1), load(out, o1 + v1), load(out, o1 + v2), load(out, o1 + v3)
    c20, c21, c22, c23 = load(out, o2), load(out, o2 + v1), load(out, o2 + v2), load(out, o2 + v3)
    c30, c31, c32, c33 = load(out, o3), load(out, o3 + v1), load(out, o3 + v2), load(out, o3 + v3)
    for k in range(depth):
        at = m + 4 * lanes * k
        m0, m1, m2, m3 = load(M, at), load(M, at + v1), load(M, at + v2), load(M, at + v3)
        y = splat(a, i + k)
        c00, c01, c02, c03 = fma(y, m0, c00), fma(y, m1, c01), fma(y, m2, c02), fma(y, m3, c03)
        y = splat(a, i1 + k)
        c10, c11, c12, c13 = fma(y, m0, c10), fma(y, m1, c11), fma(y, m2, c12), fma(y, m3, c13)
        y = splat(a, i2 + k)
        c20, c21, c22, c23 = fma(y, m0, c20), fma(y, m1, c21), fma(y, m2, c22), fma(y, m3, c23)
        y = splat(a, i3 + k)
        c30, c31, c32, c33 = fma(y, m0, c30), fma(y, m1, c31), fma(y, m2, c32), fma(y, m3, c33)
    _store_four(out, o, lanes, c00, c01, c02, c03)
    _store_four(out, o1, lanes, c10, c11, c12, c13)
    _store_four(out, o2, lanes, c20, c21, c22, c23)
    _store_four(out, o3, lanes, c30, c31, c32, c33)


@jit
def _store_four(out, o, lanes, c0, c1, c2, c3):
    store(out, o, c0)
    store(out, o + lanes, c1)
    store(out, o + 2 * lanes, c2)
    store(out, o + 3 * lanes, c3)


@jit
def _one_by_four(out, o, a, i, depth, M, m):
    lanes = BYTES // out.itemsize
    c0, c1 = load(out, o), load(out, o + lanes)
    c2, c3 = load(out, o + 2 * lanes), load(out, o + 3 * lanes)
    for k in range(depth):
        at = m + 4 * lanes * k
        y = splat(a, i + k)
        c0, c1 = fma(y, load(M, at), c0), fma(y, load(M, at + lanes), c1)
        c2, c3 = fma(y, load(M, at + 2 * lanes), c2), fma(y, load(M, at + 3 * lanes), c3)
    _store_four(out, o, lanes, c0, c1, c2, c3)


@jit
def _four_by_one(out, o, width, a, i, stride, depth, M, m):
    lanes = BYTES // out.itemsize
    c0, c1 = load(out, o), load(out, o + width)
    c2, c3 = load(out, o + 2 * width), load(out, o + 3 * width)
    for k in range(depth):
        y = load(M, m + lanes * k)
        c0, c1 = fma(splat(a, i + k), y, c0), fma(splat(a, i + stride + k), y, c1)
        c2, c3 = fma(splat(a, i + 2 * stride + k), y, c2), fma(splat(a, i + 3 * stride + k), y, c3)
    _store_four(out, o, width, c0, c1, c2, c3)


@jit
def _one_by_one(out, o, a, i, depth, M, m):
    lanes = BYTES // out.itemsize
    c = load(out, o)
    for k in range(depth):
        c = fma(splat(a, i + k), load(M, m + lanes * k), c)
    store(out, o, c)


@jit
def _load_states(h, held, state, walks, begin, end, N, H, head, D, DP):
    """Copy the states of walks ``begin … end−1`` to rows: the first to ``h``, the others to ``held``."""
    for r in range(end - begin):
        for q in range(N):
            at = ((walks[begin + r, 3] * N + q) * H + head) * D
            for d in range(D):
                if q == 0:
                    h[r * DP + d] = state[at + d]
                else:
                    held[(r * (N - 1) + q - 1) * DP + d] = state[at + d]


@jit
def _save_states(state, h, held, walks, begin, end, N, H, head, D, DP):
    """Copy back what `_load_states` copied."""
    for r in range(end - begin):
        for q in range(N):
            at = ((walks[begin + r, 3] * N + q) * H + head) * D
            for d in range(D):
                if q == 0:
                    state[at + d] = h[r * DP + d]
                else:
                    state[at + d] = held[(r * (N - 1) + q - 1) * DP + d]


@kernel("gated_rnn")
def _forward(first, last, tasks, walks, sizes, panels, x, bias, state, out, final, gates):
    keep = gates.size > 0
    kind, P, G, N, K, H, D = sizes
    lanes, DP = BYTES // x.itemsize, padded(D, x)
    W = G * DP
    for task in range(first, last):
        head, begin, end = tasks[task]
        rows = end - begin
        pre, h = np.zeros(rows * W, x.dtype), np.zeros(rows * DP, x.dtype)
        held, added = np.zeros(rows * (N - 1) * DP, x.dtype), np.zeros(W, x.dtype)
        for g in range(G):
            for d in range(D):
                added[g * DP + d] = bias[(g * H + head) * D + d]
        _load_states(h, held, state, walks, begin, end, N, H, head, D, DP)
        M = panels[head]
        active = rows
        for p in range(walks[begin, 2]):
            while walks[begin + active - 1, 2] <= p:
                active -= 1
            for r in range(active):
                start, step = walks[begin + r, 0], walks[begin + r, 1]
                at = ((start + p * step) * G * H + head) * D
                for g in range(G):
                    # The GRU's reset gate lies between its last input and its last recurrent sum.
                    own = kind != 1 or g < 2
                    for d in range(0, DP, lanes):
                        to, here = g * DP + d, at + g * H * D + d
                        y = load(added, to)
                        if own:
                            y = add(y, get(x, here, D - d, zeros(x)))
                        store(pre, r * W + to, y)
                        prefetch(x, here + step * G * H * D)
            accumulate(pre, W, h, DP, D, M, active)
            for r in range(active):
                t = walks[begin + r, 0] + p * walks[begin + r, 1]
                at = (t * G * H + head) * D
                forward_row(kind, pre, r, h, held, x, at, H * D, gates, keep, (head * P + t) * K * D, D, DP)
                for d in range(0, DP, lanes):
                    put(out, (t * H + head) * D + d, D - d, load(h, r * DP + d))
        _save_states(final, h, held, walks, begin, end, N, H, head, D, DP)


@kernel("gated_rnn gradients")
def _backward(first, last, tasks, walks, sizes, panels, dy, dstate, gates, state, dgates, before, dinitial):
    kind, P, G, N, K, H, D = sizes
    lanes, DP = BYTES // dy.itemsize, padded(D, dy)
    W, planes = G * DP, G + (1 if kind == 1 else 0)
    for task in range(first, last):
        head, begin, end = tasks[task]
        rows = end - begin
        dpre, dh = np.zeros(rows * W, dy.dtype), np.zeros(rows * DP, dy.dtype)
        held = np.zeros(rows * (N - 1) * DP, dy.dtype)
        _load_states(dh, held, dstate, walks, begin, end, N, H, head, D, DP)
        M = panels[head]
        active = 0
        for p in range(walks[begin, 2] - 1, -1, -1):
            while active < rows and walks[begin + active, 2] > p:
                active += 1
            for r in range(active):
                start, step, n, place = walks[begin + r]
                t = start + p * step
                here = (t * H + head) * D
                source, c_at = gates, (head * P + t - step) * K * D + (4 * D if K > 1 else 0)
                n_at = c_at + D
                if p == 0:
                    source, c_at = state, ((place * N + min(N - 1, 1)) * H + head) * D
                    n_at = c_at + H * D
                    for d in range(D):
                        before[here + d] = state[(place * N * H + head) * D + d]
                after = here + step * H * D if p + 1 < n else -1
                at, to = (head * P + t) * K * D, (t * planes * H + head) * D
                for d in range(0, K * D, lanes):
                    prefetch(gates, at - step * K * D + d)
                backward_row(
                    kind, dpre, r, dh, held, dy, here, after, gates, at, source, c_at, n_at, dgates, to,
                    H * D, before, D, DP,
                )  # fmt: skip
            accumulate(dh, DP, dpre, W, W, M, active)
        _save_states(dinitial, dh, held, walks, begin, end, N, H, head, D, DP)
