"""Short causal depthwise convolution."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference

Activation = Literal["silu"]


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``y_t = act(Σ_j weight[:, j] x_{t-W+1+j} + bias)``, each channel by itself.

    Args:
        x: ``(B, T, D)``.
        weight: ``(D, W)``; the last tap meets the token itself.
        bias: ``(D,)``.
        activation: ``None`` or ``"silu"``.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1; no tap crosses them.
        initial_state: ``(B, D, W-1)``, or ``(S, D, W-1)`` with ``cu_seqlens``: the inputs before the first
            token, oldest first; ``None`` is zeros.
        return_final_state: also return the last W-1 inputs, oldest first.
        reverse: run from the last token to the first, so that token t sees t … t+W-1 and "oldest" means
            latest; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``y (B, T, D)`` in the type of x, or ``(y, final_state)``; states are float32 (float64 for float64 x).

    Raises:
        ValueError: shapes that do not fit, an unknown activation, ``cu_seqlens`` that does not rise from 0 to
            T, or a backend that cannot serve the call.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, T, D), got {shape_of(x)}")
    _check_filter(x, weight, bias, activation)
    state_shape = (x.shape[2], weight.shape[1] - 1)
    check_call(cu_seqlens, initial_state, backend, batch=x.shape[0], state=state_shape, names="D, W-1")
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        state = _state(x, weight, cu_seqlens, initial_state)
        y, state = reference.forward(x, weight, bias, activation, state, cu_seqlens, reverse)
    else:
        y, state = _forward(x, weight, bias, activation, cu_seqlens, initial_state, reverse, backend)
    return (y, state) if return_final_state else y


def short_convolution_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance `short_convolution` by one token.

    Args:
        x: ``(B, D)``.
        weight: ``(D, W)``.
        bias: ``(D,)`` or ``None``.
        state: ``(B, D, W-1)``, oldest first; it is not modified.
        activation: ``None`` or ``"silu"``.

    Returns:
        ``(y, state)``: ``(B, D)`` in the type of x, and the next state.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
    """
    if x.ndim != 2:
        raise ValueError(f"one token needs x (B, D), got {shape_of(x)}")
    _check_filter(x, weight, bias, activation)
    check_state("state", state, (*x.shape, weight.shape[1] - 1), "D, W-1")
    return reference.step(x, weight, bias, state.to(accumulator(x.dtype)), activation)


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_floating(x=x, weight=weight)
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] < 1:
        raise ValueError(f"weight must be (D, W) with the D of x {shape_of(x)}, got {shape_of(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (D,) with the D of x {shape_of(x)}, got {shape_of(bias)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} is unknown: choose None or 'silu'")


def _state(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(accumulator(x.dtype))
    shape = (num_sequences(cu_seqlens, x.shape[0]), x.shape[2], weight.shape[1] - 1)
    return x.new_zeros(shape, dtype=accumulator(x.dtype))


@torch.library.custom_op("mainstem::short_convolution", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("conv", backend, x, weight)
    state = _state(x, weight, cu_seqlens, initial_state)
    y, state = kernel.forward(x, weight, bias, activation, state, cu_seqlens, reverse)
    return y, state


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (num_sequences(cu_seqlens, x.shape[0]), x.shape[2], weight.shape[1] - 1)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=accumulator(x.dtype))


@torch.library.custom_op("mainstem::short_convolution_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = implementation("conv", backend, x, weight)
    state = _state(x, weight, cu_seqlens, initial_state)
    dx, dweight, dbias, dinitial = kernel.backward(
        dy, dstate, x, weight, bias, activation, state, cu_seqlens, reverse
    )
    return dx, dweight, dbias, dinitial


@_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(weight.shape[:1], dtype=weight.dtype if bias is None else bias.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate.new_empty(dstate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.activation, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens, initial_state)


def _autograd(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, cu_seqlens, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dinitial = _backward(
        dy, dstate, x, weight, bias, ctx.activation, cu_seqlens, initial_state, ctx.reverse, ctx.backend
    )
    dbias = None if bias is None else dbias
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return dx, dweight, dbias, None, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
