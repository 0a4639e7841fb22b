"""Test-time training of a linear model: the state is the weights of a model that learns as it reads."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run TTT-Linear: gradient descent, in mini-batches of C tokens, on what each token should recall.

    The inner model is ``f(x) = x + LN(W x + b)`` and its loss at a token ``½‖f(k_t) − v_t‖²``. With W and b
    as the mini-batch began and ``G_t`` the sum of ``rate_i ∇ℓ_i(W, b)`` over its tokens up to t,
    ``(W_t, b_t) = (W, b) − schedule_j G_t`` for the token at place j, and ``o_t = f(q_t)`` with these. The
    last token of a mini-batch leaves its weights to the next. Sun et al., *Learning to (Learn at Test Time):
    RNNs with Expressive Hidden States* (2024), arXiv:2407.04620.

    Args:
        q: ``(B, T, H, D)``.
        k: ``(B, T, H, D)``.
        v: ``(B, T, H, D)``.
        rate: ``(B, T, H)``, inner learning rate of each token.
        schedule: ``(C,)``, factor of the step at each place of a mini-batch; its length is the mini-batch's.
        gain: ``(H, D)`` of the inner LayerNorm.
        offset: ``(H, D)`` of the inner LayerNorm.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, H, 2D+3, D)``, or ``(S, …)`` with ``cu_seqlens``: Wᵀ (D rows), b (1), the sum G
            of the unfinished mini-batch in the same order (D+1), and a row that holds how many tokens it has;
            ``None`` is zeros.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``o (B, T, H, D)`` in the type of v, or ``(o, final_state)``; states are float32 (float64 for float64
        v).

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, D), got {shape_of(q)}")
    _check(q, k, v, rate, schedule, gain, offset)
    H, D = q.shape[2:]
    check_call(
        cu_seqlens, initial_state, backend, batch=q.shape[0], state=(H, 2 * D + 3, D), names="H, 2D+3, D"
    )
    inputs = (q, k, v, rate, schedule, gain, offset)
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        o, state = reference.forward(*inputs, _state(v, cu_seqlens, initial_state), cu_seqlens, reverse)
    else:
        o, state = _forward(*inputs, cu_seqlens, initial_state, reverse, backend)
    return (o, state) if return_final_state else o


def ttt_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance `ttt_linear` by one token.

    Args:
        q: ``(B, H, D)``.
        k: ``(B, H, D)``.
        v: ``(B, H, D)``.
        rate: ``(B, H)``.
        schedule: ``(C,)``.
        gain: ``(H, D)``.
        offset: ``(H, D)``.
        state: ``(B, H, 2D+3, D)``; it is not modified.

    Returns:
        ``(o, state)``: ``(B, H, D)`` in the type of v, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    if q.ndim != 3:
        raise ValueError(f"one token needs q (B, H, D), got {shape_of(q)}")
    _check(q, k, v, rate, schedule, gain, offset)
    B, H, D = q.shape
    check_state("state", state, (B, H, 2 * D + 3, D), "H, 2D+3, D")
    o, state = reference.step(q, k, v, rate, schedule, gain, offset, state.to(accumulator(v.dtype)))
    return o.to(v.dtype), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, schedule: Tensor, gain: Tensor, offset: Tensor
) -> None:
    check_floating(q=q, k=k, v=v, rate=rate, schedule=schedule, gain=gain, offset=offset)
    for name, x, shape in (
        ("k", k, q.shape),
        ("v", v, q.shape),
        ("rate", rate, q.shape[:-1]),
        ("gain", gain, q.shape[-2:]),
        ("offset", offset, q.shape[-2:]),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} to go with q {shape_of(q)}, got {shape_of(x)}")
    if schedule.ndim != 1 or schedule.shape[0] < 1:
        raise ValueError(f"schedule must be (C,), a factor for each place, got {shape_of(schedule)}")


def _state_shape(v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    D = v.shape[3]
    return (num_sequences(cu_seqlens, v.shape[0]), v.shape[2], 2 * D + 3, D)


def _state(v: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(accumulator(v.dtype))
    return v.new_zeros(_state_shape(v, cu_seqlens), dtype=accumulator(v.dtype))


@torch.library.custom_op("mainstem::ttt_linear", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("ttt", backend, q, k, v)
    state = _state(v, cu_seqlens, initial_state)
    o, state = kernel.forward(q, k, v, rate, schedule, gain, offset, state, cu_seqlens, reverse)
    return o, state


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    state = v.new_empty(_state_shape(v, cu_seqlens), dtype=accumulator(v.dtype))
    return v.new_empty(v.shape), state


@torch.library.custom_op("mainstem::ttt_linear_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = implementation("ttt", backend, q, k, v)
    state = _state(v, cu_seqlens, initial_state)
    dq, dk, dv, drate, dschedule, dgain, doffset, dinitial = kernel.backward(
        do, dstate, q, k, v, rate, schedule, gain, offset, state, cu_seqlens, reverse
    )
    return dq, dk, dv, drate, dschedule, dgain, doffset, dinitial


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, drate, dschedule, dgain, doffset = (
        x.new_empty(x.shape) for x in (q, k, v, rate, schedule, gain, offset)
    )
    return dq, dk, dv, drate, dschedule, dgain, doffset, dstate.new_empty(dstate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing forbids more
    *gradients, dinitial = _backward(do, dstate, *saved, ctx.reverse, ctx.backend)
    initial_state = saved[-1]
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return *gradients, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
