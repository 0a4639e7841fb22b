"""Short convolution in plain PyTorch: one multiply-add of the shifted input a tap; backward by hand."""

import torch
from torch import Tensor

from ..prefix import Prefix, flip_sequences, owned


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
    if reverse:
        cu_seqlens, [state], [x] = flip_sequences(cu_seqlens, [state], [x])
    prefix = Prefix.of(cu_seqlens, x.shape[0], x.shape[1], weight.shape[1] - 1, x.device)
    inputs = prefix.join(state.transpose(1, 2), x)
    y = _convolve(inputs, weight, bias)
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    y, final = prefix.split(y)[1].to(x.dtype), prefix.tails(inputs).transpose(1, 2)
    if reverse:
        _, [final], [y] = flip_sequences(cu_seqlens, [final], [y])
    return owned(y), owned(final)


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dweight, dbias, dinitial)``."""
    if reverse:
        cu_seqlens, [state, dstate], [x, dy] = flip_sequences(cu_seqlens, [state, dstate], [x, dy])
    width = weight.shape[1]
    prefix = Prefix.of(cu_seqlens, x.shape[0], x.shape[1], width - 1, x.device)
    inputs = prefix.join(state.transpose(1, 2), x)
    # Rows that hold a state have no output, hence no gradient: nothing crosses from sequence to sequence.
    grad = prefix.join(torch.zeros_like(state.transpose(1, 2)), dy)
    if activation == "silu":
        y = _convolve(inputs, weight, bias)
        gate = y.sigmoid()
        grad = grad * gate * (1 + y * (1 - gate))
    taps = weight.to(grad.dtype).unbind(1)
    length = grad.shape[1]
    dinputs, dweight = torch.zeros_like(inputs), []
    for tap, delay in zip(taps, range(width - 1, -1, -1)):
        dinputs[:, : length - delay].addcmul_(grad[:, delay:], tap)
        dweight.append((grad[:, delay:] * inputs[:, : length - delay]).sum((0, 1)))
    prefix.add_to_tails(dinputs, dstate.transpose(1, 2))
    dinitial, dx = prefix.split(dinputs)
    dbias = grad.sum((0, 1)).to(weight.dtype if bias is None else bias.dtype)
    dx, dinitial = dx.to(x.dtype), dinitial.transpose(1, 2)
    if reverse:
        _, [dinitial], [dx] = flip_sequences(cu_seqlens, [dinitial], [dx])
    return owned(dx), torch.stack(dweight, 1).to(weight.dtype), dbias, owned(dinitial)


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``(B, T, D)`` with zeros before the first row; rows that hold a state come out meaningless."""
    taps = weight.to(inputs.dtype).unbind(1)
    length = inputs.shape[1]
    y = inputs * taps[-1]
    for tap, delay in zip(taps, range(len(taps) - 1, 0, -1)):
        y[:, delay:].addcmul_(inputs[:, : length - delay], tap)
    return y if bias is None else y.add_(bias.to(y.dtype))
