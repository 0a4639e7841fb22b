"""The selective scan, one token at a time: the oracle. Differentiable by autograd."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..token_loop import token_loop


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance ``h (B, D, N)`` by one token ``x, dt, z (B, D)``, ``B, C (B, N)``."""
    u, rate, b, c = (t.to(h.dtype) for t in (x, dt, B, C))
    h = torch.exp(rate[..., None] * A) * h + (rate * u)[..., None] * b[:, None]
    y = (h * c[:, None]).sum(-1) + D * u
    if z is not None:
        y = y * silu(z.to(h.dtype))
    return y.to(x.dtype), h


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""

    def advance(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return step(x, dt, A, B, C, D, rest[0] if len(rest) > 1 else None, rest[-1])

    inputs = (x, dt, B, C) if z is None else (x, dt, B, C, z)
    return token_loop(advance, inputs, state, cu_seqlens, reverse, x.clone())
