"""The log-sum-exp scan by blocks of tokens: matrix products inside a block, a scan over the blocks.

Every exponent is a score minus a running maximum that includes it, so none is above 0, and the maximum is
kept apart from the sum: scores of ±10⁴ lose nothing. The state is a token of its own in front of each
sequence, with score m and value [u, w] where a token has [1, v].

Letters: B batch, N blocks, C tokens of a block, H heads, V value channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..prefix import Prefix
from .blocked import blocked_scan

BLOCK = 64


class Blocks(NamedTuple):
    """Scores and values in blocks, with all that a block needs to know of its neighbours."""

    values: Tensor  # (B, N, H, C, 1+V)
    weights: Tensor  # (B, N, H, C, C): exp(s_i − m_t) for i ≤ t in one sequence
    enter: Tensor  # (B, N, H, C): from the end of the previous block to token t
    leave: Tensor  # (B, N, H, C): from token i to the end of its block
    decay: Tensor  # (B, N, H): from the end of the previous block to the end of this one
    level: Tensor  # (B, N, H, C): m_t
    resets: Tensor | None  # (N,): a sequence begins in this block


def forward(prefix: Prefix, s: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)`` in the type of the state."""
    o, final = _forward(prefix, s, v, state)
    if bool(o.isfinite().all()) and bool(final[..., 1:].isfinite().all()):
        return o, final
    # Products of matrices would carry what is not finite to tokens before it, and to other sequences.
    clean, poison = _without_poison(prefix, s, v, state)
    o, final = _forward(prefix, *clean)
    poison = _spread(prefix, poison)
    final[..., 1:] += prefix.tails(poison)[:, 0, :, None]
    return o + prefix.split(poison)[1][..., None], final


