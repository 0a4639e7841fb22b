"""Gated recurrent cells, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor

from ..token_loop import token_loop


def lstm_step(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the LSTM: ``c = f c + i g``, ``h = o tanh(c)``; gates in the order i, f, g, o."""
    h, c = state.unbind(1)
    recurrent = torch.einsum("ghij,bhj->bghi", R.to(h.dtype), h) + b.to(h.dtype)
    i, f, g, o = (x.to(h.dtype) + recurrent).unbind(1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h.to(x.dtype), torch.stack((h, c), 1)


def gru_step(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the GRU: ``h = (1 − z) n + z h``; gates in the order r, z, n."""
    h = state[:, 0]
    recurrent = torch.einsum("ghij,bhj->bghi", R.to(h.dtype), h) + b.to(h.dtype)
    x_r, x_z, x_n = x.to(h.dtype).unbind(1)
    r_r, r_z, r_n = recurrent.unbind(1)
    z = (x_z + r_z).sigmoid()
    n = (x_n + (x_r + r_r).sigmoid() * r_n).tanh()
    h = (1 - z) * n + z * h
    return h.to(x.dtype), h[:, None]


STEPS = {"lstm": lstm_step, "gru": gru_step}


def forward(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(h, final_state)``."""

    def advance(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return STEPS[cell](x, R, b, state)

    return token_loop(advance, (x,), state, cu_seqlens, reverse, x[:, :, 0].clone())
