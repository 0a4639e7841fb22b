"""The vector scans, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor

from ..token_loop import token_loop


def elementwise_step(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Advance ``h = a h + b`` by one token."""
    h = a.to(h.dtype) * h + b.to(h.dtype)
    return h.to(b.dtype), h


def logsumexp_step(s: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the running softmax average by one token; the level ``m`` carries no gradient."""
    m, u, w = state[..., 0], state[..., 1], state[..., 2:]
    s = s.to(state.dtype)
    level = torch.maximum(m, s).detach()
    finite = level.masked_fill(level == -torch.inf, 0)
    keep, gate = (m - finite).exp(), (s - finite).exp()
    u = keep * u + gate
    w = keep[..., None] * w + gate[..., None] * v.to(state.dtype)
    o = w / u.masked_fill(u == 0, 1)[..., None]
    return o.to(v.dtype), torch.cat((level[..., None], u[..., None], w), -1)


def logcumsumexp_step(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Advance ``z = log(exp(z) + exp(s))`` by one token."""
    x = s.to(z.dtype)
    level = torch.maximum(z, x).detach()
    empty = level == -torch.inf
    finite = level.masked_fill(empty, 0)
    total = (z - finite).exp() + (x - finite).exp()
    z = (finite + total.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
    return z.to(s.dtype), z


def max_plus_step(g: Tensor, i: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Advance ``m = max(m + g, i)`` by one token."""
    m = torch.maximum(m + g.to(m.dtype), i.to(m.dtype))
    return m.to(i.dtype), m


def elementwise_forward(
    a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(h, final_state)``."""
    return token_loop(elementwise_step, (a, b), state, cu_seqlens, reverse, b.clone())


def logsumexp_forward(
    s: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    return token_loop(logsumexp_step, (s, v), state, cu_seqlens, reverse, v.clone())


def logcumsumexp_forward(
    s: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(z, final_state)``."""
    return token_loop(logcumsumexp_step, (s,), state, cu_seqlens, reverse, s.clone())


def max_plus_forward(
    g: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(m, final_state)``."""
    return token_loop(max_plus_step, (g, i), state, cu_seqlens, reverse, i.clone())
