"""Gated recurrent networks with a head-wise recurrence: LSTM, GRU, sLSTM and Elman's."""

from typing import Any

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, check_state, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences
from . import reference
from .cells import CELLS
from .cells import Cell as Cell


def gated_rnn(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    *,
    cell: Cell = "lstm",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a recurrent cell whose recurrent matrix is block-diagonal, one block a head.

    With ``g = x_t + R h_{t-1} + b`` for every gate g:

    - ``"lstm"``, gates i, f, g, o: ``c_t = σ(f) c_{t-1} + σ(i) tanh(g)``, ``h_t = σ(o) tanh(c_t)``
      (Hochreiter and Schmidhuber, 1997).
    - ``"gru"``, gates r, z, n: ``n = tanh(x_t + σ(r) (R h_{t-1} + b))``, ``h_t = (1 − σ(z)) n + σ(z)
      h_{t-1}`` (Cho et al., 2014, arXiv:1406.1078).
    - ``"slstm"``, gates i, f, z, o: ``c_t = σ(f) c_{t-1} + e^i tanh(z)``, ``n_t = σ(f) n_{t-1} + e^i``,
      ``h_t = σ(o) c_t / n_t``; ``"slstm_exp"`` has ``e^f`` for ``σ(f)``. c and n are held relative to
      ``e^{m_t}``, ``m_t = max(log f + m_{t-1}, i)``, so that no exponent is positive; where n is 0 nothing
      was written yet and m counts as −∞ (Beck et al., *xLSTM*, 2024, arXiv:2405.04517, eq. 8–17).
    - ``"elman"``, one gate: ``h_t = tanh(x_t + R h_{t-1} + b)`` (Elman, 1990).

    With one head they are `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`. The blocks, and one kernel for
    all cells, follow Pöppel, Beck and Hochreiter, *FlashRNN* (2024), arXiv:2412.07752.

    Args:
        x: ``(B, T, G, H, D)``, what the input adds to each gate.
        R: ``(G, H, D, D)``, output by input, as in `torch.nn.LSTM.weight_hh_l0`.
        b: ``(G, H, D)``, added on the recurrent side.
        cell: ``"lstm"``, ``"gru"``, ``"slstm"``, ``"slstm_exp"`` or ``"elman"``.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, N, H, D)``: h; h and c for the LSTM; h, c, n and m for the sLSTM. ``(S, …)`` with
            ``cu_seqlens``.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``h (B, T, H, D)`` in the type of x, or ``(h, final_state)``; states are float32 (float64 for float64
        x).

    Raises:
        ValueError: an unknown cell, shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or
            a backend that cannot serve the call.
    """
    if x.ndim != 5:
        raise ValueError(f"x must be (B, T, G, H, D), got {shape_of(x)}")
    _check_cell(x, R, b, cell)
    state_shape = (CELLS[cell].states, *x.shape[3:])
    check_call(cu_seqlens, initial_state, backend, batch=x.shape[0], state=state_shape, names="N, H, D")
    # The reference is differentiated by autograd, token by token, so it stays outside the custom operator.
    if backend == "reference":
        state = _state(x, cell, cu_seqlens, initial_state)
        h, state = reference.forward(x, R, b, cell, state, cu_seqlens, reverse)
    else:
        keep = torch.is_grad_enabled() and any(
            y is not None and y.requires_grad for y in (x, R, b, initial_state)
        )
        h, state, _ = _forward(x, R, b, cell, cu_seqlens, initial_state, reverse, backend, keep)
    return (h, state) if return_final_state else h


def gated_rnn_step(
    x: Tensor, R: Tensor, b: Tensor, state: Tensor, *, cell: Cell = "lstm"
) -> tuple[Tensor, Tensor]:
    """Advance `gated_rnn` by one token.

    Args:
        x: ``(B, G, H, D)``.
        R: ``(G, H, D, D)``.
        b: ``(G, H, D)``.
        state: ``(B, N, H, D)``, see `gated_rnn`; it is not modified.
        cell: see `gated_rnn`.

    Returns:
        ``(h, state)``: ``(B, H, D)`` in the type of x, and the next state.

    Raises:
        ValueError: an unknown cell, or shapes that do not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"one token needs x (B, G, H, D), got {shape_of(x)}")
    _check_cell(x, R, b, cell)
    check_state("state", state, (x.shape[0], CELLS[cell].states, *x.shape[2:]), "N, H, D")
    return reference.STEPS[cell](x, R, b, state.to(accumulator(x.dtype)))


