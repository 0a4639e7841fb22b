"""What the operations with a matrix state (K, V) a head share: argument checks, dtypes, layouts."""

import torch
from torch import Tensor

from .dispatch import check_backend
from .sequences import num_sequences


def state_dtype(v: Tensor) -> torch.dtype:
    """Type of the state and of all arithmetic: float32, or float64 for float64 input."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _shape(x: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in x.shape) + ")"


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` unless q, k are ``(B, T, H, K)`` and v is ``(B, T, H, V)``, all floating point."""
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must have one shape (B, T, H, K), got q {_shape(q)} and k {_shape(k)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v must be (B, T, H, V) with the B, T, H of q, got v {_shape(v)} beside q {_shape(q)}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_decay(decay: Tensor | None, q: Tensor, *, per_head: bool) -> None:
    """Raise ``ValueError`` unless ``decay`` fits q ``(B, T, H, K)``; ``(H,)`` only where ``per_head``."""
    if decay is None:
        return
    accepted = [q.shape[:3], q.shape]
    names = "(B, T, H) or (B, T, H, K)"
    if per_head:
        accepted.append(q.shape[2:3])
        names = "(H,), (B, T, H) or (B, T, H, K)"
    # Comparing shapes of different rank would tie a dynamic batch to the number of heads.
    if not any(decay.ndim == len(shape) and decay.shape == shape for shape in accepted):
        raise ValueError(f"decay must be {names} with the sizes of q {_shape(q)}, got {_shape(decay)}")
    if not decay.dtype.is_floating_point:
        raise ValueError(f"decay must be floating point, got {decay.dtype}")


def check_beta(beta: Tensor, q: Tensor) -> None:
    """Raise ``ValueError`` unless ``beta`` is ``(B, T, H)`` for q ``(B, T, H, K)``."""
    if beta.shape != q.shape[:3] or not beta.dtype.is_floating_point:
        raise ValueError(
            f"beta must be (B, T, H) with the sizes of q {_shape(q)}, got {beta.dtype} {_shape(beta)}"
        )


def check_call(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, backend: str
) -> None:
    """Raise ``ValueError`` unless the keywords that all operations share fit q and v."""
    check_backend(backend)
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be an int32 vector (S+1,), got {cu_seqlens.dtype} {_shape(cu_seqlens)}"
            )
        if q.shape[0] != 1:
            raise ValueError(
                f"with cu_seqlens the batch must be 1 (sequences lie end to end), got {q.shape[0]}"
            )
    if initial_state is not None:
        check_state("initial_state", initial_state, num_sequences(cu_seqlens, q.shape[0]), q, v)


def check_state(name: str, state: Tensor, sequences: int, q: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` unless ``state`` is ``(sequences, H, K, V)``."""
    wanted = (sequences, q.shape[-2], q.shape[-1], v.shape[-1])
    if tuple(state.shape) != wanted:
        raise ValueError(f"{name} must be (sequences, H, K, V) = {wanted}, got {_shape(state)}")


def check_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, *, per_head: bool
) -> None:
    """Raise ``ValueError`` unless one token's q, k ``(B, H, K)``, v ``(B, H, V)`` and the state fit."""
    if q.ndim != 3 or k.shape != q.shape or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "one token needs q and k (B, H, K) and v (B, H, V),"
            f" got q {_shape(q)}, k {_shape(k)} and v {_shape(v)}"
        )
    accepted = [q.shape[:2], q.shape, *([q.shape[1:2]] if per_head else [])]
    if decay is not None and decay.shape not in accepted:
        names = "(H,), (B, H) or (B, H, K)" if per_head else "(B, H) or (B, H, K)"
        raise ValueError(f"decay must be {names} with the sizes of q {_shape(q)}, got {_shape(decay)}")
    check_state("state", state, q.shape[0], q, v)


def token_decay(decay: Tensor | None, q: Tensor) -> Tensor | None:
    """View ``decay`` as ``(B, T, H, 1)`` or ``(B, T, H, K)``."""
    if decay is None or decay.ndim == 4:
        return decay
    if decay.ndim == 1:
        return decay[None, None, :, None].expand(*q.shape[:3], 1)
    return decay[..., None]


def fold_decay_grad(grad: Tensor, decay: Tensor) -> Tensor:
    """Bring the gradient of every token and channel ``(B, T, H, K)`` to the shape and type of ``decay``."""
    if decay.ndim < 4:
        grad = grad.sum(-1)
    if decay.ndim == 1:
        grad = grad.sum((0, 1))
    return grad.to(decay.dtype)


def new_state(v: Tensor, sequences: int, key_size: int) -> Tensor:
    """Make an uninitialised state ``(sequences, H, K, V)``."""
    return v.new_empty((sequences, v.shape[2], key_size, v.shape[3]), dtype=state_dtype(v))


def empty_like_input(x: Tensor | None, otherwise: Tensor) -> Tensor:
    """Make what a fake backward returns for ``x``: its shape and type, or nothing for an absent input."""
    return otherwise.new_empty(0) if x is None else x.new_empty(x.shape)


def or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    """Return ``x``, or the empty tensor that stands for ``None`` in what a custom operator returns."""
    return like.new_empty(0) if x is None else x
