"""Log-sum-exp scan: the running softmax average of the values."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference


def logsumexp_scan(
    s: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``o_t = Σ_{i≤t} exp(s_i) v_i / Σ_{i≤t} exp(s_i)``: causal softmax attention with one fixed query.

    Feng et al., *Attention as an RNN* (2024), arXiv:2405.13956. A score of −inf leaves its token out; until
    the first finite score ``o`` is 0.

    Args:
        s: ``(B, T, H)``.
        v: ``(B, T, H, V)``.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, H, V+2)``, or ``(S, H, V+2)`` with ``cu_seqlens``: ``[m, u, w]`` with
            ``m = max s_i``, ``u = Σ exp(s_i − m)`` and ``w = Σ exp(s_i − m) v_i``. Empty is ``[−inf, 0, 0]``.
        return_final_state: also return the state after the last token. Its ``m`` is a level to measure from
            and carries no gradient; ``u`` and ``w`` do.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``o (B, T, H, V)`` in the type of v, or ``(o, final_state)``; states are float32 (float64 for float64
        input).

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    if v.ndim != 4 or s.shape != v.shape[:3]:
        raise ValueError(f"s must be (B, T, H) and v (B, T, H, V), got s {shape_of(s)} and v {shape_of(v)}")
    check_floating(s=s, v=v)
    state_shape = (v.shape[2], v.shape[3] + 2)
    check_call(cu_seqlens, initial_state, backend, batch=v.shape[0], state=state_shape, names="H, V+2")
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        o, state = reference.logsumexp_forward(
            s, v, _state(s, v, cu_seqlens, initial_state), cu_seqlens, reverse
        )
    else:
        o, state = _forward(s, v, cu_seqlens, initial_state, reverse, backend)
    return (o, state) if return_final_state else o


def logsumexp_scan_step(s: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance `logsumexp_scan` by one token.

    Args:
        s: ``(B, H)``.
        v: ``(B, H, V)``.
        state: ``(B, H, V+2)``; it is not modified.

    Returns:
        ``(o, state)``: ``(B, H, V)`` in the type of v, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    if v.ndim != 3 or s.shape != v.shape[:2]:
        raise ValueError(f"one token needs s (B, H) and v (B, H, V), got s {shape_of(s)} and v {shape_of(v)}")
    check_floating(s=s, v=v)
    check_state("state", state, (*v.shape[:2], v.shape[2] + 2), "H, V+2")
    return reference.logsumexp_step(s, v, state.to(_dtype(s, v)))


def _dtype(s: Tensor, v: Tensor) -> torch.dtype:
    return accumulator(torch.promote_types(s.dtype, v.dtype))


def _state(s: Tensor, v: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(_dtype(s, v))
    shape = (num_sequences(cu_seqlens, v.shape[0]), v.shape[2], v.shape[3] + 2)
    state = v.new_zeros(shape, dtype=_dtype(s, v))
    state[..., 0] = -torch.inf
    return state


@torch.library.custom_op("mainstem::logsumexp_scan", mutates_args=())
def _forward(
    s: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("scan", backend, v)
    o, state = kernel.logsumexp_forward(s, v, _state(s, v, cu_seqlens, initial_state), cu_seqlens, reverse)
    return o, state


@_forward.register_fake
def _(
    s: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (num_sequences(cu_seqlens, v.shape[0]), v.shape[2], v.shape[3] + 2)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=_dtype(s, v))


@torch.library.custom_op("mainstem::logsumexp_scan_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    s: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("scan", backend, v)
    ds, dv, dinitial = kernel.logsumexp_backward(
        do, dstate, s, v, _state(s, v, cu_seqlens, initial_state), cu_seqlens, reverse
    )
    return ds, dv, dinitial


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    s: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), v.new_empty(v.shape), dstate.new_empty(dstate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    s, v, cu_seqlens, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(s, v, cu_seqlens, initial_state)


def _autograd(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    s, v, cu_seqlens, initial_state = ctx.saved_tensors
    ds, dv, dinitial = _backward(do, dstate, s, v, cu_seqlens, initial_state, ctx.reverse, ctx.backend)
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return ds, dv, None, dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