def backward(
    prefix: Prefix, do: Tensor, dstate: Tensor, s: Tensor, v: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(ds, dv, dinitial)`` in the type of the state."""
    gradients = _backward(prefix, do, dstate, s, v, state)
    if all(bool(g.isfinite().all()) for g in gradients):
        return gradients
    clean, poison = _without_poison(prefix, s, v, state)
    # A token's gradient is not finite if an output at or after it, or that output's gradient, is not.
    outputs = _spread(prefix, poison) + prefix.join(torch.zeros_like(state[:, None, :, 0]), _poison(do))
    prefix.add_to_tails(outputs, _poison(dstate[..., 1:])[:, None])
    first, rest = prefix.split(_spread(prefix, outputs, back=True))
    do, dstate = (torch.where(x.isfinite(), x, 0) for x in (do, dstate))
    ds, dv, dinitial = _backward(prefix, do, dstate, *clean)
    return ds + rest, dv + rest[..., None], dinitial + first[:, 0, :, None]


def _poison(x: Tensor) -> Tensor:
    """NaN where one of the last dimension is not finite, 0 elsewhere."""
    return (x * 0).sum(-1)


def _without_poison(
    prefix: Prefix, s: Tensor, v: Tensor, state: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return score, value and state with only finite numbers, and NaN at the rows that had others.

    A score or a level of −inf is none of those: it leaves its token out.
    """

    def split(score: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wrong = _poison(value) + torch.where(score == -torch.inf, 0, score * 0)
        dropped = wrong.isnan()
        return score.masked_fill(dropped, -torch.inf), value.masked_fill(dropped[..., None], 0), wrong

    s, v, tokens = split(s, v.to(state.dtype))
    level, sums, start = split(state[..., 0], state[..., 1:])
    clean = (s, v, torch.cat((level[..., None], sums), -1))
    return clean, prefix.join(start[:, None], tokens)


def _spread(prefix: Prefix, x: Tensor, back: bool = False) -> Tensor:
    """Add up ``x (B, n+T, H)`` along each sequence, from its beginning or from its end."""
    mark = prefix.last() if back else prefix.first()
    ones = x.new_ones(1, 1, 1).expand(*x.shape[:2], 1)
    if not back:
        return blocked_scan("affine", ones, x, mark)
    return blocked_scan("affine", ones, x.flip(1), None if mark is None else mark.flip(0)).flip(1)


def _forward(prefix: Prefix, s: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _cut(prefix, s, v, state)
    sums = _sums(blocks)
    o = _join(sums[..., 1:] / _positive(sums[..., :1]), prefix.length)
    states = _join(torch.cat((blocks.level[..., None], sums), -1), prefix.length)
    return prefix.split(o)[1], prefix.tails(states)[:, 0]


def _backward(
    prefix: Prefix, do: Tensor, dstate: Tensor, s: Tensor, v: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``q_t = [−do_t·o_t, do_t] / u_t`` a value has the gradient ``Σ_{t≥i} exp(s_i − m_t) q_t``."""
    blocks = _cut(prefix, s, v, state)
    sums = _sums(blocks)
    total = _positive(sums[..., :1])
    grad = _split(prefix.join(torch.zeros_like(state[:, None, :, 2:]), do), 0.0)
    inner = (grad * sums[..., 1:]).sum(-1, keepdim=True) / total
    query = _join(torch.cat((-inner, grad), -1) / total, prefix.length)
    prefix.add_to_tails(query, dstate[:, None, :, 1:])
    query = _split(query, 0.0)
    carried = torch.einsum("bnhc,bnhcv->bnhv", blocks.enter, query)
    carried = _scan(
        blocks.decay.flip(1), carried.flip(1), None if blocks.resets is None else blocks.resets.flip(0)
    )
    after = pad(carried.flip(1)[:, 1:], (0, 0, 0, 0, 0, 1))
    dvalues = blocks.weights.mT @ query + blocks.leave[..., None] * after[..., None, :]
    ds = (blocks.values * dvalues).sum(-1, keepdim=True)
    first, rest = prefix.split(_join(torch.cat((ds, dvalues), -1), prefix.length))
    return rest[..., 0], rest[..., 2:], first[:, 0]


def finite(level: Tensor) -> Tensor:
    """Replace −inf by 0, to subtract it from −inf."""
    return level.masked_fill(level == -torch.inf, 0)


def previous(x: Tensor, start: float) -> Tensor:
    """Shift ``x (B, T, …)`` by one along T, with ``start`` in front."""
    return torch.cat((torch.full_like(x[:, :1], start), x[:, :-1]), 1)


def _positive(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1)


def _split(x: Tensor, fill: float) -> Tensor:
    """Cut ``(B, T, H, V)`` into ``(B, N, H, C, V)``."""
    extra = -x.shape[1] % BLOCK
    if extra:
        x = pad(x, (0, 0, 0, 0, 0, extra), value=fill)
    batch, length, heads, size = x.shape
    return x.reshape(batch, length // BLOCK, BLOCK, heads, size).transpose(2, 3)


def _join(x: Tensor, length: int) -> Tensor:
    """Undo `_split`."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length]


def _cut(prefix: Prefix, s: Tensor, v: Tensor, state: Tensor) -> Blocks:
    values = _split(prefix.join(state[:, None, :, 1:], pad(v.to(state.dtype), (1, 0), value=1.0)), 0.0)
    joined = prefix.join(state[:, None, :, 0], s)
    first = prefix.first()
    level = blocked_scan("max_plus", joined.new_zeros(1, 1, 1).expand(*joined.shape[:2], 1), joined, first)
    score = _split(joined[..., None], -torch.inf)[..., 0]
    # The padding repeats the last level, which is also the level at the end of the last block.
    extra = score.shape[1] * BLOCK - joined.shape[1]
    level = _split(torch.cat((level, level[:, -1:].expand(-1, extra, -1)), 1)[..., None], 0.0)[..., 0]
    base, end = finite(level), level[..., -1]
    before = previous(end, -torch.inf)
    hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=v.device).triu(1)
    weights = score[..., None, :] - base[..., None]
    enter, leave, decay = before[..., None] - base, score - base[..., -1:], before - base[..., -1]
    resets = None
    if first is not None:
        count = pad(first, (0, extra)).cumsum(0).view(-1, BLOCK)
        ended = previous(count[None, :, -1], 0)[0]
        resets = count[:, -1] != ended
        hidden = hidden | (count[:, :, None] != count[:, None, :])
        hidden = hidden[:, None]
        enter = enter.masked_fill((count != ended[:, None])[:, None], -torch.inf)
        leave = leave.masked_fill((count != count[:, -1:])[:, None], -torch.inf)
        decay = decay.masked_fill(resets[:, None], -torch.inf)
    weights = weights.masked_fill_(hidden, -torch.inf).exp_()
    return Blocks(values, weights, enter.exp(), leave.exp(), decay.exp(), level, resets)


def _sums(blocks: Blocks) -> Tensor:
    """Return ``[u_t, w_t]`` below the level m_t, ``(B, N, H, C, 1+V)``."""
    sums = blocks.weights @ blocks.values
    carried = previous(_scan(blocks.decay, sums[..., -1, :], blocks.resets), 0.0)
    return sums.addcmul_(blocks.enter[..., None], carried[..., None, :])


def _scan(decay: Tensor, x: Tensor, resets: Tensor | None) -> Tensor:
    """Scan ``(B, N, H, V)`` over the blocks with one decay a head."""
    a = decay[..., None].expand_as(x).flatten(2)
    return blocked_scan("affine", a, x.flatten(2), resets).view_as(x)
