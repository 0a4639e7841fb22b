"""Short convolution, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..token_loop import token_loop


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Advance the convolution of ``x (B, D)`` by one token; the state ``(B, D, W-1)`` is the last inputs."""
    window = torch.cat((state, x.to(state.dtype)[..., None]), -1)
    y = (window * weight.to(state.dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(state.dtype)
    if activation == "silu":
        y = silu(y)
    return y.to(x.dtype), window[..., 1:]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""

    def advance(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return step(x, weight, bias, state, activation)

    return token_loop(advance, (x,), state, cu_seqlens, reverse, x.clone())
