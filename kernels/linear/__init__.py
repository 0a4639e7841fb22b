"""Linear recurrence with a matrix state: linear attention, RetNet, GLA, Mamba-2, mLSTM and their kin."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation
from ..matrix_state import (
    check_call,
    check_decay,
    check_qkv,
    check_step,
    empty_like_input,
    new_state,
    or_nothing,
    state_dtype,
)
from ..sequences import num_sequences
from . import reference


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``S_t = Diag(exp(g_t)) S_{t-1} + k_t v_tᵀ``,  ``o_t = scale · S_tᵀ q_t``.

    Yang et al., *Gated Linear Attention Transformers with Hardware-Efficient Training* (ICML 2024),
    arXiv:2312.06635; with one decay a head it is RetNet and the SSD of Mamba-2.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        v: ``(B, T, H, V)``.
        decay: ``g``, the logarithm of the decay, ≤ 0 and possibly −inf: ``None`` (no decay), ``(H,)``,
            ``(B, T, H)`` or ``(B, T, H, K)``.
        scale: factor of the output; ``None`` is ``K ** -0.5``.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, H, K, V)``, or ``(S, H, K, V)`` with ``cu_seqlens``.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``o (B, T, H, V)`` in the type of v, or ``(o, final_state)``. States are float32, or float64 as v is.

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    check_qkv(q, k, v)
    check_decay(decay, q, per_head=True)
    check_call(q, v, cu_seqlens, initial_state, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        o, state = reference.forward(q, k, v, decay, scale, cu_seqlens, initial_state, reverse)
    else:
        o, state = _forward(q, k, v, decay, scale, cu_seqlens, initial_state, reverse, backend)
    return (o, state) if return_final_state else o


def linear_recurrence_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance `linear_recurrence` by one token.

    Args:
        q: ``(B, H, K)``.
        k: ``(B, H, K)``.
        v: ``(B, H, V)``.
        decay: ``None``, ``(H,)``, ``(B, H)`` or ``(B, H, K)``.
        state: ``(B, H, K, V)``; it is not modified.
        scale: as in `linear_recurrence`.

    Returns:
        ``(o, state)``: ``(B, H, V)`` in the type of v, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_step(q, k, v, decay, state, per_head=True)
    dtype = state_dtype(v)
    state = state.to(dtype)
    if decay is not None:
        g = decay[:, None] if decay.ndim == 1 else decay if decay.ndim == 3 else decay[..., None]
        state = g.to(dtype).exp()[..., None] * state
    state = state + k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o = torch.einsum("bhk,bhkv->bhv", q.to(dtype) * scale, state)
    return o.to(v.dtype), state


@torch.library.custom_op("mainstem::linear_recurrence", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("linear", backend, q, k, v)
    o, state = kernel.forward(q, k, v, decay, scale, cu_seqlens, initial_state, reverse)
    return o, state


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), new_state(v, num_sequences(cu_seqlens, q.shape[0]), q.shape[-1])


@torch.library.custom_op("mainstem::linear_recurrence_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = implementation("linear", backend, q, k, v)
    dq, dk, dv, ddecay, dinitial = kernel.backward(
        do, dstate, q, k, v, decay, scale, cu_seqlens, initial_state, reverse
    )
    return dq, dk, dv, or_nothing(ddecay, q), or_nothing(dinitial, q)


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, empty_like_input(decay, q), empty_like_input(initial_state, q)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, decay, ctx.scale, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, decay, cu_seqlens, initial_state)


def _autograd(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, decay, cu_seqlens, initial_state = ctx.saved_tensors
    dq, dk, dv, ddecay, dinitial = _backward(
        do, dstate, q, k, v, decay, ctx.scale, cu_seqlens, initial_state, ctx.reverse, ctx.backend
    )
    ddecay = None if decay is None else ddecay
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, ddecay, None, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
