"""Softmax attention over batches and packed sequences.

The other side of every comparison, so it is PyTorch's own, the best kept there is: packed sequences go
through `flex_attention` on a GPU, and by length through `scaled_dot_product_attention` elsewhere.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_cu_vector, check_floating, shape_of
from ..dispatch import implementation, resolve
from ..prefix import owned
from . import chunked, flex, reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute ``o_i = Σ_j softmax_j(scale · q_iᵀ k_j) v_j`` over the keys that query i sees.

    Vaswani et al., *Attention Is All You Need* (NeurIPS 2017), arXiv:1706.03762.

    Args:
        q: ``(B, Tq, H, D)``.
        k: ``(B, Tk, Hk, D)``, where Hk divides H and each key head serves H / Hk query heads.
        v: ``(B, Tk, Hk, V)``.
        causal: query i sees keys j ≤ i. Where Tk differs from Tq, the last query stands at the last key.
        window: a causal query sees itself and the ``window - 1`` tokens before it; else ``|i − j| < window``.
        cu_seqlens: ``(S+1,)`` bounds of the query sequences, which lie end to end in a batch of 1.
        cu_seqlens_k: the same for the keys; ``None`` is ``cu_seqlens``.
        scale: factor of the scores; ``None`` is ``D ** -0.5``.
        backend: ``"auto"``, ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``o (B, Tq, H, V)`` in the type of v; zeros for a query that sees no key.

    Raises:
        ValueError: shapes that do not fit, a window below 1, ``cu_seqlens`` that does not rise from 0 to T,
            or a backend that cannot serve the call.
    """
    _check(q, k, v, window)
    cu_seqlens_k = _check_bounds(q, k, cu_seqlens, cu_seqlens_k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend not in ("auto", "chunked", "reference"):
        resolve("attention", backend, q, k, v)
    # Both backends are differentiable PyTorch. Only what depends on the values of cu_seqlens, or loops over
    # blocks of queries, cannot be traced: that goes into a compiled graph as one operator.
    traceable = cu_seqlens is None and window is None and (not causal or q.shape[1] == k.shape[1])
    if torch.compiler.is_compiling() and not traceable:
        o: Tensor = _forward(q, k, v, causal, window, scale, cu_seqlens, cu_seqlens_k, backend)
        return o
    if backend == "auto" and cu_seqlens is not None and cu_seqlens_k is not None and flex.serves(q, k, v):
        return flex.forward(q, k, v, causal, window, scale, cu_seqlens, cu_seqlens_k)
    forward = reference.forward if backend == "reference" else chunked.forward
    return forward(q, k, v, causal, window, scale, cu_seqlens, cu_seqlens_k)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    check_floating(q=q, k=k, v=v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.ndim != 4:
        raise ValueError(f"q must be (B, Tq, H, D), got {shape_of(q)}")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must be (B, Tk, Hk, D) with the B and D of q {shape_of(q)}, got {shape_of(k)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be (B, Tk, Hk, V) with the sizes of k {shape_of(k)}, got {shape_of(v)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"the heads of k must divide those of q, got {k.shape[2]} and {q.shape[2]}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def _check_bounds(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> Tensor | None:
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens, which is None")
        return None
    check_cu_vector("cu_seqlens", cu_seqlens, q.shape[0])
    if cu_seqlens_k is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"with cu_seqlens alone q and k must be equally long, got {q.shape[1]} and {k.shape[1]}:"
                " give cu_seqlens_k"
            )
        return cu_seqlens
    check_cu_vector("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            "cu_seqlens and cu_seqlens_k must bound as many sequences,"
            f" got {shape_of(cu_seqlens)} and {shape_of(cu_seqlens_k)}"
        )
    return cu_seqlens_k


@torch.library.custom_op("mainstem::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    backend: str,
) -> Tensor:
    kernel = implementation("attention", backend, q, k, v)
    o: Tensor = kernel.forward(q, k, v, causal, window, scale, cu_seqlens, cu_seqlens_k)
    return owned(o)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    backend: str,
) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.custom_op("mainstem::attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("attention", backend, q, k, v)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = kernel.forward(q, k, v, causal, window, scale, cu_seqlens, cu_seqlens_k)
        return o

    gradient = torch.func.vjp(forward, q, k, v)[1]
    dq, dk, dv = (owned(x) for x in gradient(do))
    return dq, dk, dv


@_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.causal, ctx.window, ctx.scale, cu_seqlens, cu_seqlens_k, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k)


def _autograd(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    dq, dk, dv = _backward(
        do, q, k, v, ctx.causal, ctx.window, ctx.scale, cu_seqlens, cu_seqlens_k, ctx.backend
    )
    return dq, dk, dv, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
