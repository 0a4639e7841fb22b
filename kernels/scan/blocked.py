"""A parallel prefix scan over time in plain PyTorch, for the rings (+, ×) and (max, +).

Time is cut into runs of `RUN` tokens. All runs advance together, one token at a time; their totals are
scanned in the same way, and what comes before a run is then added to each of its tokens. The work is linear
in T, the number of PyTorch calls logarithmic. Nothing is divided and no logarithm taken: any coefficient is
exact: 0, negative, or above 1 (a product of coefficients that overflows is held at the largest finite number,
lest 0 · ∞ appear).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

RUN = 16

Ring = Literal["affine", "max_plus"]


def blocked_scan(ring: Ring, a: Tensor, b: Tensor, first: Tensor | None = None) -> Tensor:
    """Return ``h_t = a_t h_{t-1} + b_t`` or ``h_t = max(a_t + h_{t-1}, b_t)`` from an empty ``h``.

    Args:
        ring: which of the two.
        a: ``(B, T, D)``, or any shape that expands to that of b.
        b: ``(B, T, D)``.
        first: ``(T,)`` bool, where h is empty again; nothing leaks across, not even NaN.
    """
    batch, length, size = b.shape
    if length <= RUN:
        return _runs(ring, a[:, None], b[:, None], None if first is None else first[None])[0][:, 0]
    extra = -length % RUN
    if extra:
        a, b = pad(a, (0, 0, 0, extra)), pad(b, (0, 0, 0, extra))
        first = None if first is None else pad(first, (0, extra))
    runs = b.shape[1] // RUN
    a, b = a.reshape(batch, runs, RUN, a.shape[-1]), b.reshape(batch, runs, RUN, size)
    seen = None if first is None else first.view(runs, RUN)
    h, products, seen = _runs(ring, a, b, seen)
    total = blocked_scan(ring, products[:, :, -1], h[:, :, -1], None if seen is None else seen[:, -1])
    before = _empty(ring, total[:, :1]), total[:, :-1]
    carried = _apply(ring, products, torch.cat(before, 1)[:, :, None], h)
    h = carried if seen is None else torch.where(seen[..., None], h, carried)
    return h.reshape(batch, runs * RUN, size)[:, :length]


def _runs(ring: Ring, a: Tensor, b: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scan ``(B, N, C, D)`` along C: states, products of ``a`` so far, and whether a first was met."""
    h, products = torch.empty_like(b), torch.empty_like(a, memory_format=torch.contiguous_format)
    h[:, :, :1], products[:, :, :1] = b[:, :, :1], a[:, :, :1]
    for t in range(1, b.shape[2]):
        step = _apply(ring, a[:, :, t], h[:, :, t - 1], b[:, :, t])
        h[:, :, t] = step if first is None else torch.where(first[:, t, None], b[:, :, t], step)
        products[:, :, t] = _compose(ring, a[:, :, t], products[:, :, t - 1])
    return h, products, None if first is None else first.cummax(1).values


def _apply(ring: Ring, a: Tensor, h: Tensor, b: Tensor) -> Tensor:
    return torch.addcmul(b, a, h) if ring == "affine" else torch.maximum(b, a + h)


def _compose(ring: Ring, a: Tensor, product: Tensor) -> Tensor:
    if ring == "max_plus":
        return a + product
    product = a * product
    if product.is_complex():
        return torch.view_as_complex(torch.view_as_real(product).nan_to_num_(0.0))
    limit = torch.finfo(product.dtype).max
    return product.clamp_(-limit, limit)


def _empty(ring: Ring, like: Tensor) -> Tensor:
    return torch.full_like(like, 0 if ring == "affine" else -torch.inf)
