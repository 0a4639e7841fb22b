"""Argument checks and dtypes that the operations with a vector state share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import check_backend
from .sequences import num_sequences

_ACCUMULATORS = {
    torch.float64: torch.float64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type of the state and of all arithmetic: float32, and as wide as the input where that is wider."""
    return _ACCUMULATORS.get(dtype, torch.float32)


def shape_of(x: Tensor) -> str:
    """Write the shape of ``x`` for an error message."""
    return "(" + ", ".join(str(n) for n in x.shape) + ")"


def check_floating(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless every named tensor is real floating point."""
    for name, x in tensors.items():
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_cu_vector(name: str, cu_seqlens: Tensor, batch: int) -> None:
    """Raise ``ValueError`` unless ``cu_seqlens`` is an integer vector and the batch is 1; reads no values."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be an int32 vector (S+1,), got {cu_seqlens.dtype} {shape_of(cu_seqlens)}"
        )
    if batch != 1:
        raise ValueError(f"with {name} the batch must be 1 (sequences lie end to end), got {batch}")


def check_call(
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
    *,
    batch: int,
    state: Sequence[int],
    names: str,
) -> None:
    """Raise ``ValueError`` unless the keywords that all operations share fit.

    Args:
        cu_seqlens: checked for its form; its values are checked where the operation runs.
        initial_state: checked against ``(sequences, *state)``.
        backend: checked by name.
        batch: first dimension of the input.
        state: shape of one sequence's state.
        names: the letters of that shape, for the message.
    """
    check_backend(backend)
    if cu_seqlens is not None:
        check_cu_vector("cu_seqlens", cu_seqlens, batch)
    if initial_state is not None:
        check_state("initial_state", initial_state, (num_sequences(cu_seqlens, batch), *state), names)


def check_state(name: str, state: Tensor, shape: Sequence[int], names: str) -> None:
    """Raise ``ValueError`` unless ``state`` has ``shape``."""
    if tuple(state.shape) != tuple(shape):
        raise ValueError(f"{name} must be (sequences, {names}) = {tuple(shape)}, got {shape_of(state)}")