def _check_cell(x: Tensor, R: Tensor, b: Tensor, cell: str) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell={cell!r} is unknown: choose one of {', '.join(CELLS)}")
    check_floating(x=x, R=R, b=b)
    gates, heads, size = x.shape[-3:]
    if gates != CELLS[cell].gates:
        raise ValueError(f"x must have {CELLS[cell].gates} gates for cell={cell!r}, got {shape_of(x)}")
    if tuple(R.shape) != (gates, heads, size, size):
        raise ValueError(f"R must be (G, H, D, D) with the sizes of x {shape_of(x)}, got {shape_of(R)}")
    if tuple(b.shape) != (gates, heads, size):
        raise ValueError(f"b must be (G, H, D) with the sizes of x {shape_of(x)}, got {shape_of(b)}")


def _state_shape(like: Tensor, cell: str, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Shape of the states beside ``like``, which ends in ``H, D``."""
    return (num_sequences(cu_seqlens, like.shape[0]), CELLS[cell].states, *like.shape[-2:])


def _state(like: Tensor, cell: str, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(accumulator(like.dtype))
    return like.new_zeros(_state_shape(like, cell, cu_seqlens), dtype=accumulator(like.dtype))


@torch.library.custom_op("mainstem::gated_rnn", mutates_args=())
def _forward(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(h, final_state, gates)``; the gates, for the backward, are empty unless ``keep``."""
    kernel = implementation("rnn", backend, x, R)
    state = _state(x, cell, cu_seqlens, initial_state)
    h, state, gates = kernel.forward(x, R, b, cell, state, cu_seqlens, reverse, keep)
    return h, state, gates


@_forward.register_fake
def _(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _, heads, size = x.shape
    shape = (heads, batch * length, CELLS[cell].kept * size) if keep else (0,)
    dtype = accumulator(x.dtype)
    state = x.new_empty(_state_shape(x, cell, cu_seqlens), dtype=dtype)
    return x.new_empty(batch, length, heads, size), state, x.new_empty(shape, dtype=dtype)


@torch.library.custom_op("mainstem::gated_rnn_backward", mutates_args=())
def _backward(
    dh: Tensor,
    dstate: Tensor,
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dR, db, dinitial)``; all that is needed of x is in the gates."""
    kernel = implementation("rnn", backend, dh, R)
    state = _state(dh, cell, cu_seqlens, initial_state)
    dx, dR, db, dinitial = kernel.backward(dh, dstate, gates, R, b, cell, state, cu_seqlens, reverse)
    return dx, dR, db, dinitial


@_backward.register_fake
def _(
    dh: Tensor,
    dstate: Tensor,
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = dh.new_empty(*dh.shape[:2], R.shape[0], *dh.shape[2:])
    return dx, R.new_empty(R.shape), b.new_empty(b.shape), dstate.new_empty(dstate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, R, b, ctx.cell, cu_seqlens, initial_state, ctx.reverse, ctx.backend, _ = inputs
    ctx.save_for_backward(output[2], R, b, cu_seqlens, initial_state)
    ctx.shape, ctx.dtype = output[0].shape, output[0].dtype
    # The gates never have a gradient, and zeros as many as they are would take as long as a step.
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dh: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gates, R, b, cu_seqlens, initial_state = ctx.saved_tensors
    if dh is None:
        dh = gates.new_zeros(ctx.shape, dtype=ctx.dtype)
    if dstate is None:
        dstate = gates.new_zeros(_state_shape(dh, ctx.cell, cu_seqlens))
    dx, dR, db, dinitial = _backward(
        dh, dstate, gates, R, b, ctx.cell, cu_seqlens, initial_state, ctx.reverse, ctx.backend
    )
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return dx, dR, db, None, None, dinitial, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
