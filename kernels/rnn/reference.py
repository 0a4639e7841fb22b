"""Gated recurrent cells, one token at a time: the oracle. Differentiable by autograd."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..token_loop import token_loop


def _recurrent(R: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("ghij,bhj->bghi", R.to(h.dtype), h) + b.to(h.dtype)


def lstm_step(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the LSTM: ``c = f c + i g``, ``h = o tanh(c)``; gates in the order i, f, g, o."""
    h, c = state.unbind(1)
    i, f, g, o = (x.to(h.dtype) + _recurrent(R, b, h)).unbind(1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h.to(x.dtype), torch.stack((h, c), 1)


def gru_step(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the GRU: ``h = (1 − z) n + z h``; gates in the order r, z, n."""
    h = state[:, 0]
    x_r, x_z, x_n = x.to(h.dtype).unbind(1)
    r_r, r_z, r_n = _recurrent(R, b, h).unbind(1)
    z = (x_z + r_z).sigmoid()
    n = (x_n + (x_r + r_r).sigmoid() * r_n).tanh()
    h = (1 - z) * n + z * h
    return h.to(x.dtype), h[:, None]


def slstm_step(
    x: Tensor, R: Tensor, b: Tensor, state: Tensor, *, exponential: bool = False
) -> tuple[Tensor, Tensor]:
    """Advance the sLSTM: ``c = f' c + i' z``, ``n = f' n + i'``, ``h = o c / n``; gates in order i, f, z, o.

    ``m`` is the larger of ``log f + m`` and ``i``, and both exponential gates are taken relative to it.
    """
    h, c, n, m = state.unbind(1)
    i, f, z, o = (x.to(h.dtype) + _recurrent(R, b, h)).unbind(1)
    # Where nothing was written yet, nothing is there to forget, whatever m says.
    past = torch.where(n == 0, -torch.inf, (f if exponential else logsigmoid(f)) + m)
    m = torch.where(past >= i, past, i)
    forget, enter = (past - m).exp(), (i - m).exp()
    c = forget * c + enter * z.tanh()
    n = forget * n + enter
    h = o.sigmoid() * c / n
    return h.to(x.dtype), torch.stack((h, c, n, m), 1)


def elman_step(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance Elman's network: ``h = tanh(x + R h + b)``."""
    h = state[:, 0]
    h = (x[:, 0].to(h.dtype) + _recurrent(R, b, h)[:, 0]).tanh()
    return h.to(x.dtype), h[:, None]


STEPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "slstm": slstm_step,
    "slstm_exp": partial(slstm_step, exponential=True),
    "elman": elman_step,
}


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
