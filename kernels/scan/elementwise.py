"""Elementwise linear scan: LRU, HGRN, minGRU, moving averages."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference


def elementwise_scan(
    a: Tensor,
    b: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h_t = a_t ⊙ h_{t-1} + b_t``, real or complex.

    Martin and Cundy, *Parallelizing Linear Recurrent Neural Nets Over Sequence Length* (ICLR 2018),
    arXiv:1709.04057. Exact for any ``a``: zero, negative or larger than 1.

    Args:
        a: ``(B, T, D)``.
        b: ``(B, T, D)``.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, D)``, or ``(S, D)`` with ``cu_seqlens``.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``h (B, T, D)`` in the type of b, or ``(h, final_state)``; states are float32 (float64 for float64
        input, complex for complex input).

    Raises:
        ValueError: shapes that do not fit, one of a and b complex, ``cu_seqlens`` that does not rise from 0
            to T, or a backend that cannot serve the call.
    """
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape (B, T, D), got a {shape_of(a)} and b {shape_of(b)}")
    _check_dtypes(a, b)
    check_call(cu_seqlens, initial_state, backend, batch=b.shape[0], state=b.shape[2:], names="D")
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        h, state = reference.elementwise_forward(
            a, b, _state(a, b, cu_seqlens, initial_state), cu_seqlens, reverse
        )
    else:
        h, state = _forward(a, b, cu_seqlens, initial_state, reverse, backend)
    return (h, state) if return_final_state else h


def elementwise_scan_step(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance `elementwise_scan` by one token.

    Args:
        a: ``(B, D)``.
        b: ``(B, D)``.
        state: ``(B, D)``; it is not modified.

    Returns:
        ``(h, state)``: ``(B, D)`` in the type of b, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    if b.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"one token needs a and b (B, D), got a {shape_of(a)} and b {shape_of(b)}")
    _check_dtypes(a, b)
    check_state("state", state, b.shape, "D")
    return reference.elementwise_step(a, b, state.to(_dtype(a, b)))


def _check_dtypes(a: Tensor, b: Tensor) -> None:
    both_real = a.dtype.is_floating_point and b.dtype.is_floating_point
    if not both_real and not (a.dtype.is_complex and b.dtype.is_complex):
        raise ValueError(
            f"a and b must both be floating point or both be complex, got a {a.dtype} and b {b.dtype}"
        )


def _dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return accumulator(torch.promote_types(a.dtype, b.dtype))


def _state(a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(_dtype(a, b))
    return b.new_zeros((num_sequences(cu_seqlens, b.shape[0]), b.shape[2]), dtype=_dtype(a, b))


@torch.library.custom_op("mainstem::elementwise_scan", mutates_args=())
def _forward(
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("scan", backend, b)
    h, state = kernel.elementwise_forward(a, b, _state(a, b, cu_seqlens, initial_state), cu_seqlens, reverse)
    return h, state


@_forward.register_fake
def _(
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    state = b.new_empty((num_sequences(cu_seqlens, b.shape[0]), b.shape[2]), dtype=_dtype(a, b))
    return b.new_empty(b.shape), state


@torch.library.custom_op("mainstem::elementwise_scan_backward", mutates_args=())
def _backward(
    dh: Tensor,
    dstate: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("scan", backend, b)
    da, db, dinitial = kernel.elementwise_backward(
        dh, dstate, a, b, _state(a, b, cu_seqlens, initial_state), cu_seqlens, reverse
    )
    return da, db, dinitial


@_backward.register_fake
def _(
    dh: Tensor,
    dstate: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), dstate.new_empty(dstate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(a, b, cu_seqlens, initial_state)


def _autograd(ctx: Any, dh: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    a, b, cu_seqlens, initial_state = ctx.saved_tensors
    da, db, dinitial = _backward(dh, dstate, a, b, cu_seqlens, initial_state, ctx.reverse, ctx.backend)
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return da, db, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
