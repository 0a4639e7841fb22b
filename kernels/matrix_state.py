"""What the operations with a matrix state (K, V) a head share: argument checks, dtypes, layouts."""

import torch
from torch import Tensor

from . import checks
from .checks import check_floating, check_state, shape_of


def state_dtype(v: Tensor) -> torch.dtype:
    """Type of the state and of all arithmetic: float32, or float64 for float64 input."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` unless q, k are ``(B, T, H, K)`` and v is ``(B, T, H, V)``, all floating point."""
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must have one shape (B, T, H, K), got q {shape_of(q)} and k {shape_of(k)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v must be (B, T, H, V) with the B, T, H of q, got v {shape_of(v)} beside q {shape_of(q)}"
        )
    check_floating(q=q, k=k, v=v)


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
        raise ValueError(f"decay must be {names} with the sizes of q {shape_of(q)}, got {shape_of(decay)}")
    if not decay.dtype.is_floating_point:
        raise ValueError(f"decay must be floating point, got {decay.dtype}")


def check_beta(beta: Tensor, q: Tensor) -> None:
    """Raise ``ValueError`` unless ``beta`` is ``(B, T, H)`` for q ``(B, T, H, K)``."""
    if beta.shape != q.shape[:3] or not beta.dtype.is_floating_point:
        raise ValueError(
            f"beta must be (B, T, H) with the sizes of q {shape_of(q)}, got {beta.dtype} {shape_of(beta)}"
        )


def check_call(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, backend: str
) -> None:
    """Raise ``ValueError`` unless the keywords that all operations share fit q and v."""
    state = (q.shape[-2], q.shape[-1], v.shape[-1])
    checks.check_call(cu_seqlens, initial_state, backend, batch=q.shape[0], state=state, names="H, K, V")


def check_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, *, per_head: bool
) -> None:
    """Raise ``ValueError`` unless one token's q, k ``(B, H, K)``, v ``(B, H, V)`` and the state fit."""
    if q.ndim != 3 or k.shape != q.shape or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "one token needs q and k (B, H, K) and v (B, H, V),"
            f" got q {shape_of(q)}, k {shape_of(k)} and v {shape_of(v)}"
        )
    accepted = [q.shape[:2], q.shape, *([q.shape[1:2]] if per_head else [])]
    if decay is not None and decay.shape not in accepted:
        names = "(H,), (B, H) or (B, H, K)" if per_head else "(B, H) or (B, H, K)"
        raise ValueError(f"decay must be {names} with the sizes of q {shape_of(q)}, got {shape_of(decay)}")
    check_state("state", state, (*q.shape, v.shape[-1]), "H, K, V")


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
