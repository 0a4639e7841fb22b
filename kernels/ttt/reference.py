"""TTT-Linear one token at a time: the oracle. Differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..token_loop import token_loop

EPS = 1e-6
"""Of the inner model's LayerNorm."""


def normalise(z: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """LayerNorm of ``z`` (…, D) with the gain and offset of each head."""
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * gain + offset


def inner_gradient(z: Tensor, target: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Gradient of ``½‖normalise(z) − target‖²`` by ``z``, all ``(…, D)``."""
    centred = z - z.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    x = centred * inverse
    g = gain * (gain * x + offset - target)
    return inverse * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take one token ``(B, H, D)``; the state is ``(B, H, 2D+3, D)``."""
    dtype, D = state.dtype, q.shape[-1]
    q, k, v, rate, schedule, gain, offset = (t.to(dtype) for t in (q, k, v, rate, schedule, gain, offset))
    weights, sums, place = torch.split(state, [D + 1, D + 1, 1], 2)
    query, key = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1), value=1.0)
    z = torch.einsum("bhk,bhkv->bhv", key, weights)
    gradient = inner_gradient(z, v - k, gain, offset)
    sums = sums + key[..., None] * (rate[..., None] * gradient)[..., None, :]
    index = place[:, 0, 0, 0].round().long()
    fast = weights - schedule[index][:, None, None, None] * sums
    o = q + normalise(torch.einsum("bhk,bhkv->bhv", query, fast), gain, offset)
    full = (index == schedule.shape[0] - 1)[:, None, None, None]
    weights, sums = torch.where(full, fast, weights), torch.where(full, 0.0, sums)
    return o, torch.cat([weights, sums, place + 1 - full * schedule.shape[0]], 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    schedule: Tensor,
    gain: Tensor,
    offset: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""

    def advance(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        o, state = step(q, k, v, rate, schedule, gain, offset, state)
        return o.to(v.dtype), state

    return token_loop(advance, (q, k, v, rate), state, cu_seqlens, reverse, torch.zeros_like(v))
