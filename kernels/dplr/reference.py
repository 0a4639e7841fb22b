"""Generalised delta rule, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor

from ..matrix_state import state_dtype, token_decay
from ..token_loop import token_loop


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
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    dtype = state_dtype(v)
    g = token_decay(decay, q)
    g = q.new_zeros(*q.shape[:3], 1) if g is None else g
    if initial_state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = v.new_zeros(sequences, *q.shape[2:], v.shape[-1])

    def step(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = advance(k, v, a, b, decay, state)
        return scale * torch.einsum("bhk,bhkv->bhv", q, state), state

    inputs = [x.to(dtype) for x in (q, k, v, a, b)]
    inputs.append(g.to(dtype).exp())
    o, state = token_loop(step, inputs, initial_state.to(dtype), cu_seqlens, reverse, inputs[2])
    return o.to(v.dtype), state


def advance(k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """Give the next state from one token's k, a, b ``(B, H, K)``, v and decay factors ``(B, H, 1 or K)``."""
    retrieved = torch.einsum("bhk,bhkv->bhv", a, state)
    return decay[..., None] * state + b[..., None] * retrieved[..., None, :] + k[..., None] * v[..., None, :]
