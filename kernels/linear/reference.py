"""Linear recurrence, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor

from ..matrix_state import state_dtype, token_decay
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
    B, T, H, K = q.shape
    V, dtype = v.shape[-1], state_dtype(v)
    g = token_decay(decay, q)
    q, k, x = q.to(dtype), k.to(dtype), v.to(dtype)
    g = q.new_zeros(B, T, H, 1) if g is None else g.to(dtype)
    if cu_seqlens is None:
        state = q.new_zeros(B, H, K, V) if initial_state is None else initial_state.to(dtype)
        o, state = _run(q, k, x, g, scale, state, reverse)
        return o.to(v.dtype), state
    outputs, states = [x.new_empty(1, 0, H, V)], [x.new_empty(0, H, K, V)]
    for i, (_, begin, end) in enumerate(spans(cu_seqlens, B, T)):
        state = q.new_zeros(1, H, K, V) if initial_state is None else initial_state[i : i + 1].to(dtype)
        token = slice(begin, end)
        o, state = _run(q[:, token], k[:, token], x[:, token], g[:, token], scale, state, reverse)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1).to(v.dtype), torch.cat(states)


def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    tokens = list(zip(q.unbind(1), k.unbind(1), v.unbind(1), g.exp().unbind(1)))
    outputs = []
    for q_t, k_t, v_t, a_t in reversed(tokens) if reverse else tokens:
        state = a_t[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None] * state).sum(-2))
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, 1) if outputs else v, state.clone() if not outputs else state
