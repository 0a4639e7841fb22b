"""Generalised delta rule, a diagonal plus low-rank transition: RWKV-7 and its kin."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, shape_of
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


def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``S_t = (Diag(exp(g_t)) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``,  ``o_t = scale · S_tᵀ q_t``.

    The transition of RWKV-7 (Peng et al. 2025, arXiv:2503.14456). ``a`` reads the state before it
    decays: `delta_rule` is ``a = exp(g) ∘ k``, ``b = −β k`` and ``β k`` for the key. Stable while the
    eigenvalues of ``Diag(exp(g)) + b aᵀ`` stay within the unit circle, which the caller sees to.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, H, K)``.
        v: ``(B, T, H, V)``.
        a: ``(B, T, H, K)``, what is read of the state to be written again.
        b: ``(B, T, H, K)``, where it is written.
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
    _check_pair(q, a, b, "(B, T, H, K)")
    check_decay(decay, q, per_head=False)
    check_call(q, v, cu_seqlens, initial_state, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        o, state = reference.forward(q, k, v, a, b, decay, scale, cu_seqlens, initial_state, reverse)
    else:
        o, state, _ = _forward(q, k, v, a, b, decay, scale, cu_seqlens, initial_state, reverse, backend)
    return (o, state) if return_final_state else o


def generalized_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance `generalized_delta_rule` by one token.

    Args:
        q: ``(B, H, K)``.
        k: ``(B, H, K)``.
        v: ``(B, H, V)``.
        a: ``(B, H, K)``.
        b: ``(B, H, K)``.
        decay: ``None``, ``(B, H)`` or ``(B, H, K)``.
        state: ``(B, H, K, V)``; it is not modified.
        scale: as in `generalized_delta_rule`.

    Returns:
        ``(o, state)``: ``(B, H, V)`` in the type of v, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_step(q, k, v, decay, state, per_head=False)
    _check_pair(q, a, b, "(B, H, K)")
    dtype = state_dtype(v)
    g = q.new_zeros(*q.shape[:2], 1) if decay is None else decay if decay.ndim == 3 else decay[..., None]
    k_, v_, a_, b_ = (x.to(dtype) for x in (k, v, a, b))
    state = reference.advance(k_, v_, a_, b_, g.to(dtype).exp(), state.to(dtype))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o = torch.einsum("bhk,bhkv->bhv", q.to(dtype) * scale, state)
    return o.to(v.dtype), state


def _check_pair(q: Tensor, a: Tensor, b: Tensor, names: str) -> None:
    if a.shape != q.shape or b.shape != q.shape:
        raise ValueError(
            f"a and b must be {names} with the sizes of q {shape_of(q)},"
            f" got a {shape_of(a)} and b {shape_of(b)}"
        )
    check_floating(a=a, b=b)


@torch.library.custom_op("mainstem::generalized_delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("dplr", backend, q, k, v)
    o, state, retrieved = kernel.forward(q, k, v, a, b, decay, scale, cu_seqlens, initial_state, reverse)
    return o, state, retrieved


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    state = new_state(v, num_sequences(cu_seqlens, q.shape[0]), q.shape[-1])
    return v.new_empty(v.shape), state, v.new_empty(v.shape, dtype=state.dtype)


@torch.library.custom_op("mainstem::generalized_delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    retrieved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = implementation("dplr", backend, q, k, v)
    dq, dk, dv, da, db, ddecay, dinitial = kernel.backward(
        do, dstate, retrieved, q, k, v, a, b, decay, scale, cu_seqlens, initial_state, reverse
    )
    return dq, dk, dv, da, db, or_nothing(ddecay, q), or_nothing(dinitial, q)


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    retrieved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, da, db = (x.new_empty(x.shape) for x in (q, k, v, a, b))
    return dq, dk, dv, da, db, empty_like_input(decay, q), empty_like_input(initial_state, q)


# The third result, what a_t retrieves from the state (S_{t-1}ᵀ a_t), is the backward pass's only memory.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, a, b, decay, ctx.scale, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, a, b, decay, cu_seqlens, initial_state, output[2])


def _autograd(ctx: Any, do: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, a, b, decay, cu_seqlens, initial_state, retrieved = ctx.saved_tensors
    dq, dk, dv, da, db, ddecay, dinitial = _backward(
        do,
        dstate,
        retrieved,
        q,
        k,
        v,
        a,
        b,
        decay,
        ctx.scale,
        cu_seqlens,
        initial_state,
        ctx.reverse,
        ctx.backend,
    )
    ddecay = None if decay is None else ddecay
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, da, db, ddecay, None, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
