"""Generalised delta rule in plain PyTorch, on any device: a triangular solve within a chunk, a recurrence
between.

With ``r_t = S_{t-1}ᵀ a_t`` the state is written twice a token, ``S_t = Diag(e^{g_t}) S_{t-1} + b_t r_tᵀ + k_t
v_tᵀ``, and read twice: by q_t for the output, by a_{t+1} for the next r. Both readers of a place in time meet
both of its writers under the same decays, so that they are stacked: readers (q_t, a_{t+1}), writers (b_t,
k_t), values (r_t, v_t).
"""

import torch
from torch import Tensor

from ..chunk_decay import ChunkDecay, chunk_size, cut, put, walk
from ..linear.chunked import join, sequences
from ..matrix_state import fold_decay_grad, state_dtype, token_decay


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(o, final_state, retrieved)``; retrieved ``(B, T, H, V)`` is ``r_t = S_{t-1}ᵀ a_t``."""
    o, retrieved = v.new_empty(v.shape), v.new_empty(v.shape, dtype=state_dtype(v))
    g = _decay(decay, q)
    finals = []
    for begin, end, state in sequences(q, v, cu_seqlens, initial_state):
        for bounds in walk(begin, end, chunk_size(g), reverse):
            pieces = cut((q, k, v, a, b, g), bounds, reverse, state.dtype)
            q_c, k_c, v_c, a_c, b_c, g_c = pieces
            decays = ChunkDecay(g_c)
            readers, writers = torch.stack([q_c, _earlier(a_c)]), torch.stack([b_c, k_c])
            (qb, qk), (ab, ak) = decays.scores(readers[:, None], writers)
            old = (readers * decays.start) @ state
            right = _later(ak @ v_c + old[1], a_c[..., :1, :] @ state)
            r_c = torch.linalg.solve_triangular(_system(ab), right, upper=False, unitriangular=True)
            put(o, scale * (qb @ r_c + qk @ v_c + old[0]), bounds, reverse)
            put(retrieved, r_c, bounds, reverse)
            state = decays.whole * state + _written(writers * decays.end, r_c, v_c)
        finals.append(state)
    return o, join(finals, q, v), retrieved


def backward(
    do: Tensor,
    dstate: Tensor,
    retrieved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, a, b, decay and initial_state."""
    dtype = state_dtype(v)
    g = _decay(decay, q)
    dq, dk, dv, da, db = (x.new_empty(x.shape) for x in (q, k, v, a, b))
    dg = q.new_empty(q.shape, dtype=dtype)
    initials = []
    for i, (begin, end, state) in enumerate(sequences(q, v, cu_seqlens, initial_state)):
        chunks = walk(begin, end, chunk_size(g), reverse)
        states = []
        for bounds in chunks:
            k_c, v_c, b_c, r_c, g_c = cut((k, v, b, retrieved, g), bounds, reverse, dtype)
            decays = ChunkDecay(g_c)
            states.append(state)
            state = decays.whole * state + _written(torch.stack([b_c, k_c]) * decays.end, r_c, v_c)
        d = dstate if cu_seqlens is None else dstate[i : i + 1]
        for bounds, state in zip(reversed(chunks), reversed(states)):
            pieces = cut((q, k, v, a, b, g, retrieved, do), bounds, reverse, dtype)
            q_c, k_c, v_c, a_c, b_c, g_c, r_c, do_c = pieces
            do_c = scale * do_c
            decays = ChunkDecay(g_c)
            readers, writers = torch.stack([q_c, _earlier(a_c)]), torch.stack([b_c, k_c])
            values = torch.stack([r_c, v_c])
            (qb, qk), (ab, ak) = decays.scores(readers[:, None], writers)
            dr, dv_c = torch.stack([qb, qk]).mT @ do_c + (writers * decays.end) @ d
            # The gradient of r, once what r itself leads to is counted in.
            w_c = torch.linalg.solve_triangular(_system(ab).mT, dr, upper=True, unitriangular=True)
            w_next = _earlier(w_c)
            put(dv, dv_c + ak.mT @ w_next, bounds, reverse)
            outputs = torch.stack([do_c, w_next])
            dscores = (outputs[:, None] @ values.mT).tril()
            itself = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
            dx, dy = decays.scores_backward(readers[:, None], writers, dscores.tril(-1))
            dx, dy = dx.sum(1), dy.sum(0)
            dx_old = (outputs @ state.mT) * decays.start
            dy_new = (values @ d.mT) * decays.end
            dreaders = dx + dx_old + (itself * writers).sum(1)
            dwriters = dy + dy_new + (itself * readers[:, None]).sum(0)
            put(dq, dreaders[0], bounds, reverse)
            put(da, _later(dreaders[1], w_c[..., :1, :] @ state.mT), bounds, reverse)
            put(db, dwriters[0], bounds, reverse)
            put(dk, dwriters[1], bounds, reverse)
            if decay is not None:
                rows = (readers * (dx + dx_old) - writers * dy).sum(0)
                through = (d * decays.whole * state).sum(-1)
                columns = (writers * dy_new).sum(0)
                put(dg, decays.gradient(g_c, rows, columns, through), bounds, reverse)
            d = decays.whole * d + _written(readers * decays.start, do_c, w_next)
            d = d + a_c[..., :1, :].mT @ w_c[..., :1, :]
        initials.append(d)
    ddecay = None if decay is None else fold_decay_grad(dg, decay)
    dinitial = None if initial_state is None else join(initials, q, v).to(initial_state.dtype)
    return dq, dk, dv, da, db, ddecay, dinitial


def _decay(decay: Tensor | None, q: Tensor) -> Tensor:
    g = token_decay(decay, q)
    return q.new_zeros(*q.shape[:3], 1) if g is None else g


def _earlier(x: Tensor) -> Tensor:
    """Move every token of ``(…, C, ·)`` one place earlier; zeros at the end."""
    return torch.cat([x[..., 1:, :], torch.zeros_like(x[..., :1, :])], -2)


def _later(x: Tensor, first: Tensor) -> Tensor:
    """Move every token of ``(…, C, ·)`` one place later; ``first`` (…, 1, ·) at the start."""
    return torch.cat([first, x[..., :-1, :]], -2)


def _system(ab: Tensor) -> Tensor:
    """Matrix of the equations for r, from what a_{t+1} finds of each b; the solver takes its unit diagonal
    for granted.
    """
    return -_later(ab, torch.zeros_like(ab[..., :1, :]))


def _written(pair: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sum over tokens of ``pair[0] firstᵀ + pair[1] secondᵀ``."""
    return pair[0].mT @ first + pair[1].mT @ second
