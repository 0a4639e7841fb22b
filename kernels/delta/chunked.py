"""Delta rule in plain PyTorch, on any device: a triangular solve within a chunk, a recurrence between chunks.

Within a chunk that starts from state S, with ``M_ij = Σ_k k_i k_j exp(g_{j+1} + … + g_i)`` for i > j, the
errors e solve ``(I + M Diag(β)) e = v − (k ∘ start) S`` by forward substitution, and u = β e is written.
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
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(o, final_state, error)``; error ``(B, T, H, V)`` is what a token did not yet predict."""
    o, error = v.new_empty(v.shape), v.new_empty(v.shape, dtype=state_dtype(v))
    b, g = beta[..., None], _decay(decay, q)
    finals = []
    for begin, end, state in sequences(q, v, cu_seqlens, initial_state):
        for bounds in walk(begin, end, chunk_size(g), reverse):
            q_c, k_c, v_c, b_c, g_c = cut((q, k, v, b, g), bounds, reverse, state.dtype)
            decays = ChunkDecay(g_c)
            system = _system(decays.scores(k_c, k_c).tril(-1), b_c)
            right = v_c - (k_c * decays.start) @ state
            e_c = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            u_c = b_c * e_c
            o_c = decays.scores(q_c, k_c) @ u_c + (q_c * decays.start) @ state
            put(o, scale * o_c, bounds, reverse)
            put(error, e_c, bounds, reverse)
            state = decays.whole * state + (k_c * decays.end).mT @ u_c
        finals.append(state)
    return o, join(finals, q, v), error


def backward(
    do: Tensor,
    dstate: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, beta, decay and initial_state."""
    dtype = state_dtype(v)
    b, g = beta[..., None], _decay(decay, q)
    dq, dk, dv, db = (x.new_empty(x.shape) for x in (q, k, v, b))
    dg = q.new_empty(q.shape, dtype=dtype)
    initials = []
    for i, (begin, end, state) in enumerate(sequences(q, v, cu_seqlens, initial_state)):
        chunks = walk(begin, end, chunk_size(g), reverse)
        states = []
        for bounds in chunks:
            k_c, e_c, b_c, g_c = cut((k, error, b, g), bounds, reverse, dtype)
            decays = ChunkDecay(g_c)
            states.append(state)
            state = decays.whole * state + (k_c * decays.end).mT @ (b_c * e_c)
        d = dstate if cu_seqlens is None else dstate[i : i + 1]
        for bounds, state in zip(reversed(chunks), reversed(states)):
            pieces = cut((q, k, error, b, g, do), bounds, reverse, dtype)
            q_c, k_c, e_c, b_c, g_c, do_c = pieces
            do_c = scale * do_c
            decays = ChunkDecay(g_c)
            u_c = b_c * e_c
            pairs = decays.scores(k_c, k_c).tril(-1)
            du = decays.scores(q_c, k_c).mT @ do_c + (k_c * decays.end) @ d
            de = torch.linalg.solve_triangular(
                _system(pairs, b_c).mT, b_c * du, upper=True, unitriangular=True
            )
            put(dv, de, bounds, reverse)
            put(db, ((du - pairs.mT @ de) * e_c).sum(-1, keepdim=True), bounds, reverse)
            dscores = (do_c @ u_c.mT).tril()
            itself = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
            dq_c, dk_c = decays.scores_backward(q_c, k_c, dscores.tril(-1))
            dleft, dright = decays.scores_backward(k_c, k_c, -(de @ u_c.mT).tril(-1))
            dq_old = (do_c @ state.mT) * decays.start
            dk_old = -(de @ state.mT) * decays.start
            dk_new = (u_c @ d.mT) * decays.end
            put(dq, dq_c + dq_old + itself * k_c, bounds, reverse)
            put(dk, dk_c + dleft + dright + dk_old + dk_new + itself * q_c, bounds, reverse)
            if decay is not None:
                rows = q_c * (dq_c + dq_old) + k_c * (dleft + dk_old - dk_c - dright)
                through = (d * decays.whole * state).sum(-1)
                put(dg, decays.gradient(g_c, rows, k_c * dk_new, through), bounds, reverse)
            d = decays.whole * d + (q_c * decays.start).mT @ do_c - (k_c * decays.start).mT @ de
        initials.append(d)
    ddecay = None if decay is None else fold_decay_grad(dg, decay)
    dinitial = None if initial_state is None else join(initials, q, v).to(initial_state.dtype)
    return dq, dk, dv, db[..., 0].clone(), ddecay, dinitial


def _decay(decay: Tensor | None, q: Tensor) -> Tensor:
    g = token_decay(decay, q)
    return q.new_zeros(*q.shape[:3], 1) if g is None else g


def _system(pairs: Tensor, b: Tensor) -> Tensor:
    """Matrix ``I + M Diag(β)``; the solver takes the unit diagonal for granted."""
    return pairs * b.mT
