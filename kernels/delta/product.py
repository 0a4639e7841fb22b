"""Several Householder factors a token: DeltaProduct, on the kernels of the delta rule."""

import torch
from torch import Tensor

from ..checks import check_cu_vector, shape_of
from ..matrix_state import check_decay
from ..sequences import check_cu_seqlens, remembered
from . import delta_rule, delta_rule_step


def delta_product(
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
    """Run R steps of the delta rule a token, of which the first decays and the last is read.

    ``S ← Diag(exp(g_t)) S_{t-1}``, then for i = 1 … R ``S ← (I − β_ti k_ti k_tiᵀ) S + β_ti k_ti v_tiᵀ``, and
    ``S_t = S``, ``o_t = scale · S_tᵀ q_t``: a transition that is a product of R generalised Householder
    matrices. Siems et al., *DeltaProduct* (2025), arXiv:2502.10297. Also in reverse the factors of a token
    act in the order 1 … R. One factor is `delta_rule`.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, R, H, K)``.
        v: ``(B, T, R, H, V)``.
        beta: ``(B, T, R, H)``.
        decay: ``g``, as in `delta_rule`: ``None``, ``(B, T, H)`` or ``(B, T, H, K)``.
        scale: factor of the output; ``None`` is ``K ** -0.5``.
        cu_seqlens: ``(S+1,)`` bounds of sequences of tokens that lie end to end in a batch of 1.
        initial_state: ``(B, H, K, V)``, or ``(S, H, K, V)`` with ``cu_seqlens``.
        return_final_state: also return the state after the last token.
        reverse: run from the last token to the first; ``initial_state`` then enters at the last token.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``o (B, T, H, V)`` in the type of v, or ``(o, final_state)``. States are float32, or float64 as v is.

    Raises:
        ValueError: what `delta_rule` raises, or factors whose shapes do not fit.
    """
    if q.ndim != 4 or k.ndim != 5 or k.shape[2] < 1 or (*k.shape[:2], *k.shape[3:]) != tuple(q.shape):
        raise ValueError(
            "k must be (B, T, R, H, K) with R ≥ 1 factors a token and the sizes of q (B, T, H, K),"
            f" got k {shape_of(k)} beside q {shape_of(q)}"
        )
    check_decay(decay, q, per_head=False)
    _check_factors(k, v, beta, "(B, T, R, H")
    R = k.shape[2]
    # The walk meets the factors in the order in which they lie, or, in reverse, in the opposite order.
    if reverse:
        k, v, beta = k.flip(2), v.flip(2), beta.flip(2)
    decay = None if decay is None else _one_of(decay, R, last=reverse)
    q = _one_of(q, R, last=not reverse)
    bounds = None if cu_seqlens is None else _times(cu_seqlens, R, *k.shape[:2])
    found = delta_rule(
        q,
        k.flatten(1, 2),
        v.flatten(1, 2),
        beta.flatten(1, 2),
        decay,
        scale=scale,
        cu_seqlens=bounds,
        initial_state=initial_state,
        return_final_state=return_final_state,
        reverse=reverse,
        backend=backend,
    )
    o, state = found if isinstance(found, tuple) else (found, None)
    o = o.view(*k.shape[:3], *o.shape[2:])[:, :, 0 if reverse else R - 1].contiguous()
    return o if state is None else (o, state)


def delta_product_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance `delta_product` by one token.

    Args:
        q: ``(B, H, K)``.
        k: ``(B, R, H, K)``.
        v: ``(B, R, H, V)``.
        beta: ``(B, R, H)``.
        decay: ``None``, ``(B, H)`` or ``(B, H, K)``.
        state: ``(B, H, K, V)``; it is not modified.
        scale: as in `delta_product`.

    Returns:
        ``(o, state)``: ``(B, H, V)`` in the type of v, and the next state.

    Raises:
        ValueError: shapes that do not fit.
    """
    if q.ndim != 3 or k.ndim != 4 or k.shape[1] < 1 or (k.shape[0], *k.shape[2:]) != tuple(q.shape):
        raise ValueError(
            "k must be (B, R, H, K) with R ≥ 1 factors a token and the sizes of q (B, H, K),"
            f" got k {shape_of(k)} beside q {shape_of(q)}"
        )
    _check_factors(k, v, beta, "(B, R, H")
    o = v[:, 0]
    for k_i, v_i, beta_i in zip(k.unbind(1), v.unbind(1), beta.unbind(1)):
        o, state = delta_rule_step(q, k_i, v_i, beta_i, decay, state, scale=scale)
        decay = None
    return o, state


def _check_factors(k: Tensor, v: Tensor, beta: Tensor, names: str) -> None:
    if v.shape[:-1] != k.shape[:-1] or beta.shape != k.shape[:-1]:
        raise ValueError(
            f"v must be {names}, V) and beta {names}) with the sizes of k {shape_of(k)},"
            f" got v {shape_of(v)} and beta {shape_of(beta)}"
        )


def _times(cu_seqlens: Tensor, factors: int, batch: int, length: int) -> Tensor:
    """Count the bounds of ``length`` tokens in factors."""
    check_cu_vector("cu_seqlens", cu_seqlens, batch)
    if torch.compiler.is_compiling():
        return cu_seqlens * factors

    def multiplied() -> Tensor:
        check_cu_seqlens(cu_seqlens, batch, length)
        return cu_seqlens * factors

    # The same tensor every time, so that what the kernels remember of it is found again.
    return remembered(cu_seqlens, ("factors", factors, batch, length), multiplied)


def _one_of(x: Tensor, count: int, *, last: bool) -> Tensor:
    """Lay ``x (B, T, …)`` on the first or last of ``count`` factors a token, zeros on the others."""
    x = x.unsqueeze(2)
    nothing = x.new_zeros(1).expand(*x.shape[:2], count - 1, *x.shape[3:])
    return torch.cat([nothing, x] if last else [x, nothing], 2).flatten(1, 2)
