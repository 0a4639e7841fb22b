"""Max-plus scan: the stabiliser of exponential gates."""

import torch
from torch import Tensor

from ..checks import accumulator, check_call, check_floating, shape_of
from ..dispatch import implementation
from ..sequences import num_sequences


def max_plus_scan(
    g: Tensor,
    i: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``m_t = max(m_{t-1} + g_t, i_t)``; it has no gradient.

    Beck et al., *xLSTM: Extended Long Short-Term Memory* (NeurIPS 2024), arXiv:2405.04517, where ``m``
    cancels out of every result: it is only the level that exponents are measured from.

    Args:
        g: ``(B, T, D)``.
        i: ``(B, T, D)``.
        cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end in a batch of 1.
        initial_state: ``(B, D)``, or ``(S, D)`` with ``cu_seqlens``; empty is −inf.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``m (B, T, D)`` in the type of i, or ``(m, final_state)``; states are float32 (float64 for float64
        input).

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, or a backend that
            cannot serve the call.
    """
    if i.ndim != 3 or g.shape != i.shape:
        raise ValueError(f"g and i must have one shape (B, T, D), got g {shape_of(g)} and i {shape_of(i)}")
    check_floating(g=g, i=i)
    check_call(cu_seqlens, initial_state, backend, batch=i.shape[0], state=i.shape[2:], names="D")
    state = None if initial_state is None else initial_state.detach()
    m, state = _forward(g.detach(), i.detach(), cu_seqlens, state, reverse, backend)
    return (m, state) if return_final_state else m


def _dtype(g: Tensor, i: Tensor) -> torch.dtype:
    return accumulator(torch.promote_types(g.dtype, i.dtype))


@torch.library.custom_op("mainstem::max_plus_scan", mutates_args=())
def _forward(
    g: Tensor,
    i: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = implementation("scan", backend, i)
    if initial_state is None:
        shape = (num_sequences(cu_seqlens, i.shape[0]), i.shape[2])
        initial_state = i.new_full(shape, -torch.inf, dtype=_dtype(g, i))
    m, state = kernel.max_plus_forward(g, i, initial_state.to(_dtype(g, i)), cu_seqlens, reverse)
    return m, state


@_forward.register_fake
def _(
    g: Tensor,
    i: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (num_sequences(cu_seqlens, i.shape[0]), i.shape[2])
    return i.new_empty(i.shape), i.new_empty(shape, dtype=_dtype(g, i))
