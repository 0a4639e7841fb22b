"""Cumulative log-sum-exp along time."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference


def logcumsumexp(
    s: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``z_t = log Σ_{i≤t} exp(s_i)``: `torch.logcumsumexp` over packed sequences and with a state.

    Args:
        s: ``(B, T, D)``; −inf leaves its token out.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, D)``, or ``(S, D)`` with ``cu_seqlens``; empty is −inf.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``z (B, T, D)`` in the type of s, or ``(z, final_state)``; states are float32 (float64 for float64
        input).

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    if s.ndim != 3:
        raise ValueError(f"s must be (B, T, D), got {shape_of(s)}")
    check_floating(s=s)
    check_call(cu_seqlens, initial_state, backend, batch=s.shape[0], state=s.shape[2:], names="D")
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        z, state = reference.logcumsumexp_forward(
            s, _state(s, cu_seqlens, initial_state), cu_seqlens, reverse
        )
    else:
        z, state = _forward(s, cu_seqlens, initial_state, reverse, backend)
    return (z, state) if return_final_state else z


def _state(s: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(accumulator(s.dtype))
    shape = (num_sequences(cu_seqlens, s.shape[0]), s.shape[2])
    return s.new_full(shape, -torch.inf, dtype=accumulator(s.dtype))


@torch.library.custom_op("mainstem::logcumsumexp", mutates_args=())
def _forward(
    s: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    kernel = implementation("scan", backend, s)
    z, state = kernel.logcumsumexp_forward(s, _state(s, cu_seqlens, initial_state), cu_seqlens, reverse)
    return z, state


@_forward.register_fake
def _(
    s: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (num_sequences(cu_seqlens, s.shape[0]), s.shape[2])
    return s.new_empty(s.shape), s.new_empty(shape, dtype=accumulator(s.dtype))


@torch.library.custom_op("mainstem::logcumsumexp_backward", mutates_args=())
def _backward(
    dz: Tensor,
    dstate: Tensor,
    s: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("scan", backend, s)
    ds, dinitial = kernel.logcumsumexp_backward(
        dz, dstate, s, _state(s, cu_seqlens, initial_state), cu_seqlens, reverse
    )
    return ds, dinitial


@_backward.register_fake
def _(
    dz: Tensor,
    dstate: Tensor,
    s: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), dstate.new_empty(dstate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    s, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(s, cu_seqlens, initial_state)


def _autograd(ctx: Any, dz: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    s, cu_seqlens, initial_state = ctx.saved_tensors
    ds, dinitial = _backward(dz, dstate, s, cu_seqlens, initial_state, ctx.reverse, ctx.backend)
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return ds, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
