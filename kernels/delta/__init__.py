"""Delta rule with a matrix state: DeltaNet, Gated DeltaNet, KDA and their kin."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation
from ..matrix_state import (
    check_beta,
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


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``S_t = (I − β_t k_t k_tᵀ) Diag(exp(g_t)) S_{t-1} + β_t k_t v_tᵀ``,  ``o_t = scale · S_tᵀ q_t``.

    Yang et al., *Parallelizing Linear Transformers with the Delta Rule over Sequence Length* (NeurIPS 2024),
    arXiv:2406.06484, and *Gated Delta Networks* (ICLR 2025), arXiv:2412.06464. Stable while β‖k‖² ≤ 2.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        v: ``(B, T, H, V)``.
        beta: ``(B, T, H)``, how much of what ``k`` retrieves is replaced.
        decay: ``g``, the logarithm of the decay, ≤ 0 and possibly −inf: ``None`` (no decay), ``(B, T, H)``
            or ``(B, T, H, K)``.
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
    check_beta(beta, q)
    check_decay(decay, q, per_head=False)
    check_call(q, v, cu_seqlens, initial_state, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        o, state = reference.forward(q, k, v, beta, decay, scale, cu_seqlens, initial_state, reverse)
    else:
        o, state, _ = _forward(q, k, v, beta, decay, scale, cu_seqlens, initial_state, reverse, backend)
    return (o, state) if return_final_state else o


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance `delta_rule` by one token.

    Args:
        q: ``(B, H, K)``.
        k: ``(B, H, K)``.
        v: ``(B, H, V)``.
        beta: ``(B, H)``.
        decay: ``None``, ``(B, H)`` or ``(B, H, K)``.
        state: ``(B, H, K, V)``; it is not modified.
        scale: as in `delta_rule`.

    Returns:
        ``(o, state)``: ``(B, H, V)`` in the type of v, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_step(q, k, v, decay, state, per_head=False)
    if beta.shape != q.shape[:2]:
        raise ValueError(f"beta must be (B, H) = {tuple(q.shape[:2])}, got {tuple(beta.shape)}")
    dtype = state_dtype(v)
    state = state.to(dtype)
    if decay is not None:
        g = decay if decay.ndim == 3 else decay[..., None]
        state = g.to(dtype).exp()[..., None] * state
    error = v.to(dtype) - torch.einsum("bhk,bhkv->bhv", k.to(dtype), state)
    state = state + k.to(dtype)[..., None] * (beta.to(dtype)[..., None] * error)[..., None, :]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o = torch.einsum("bhk,bhkv->bhv", q.to(dtype) * scale, state)
    return o.to(v.dtype), state


@torch.library.custom_op("mainstem::delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("delta", backend, q, k, v)
    o, state, error = kernel.forward(q, k, v, beta, decay, scale, cu_seqlens, initial_state, reverse)
    return o, state, error


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    state = new_state(v, num_sequences(cu_seqlens, q.shape[0]), q.shape[-1])
    return v.new_empty(v.shape), state, v.new_empty(v.shape, dtype=state.dtype)


@torch.library.custom_op("mainstem::delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = implementation("delta", backend, q, k, v)
    dq, dk, dv, dbeta, ddecay, dinitial = kernel.backward(
        do, dstate, error, q, k, v, beta, decay, scale, cu_seqlens, initial_state, reverse
    )
    return dq, dk, dv, dbeta, or_nothing(ddecay, q), or_nothing(dinitial, q)


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, v, beta))
    return dq, dk, dv, dbeta, empty_like_input(decay, q), empty_like_input(initial_state, q)


# The third result, what each token did not yet predict (v_t − kᵀS), is the backward pass's only memory.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, decay, ctx.scale, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, beta, decay, cu_seqlens, initial_state, output[2])


def _autograd(ctx: Any, do: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, beta, decay, cu_seqlens, initial_state, error = ctx.saved_tensors
    dq, dk, dv, dbeta, ddecay, dinitial = _backward(
        do,
        dstate,
        error,
        q,
        k,
        v,
        beta,
        decay,
        ctx.scale,
        cu_seqlens,
        initial_state,
        ctx.reverse,
        ctx.backend,
    )
    ddecay = None if decay is None else ddecay
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, dbeta, ddecay, None, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
