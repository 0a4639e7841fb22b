"""Linear recurrence in plain PyTorch, on any device: quadratic within a chunk, recurrent between chunks."""

import torch
from torch import Tensor

from ..chunk_decay import ChunkDecay, chunk_size, cut, put, walk
from ..matrix_state import fold_decay_grad, state_dtype, token_decay
from ..sequences import spans


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    o = v.new_empty(v.shape)
    g = _decay(decay, q)
    finals = []
    for begin, end, state in sequences(q, v, cu_seqlens, initial_state):
        for bounds in walk(begin, end, chunk_size(g), reverse):
            q_c, k_c, v_c, g_c = cut((q, k, v, g), bounds, reverse, state.dtype)
            decays = ChunkDecay(g_c)
            o_c = decays.scores(q_c, k_c) @ v_c + (q_c * decays.start) @ state
            put(o, scale * o_c, bounds, reverse)
            state = decays.whole * state + (k_c * decays.end).mT @ v_c
        finals.append(state)
    return o, join(finals, q, v)


def backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, decay and initial_state."""
    dtype = state_dtype(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = q.new_empty(q.shape, dtype=dtype)
    g = _decay(decay, q)
    initials = []
    for i, (begin, end, state) in enumerate(sequences(q, v, cu_seqlens, initial_state)):
        chunks = walk(begin, end, chunk_size(g), reverse)
        states = []
        for bounds in chunks:
            k_c, v_c, g_c = cut((k, v, g), bounds, reverse, dtype)
            decays = ChunkDecay(g_c)
            states.append(state)
            state = decays.whole * state + (k_c * decays.end).mT @ v_c
        d = dstate if cu_seqlens is None else dstate[i : i + 1]
        for bounds, state in zip(reversed(chunks), reversed(states)):
            inputs = (q, k, v, do, g)
            q_c, k_c, v_c, do_c, g_c = cut(inputs, bounds, reverse, dtype)
            do_c = scale * do_c
            decays = ChunkDecay(g_c)
            dscores = (do_c @ v_c.mT).tril()
            itself = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
            dq_old = (do_c @ state.mT) * decays.start
            dk_new = (v_c @ d.mT) * decays.end
            dq_c, dk_c = decays.scores_backward(q_c, k_c, dscores.tril(-1))
            put(dv, decays.scores(q_c, k_c).mT @ do_c + (k_c * decays.end) @ d, bounds, reverse)
            put(dq, dq_c + dq_old + itself * k_c, bounds, reverse)
            put(dk, dk_c + dk_new + itself * q_c, bounds, reverse)
            if decay is not None:
                rows_c = q_c * (dq_c + dq_old) - k_c * dk_c
                through = (d * decays.whole * state).sum(-1)
                put(dg, decays.gradient(g_c, rows_c, k_c * dk_new, through), bounds, reverse)
            d = decays.whole * d + (q_c * decays.start).mT @ do_c
        initials.append(d)
    ddecay = None if decay is None else fold_decay_grad(dg, decay)
    dinitial = None if initial_state is None else join(initials, q, v).to(initial_state.dtype)
    return dq, dk, dv, ddecay, dinitial


def _decay(decay: Tensor | None, q: Tensor) -> Tensor:
    g = token_decay(decay, q)
    return q.new_zeros(*q.shape[:3], 1) if g is None else g


def sequences(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None
) -> list[tuple[int, int, Tensor]]:
    """List begin, end and initial state: the whole batch at once, or one entry a packed sequence."""
    B, T, H, K = q.shape
    dtype = state_dtype(v)
    entries = [(0, T)] if cu_seqlens is None else [(begin, end) for _, begin, end in spans(cu_seqlens, B, T)]
    size = B if cu_seqlens is None else 1
    found = []
    for i, (begin, end) in enumerate(entries):
        if initial_state is None:
            state = q.new_zeros((size, H, K, v.shape[-1]), dtype=dtype)
        else:
            state = initial_state[i * size : (i + 1) * size].to(dtype)
        found.append((begin, end, state))
    return found


def join(states: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    """Join the states of all sequences to ``(S, H, K, V)``, which shares memory with none of them."""
    if not states:
        return v.new_empty((0, q.shape[2], q.shape[3], v.shape[3]), dtype=state_dtype(v))
    return torch.cat(states) if len(states) > 1 else states[0].clone()
