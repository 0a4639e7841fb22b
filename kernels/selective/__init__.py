"""Selective scan with a diagonal state a channel: Mamba's S6."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``,  ``y_t = (C_t · h_t + D x_t) silu(z_t)``.

    Gu and Dao, *Mamba: Linear-Time Sequence Modeling with Selective State Spaces* (COLM 2024),
    arXiv:2312.00752, algorithm 2, with the skip and the gate of its block. Each channel has N states; B and C
    are shared by the channels.

    Args:
        x: ``(B, T, D)``.
        dt: ``(B, T, D)``, the step size as it acts: any softplus or bias is the caller's.
        A: ``(D, N)``, real: < 0 in the paper; −inf forgets everything at each step that is not 0.
        B: ``(B, T, N)``.
        C: ``(B, T, N)``.
        D: ``(D,)``, what goes past the state; ``None`` is zero.
        z: ``(B, T, D)``, the gate before its SiLU; ``None`` is no gate.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, D, N)``, or ``(S, D, N)`` with ``cu_seqlens``.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``y (B, T, D)`` in the type of x, or ``(y, final_state)``. States are float32, or float64 as x is.

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, T, D), got {shape_of(x)}")
    _check_inputs(x, dt, A, B, C, D, z, "B, T")
    check_call(cu_seqlens, initial_state, backend, batch=x.shape[0], state=A.shape, names="D, N")
    rate, skip = _parameters(x, A, D)
    if initial_state is None:
        states = (num_sequences(cu_seqlens, x.shape[0]), *A.shape)
        initial_state = x.new_zeros(states, dtype=rate.dtype)
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        initial_state = initial_state.to(rate.dtype)
        y, state = reference.forward(x, dt, rate, B, C, skip, z, initial_state, cu_seqlens, reverse)
    else:
        y, state = _forward(x, dt, rate, B, C, skip, z, initial_state, cu_seqlens, reverse, backend)
    return (y, state) if return_final_state else y


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance `selective_scan` by one token.

    Args:
        x: ``(B, D)``.
        dt: ``(B, D)``.
        A: ``(D, N)``.
        B: ``(B, N)``.
        C: ``(B, N)``.
        D: ``(D,)`` or ``None``.
        z: ``(B, D)`` or ``None``.
        state: ``(B, D, N)``; it is not modified.

    Returns:
        ``(y, state)``: ``(B, D)`` in the type of x, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"one token needs x (B, D), got {shape_of(x)}")
    _check_inputs(x, dt, A, B, C, D, z, "B")
    check_state("state", state, (x.shape[0], *A.shape), "D, N")
    rate, skip = _parameters(x, A, D)
    return reference.step(x, dt, rate, B, C, skip, z, state.to(rate.dtype))


def _check_inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, lead: str
) -> None:
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z}
    check_floating(**{name: tensor for name, tensor in given.items() if tensor is not None})
    channels = x.shape[-1]
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"A must be (D, N) with the D of x {shape_of(x)}, got {shape_of(A)}")
    states = (*x.shape[:-1], A.shape[1])
    for name, tensor, shape, names in (
        ("dt", dt, x.shape, f"{lead}, D"),
        ("B", B, states, f"{lead}, N"),
        ("C", C, states, f"{lead}, N"),
        ("D", D, (channels,), "D,"),
        ("z", z, x.shape, f"{lead}, D"),
    ):
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} must be ({names}) = {tuple(shape)}, got {shape_of(tensor)}")


def _parameters(x: Tensor, A: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return A and D in the type of the state; A is finite, so that a step of 0 never meets an infinity."""
    dtype = accumulator(x.dtype)
    # Half of the largest number: log2(e) times that is still finite.
    rate = A.to(dtype).clamp(min=torch.finfo(dtype).min / 2)
    return rate, x.new_zeros(x.shape[-1], dtype=dtype) if D is None else D.to(dtype)


@torch.library.custom_op("mainstem::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("selective", backend, x, dt, A)
    state = initial_state.to(A.dtype)
    y, state = kernel.forward(x, dt, A, B, C, D, z, state, cu_seqlens, reverse)
    return y, state


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty(initial_state.shape)


@torch.library.custom_op("mainstem::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel = implementation("selective", backend, x, dt, A)
    state = initial_state.to(A.dtype)
    dx, ddt, dA, dB, dC, dD, dz, dinitial = kernel.backward(
        dy, dstate, x, dt, A, B, C, D, z, state, cu_seqlens, reverse
    )
    dz = x.new_empty(0) if dz is None else dz
    return dx, ddt, dA, dB, dC, dD, dz, dinitial.to(initial_state.dtype)


@_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC, dD, dinitial = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D, initial_state))
    return dx, ddt, dA, dB, dC, dD, x.new_empty(0) if z is None else z.new_empty(z.shape), dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing forbids more
    z = saved[6]
    dx, ddt, dA, dB, dC, dD, dz, dinitial = _backward(dy, dstate, *saved, ctx.reverse, ctx.backend)
    return dx, ddt, dA, dB, dC, dD, None if z is None else dz, dinitial, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
