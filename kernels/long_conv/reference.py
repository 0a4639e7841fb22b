"""Long convolution, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor

from ..token_loop import token_loop


def step(x: Tensor, kernel: Tensor, skip: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the convolution of ``x (B, D)`` by one token; the state ``(B, D, L-1)`` is the last inputs."""
    newest = x.to(state.dtype)
    window = torch.cat((state, newest[..., None]), -1)
    y = (window * kernel.to(state.dtype).flip(-1)).sum(-1)
    if skip is not None:
        y = y + skip.to(state.dtype) * newest
    return y.to(x.dtype), window[..., 1:]


def forward(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""

    def advance(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return step(x, kernel, skip, state)

    return token_loop(advance, (x,), state, cu_seqlens, reverse, x.clone())
