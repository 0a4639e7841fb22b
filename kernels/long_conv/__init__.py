"""Long causal depthwise convolution."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference


def long_convolution(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``y_t = Σ_{j<L} kernel_j ⊙ x_{t-j} + skip ⊙ x_t``, each channel by itself, in O(T log L).

    Romero et al., *CKConv* (ICLR 2022), arXiv:2102.02611; the convolution form of any time-invariant state
    space model. Long filters go through a Fourier transform, whose rounding spreads over a block of a few L
    tokens: an output then depends on later inputs of its own sequence by about one unit in the last place.
    Short ones (some 100 taps, or as few tokens) are summed directly, without that.

    Args:
        x: ``(B, T, D)``.
        kernel: ``(D, L)``; the first tap meets the token itself.
        skip: ``(D,)``; ``None`` is zeros.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1; no tap crosses them.
        initial_state: ``(B, D, L-1)``, or ``(S, D, L-1)`` with ``cu_seqlens``: the inputs before the first
            token, oldest first; ``None`` is zeros.
        return_final_state: also return the last L-1 inputs, oldest first.
        reverse: run from the last token to the first, so that token t sees t … t+L-1 and "oldest" means
            latest; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"`` or ``"chunked"``, which is PyTorch's Fourier transform: cuFFT on
            a GPU, where no kernel of our own would be faster.

    Returns:
        ``y (B, T, D)`` in the type of x, or ``(y, final_state)``; states are float32 (float64 for float64 x).

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, T, D), got {shape_of(x)}")
    _check_filter(x, kernel, skip)
    state_shape = (x.shape[2], kernel.shape[1] - 1)
    check_call(cu_seqlens, initial_state, backend, batch=x.shape[0], state=state_shape, names="D, L-1")
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        state = _state(x, kernel, cu_seqlens, initial_state)
        y, state = reference.forward(x, kernel, skip, state, cu_seqlens, reverse)
    else:
        y, state = _forward(x, kernel, skip, cu_seqlens, initial_state, return_final_state, reverse, backend)
    return (y, state) if return_final_state else y


def long_convolution_step(
    x: Tensor, kernel: Tensor, skip: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance `long_convolution` by one token, in O(L).

    Args:
        x: ``(B, D)``.
        kernel: ``(D, L)``.
        skip: ``(D,)`` or ``None``.
        state: ``(B, D, L-1)``, oldest first; it is not modified.

    Returns:
        ``(y, state)``: ``(B, D)`` in the type of x, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"one token needs x (B, D), got {shape_of(x)}")
    _check_filter(x, kernel, skip)
    check_state("state", state, (*x.shape, kernel.shape[1] - 1), "D, L-1")
    return reference.step(x, kernel, skip, state.to(accumulator(x.dtype)))


def _check_filter(x: Tensor, kernel: Tensor, skip: Tensor | None) -> None:
    check_floating(x=x, kernel=kernel)
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1] or kernel.shape[1] < 1:
        raise ValueError(f"kernel must be (D, L) with the D of x {shape_of(x)}, got {shape_of(kernel)}")
    if skip is not None and skip.shape != kernel.shape[:1]:
        raise ValueError(f"skip must be (D,) with the D of x {shape_of(x)}, got {shape_of(skip)}")


def _state(x: Tensor, kernel: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(accumulator(x.dtype))
    shape = (num_sequences(cu_seqlens, x.shape[0]), x.shape[2], kernel.shape[1] - 1)
    return x.new_zeros(shape, dtype=accumulator(x.dtype))


@torch.library.custom_op("mainstem::long_convolution", mutates_args=())
def _forward(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    keep: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``; the state is empty unless ``keep``."""
    run = implementation("long_conv", backend, x, kernel)
    y, state = run.forward(x, kernel, skip, initial_state, cu_seqlens, keep, reverse)
    return y, state


@_forward.register_fake
def _(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    keep: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (num_sequences(cu_seqlens, x.shape[0]), x.shape[2], kernel.shape[1] - 1)
    return x.new_empty(x.shape), x.new_empty(shape if keep else (0,), dtype=accumulator(x.dtype))


@torch.library.custom_op("mainstem::long_convolution_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dkernel, dskip, dinitial)``; the last two are empty where there is none."""
    run = implementation("long_conv", backend, x, kernel)
    dx, dkernel, dskip, dinitial = run.backward(
        dy, dstate, x, kernel, skip, initial_state, cu_seqlens, reverse
    )
    return dx, dkernel, dskip, dinitial


@_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dskip = kernel.new_empty(0) if skip is None else skip.new_empty(skip.shape)
    shape = (0,) if initial_state is None else initial_state.shape
    dinitial = x.new_empty(shape, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape), dskip, dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kernel, skip, cu_seqlens, initial_state, _, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, kernel, skip, cu_seqlens, initial_state)


def _autograd(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel, skip, cu_seqlens, initial_state = ctx.saved_tensors
    dx, dkernel, dskip, dinitial = _backward(
        dy, dstate, x, kernel, skip, cu_seqlens, initial_state, ctx.reverse, ctx.backend
    )
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return dx, dkernel, None if skip is None else dskip, None, dinitial, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
