"""TTT-Linear in its dual form: a mini-batch at a time in plain PyTorch, all sequences and heads at once.

Within a mini-batch every gradient is taken at the weights it began with, so that all its tokens are products
of matrices. Sequences are cut into mini-batches from where their states left off, and lie ordered by
mini-batch and then by how many a sequence has: those of one step are neighbours.

Letters: P mini-batches of all sequences, C tokens each, H heads, D channels a head.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sequences import spans
from .reference import inner_gradient, normalise

GROUP_TOKENS = 64
"""The backward pass keeps a state for about as many tokens, and computes the others again."""


class Plan(NamedTuple):
    """Which tokens a mini-batch takes."""

    tokens: Tensor  # (P, C): rows of the flattened (B·T)
    filled: Tensor  # (P, C): whether there is a token
    complete: Tensor  # (P,): whether the mini-batch ends here
    sizes: list[int]  # how many sequences take part in the first, second, … mini-batch
    rank: Tensor  # (S,): sequences from the one with the most mini-batches on
    grown: Tensor  # (S,): by how many tokens each sequence's unfinished mini-batch grows, or shrinks


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
    plan = _plan(q, schedule, state, cu_seqlens, reverse)
    inputs = [_gather(t, plan, state.dtype) for t in (q, k, v, rate[..., None])]
    shared = [t.to(state.dtype) for t in (schedule, gain, offset)]
    o, running = _run(inputs, shared, state[plan.rank, :, :-1], plan.complete, plan.sizes)
    return _scatter(o, plan, v), _final(running, state, plan)


def backward(
    do: Tensor,
    dstate: Tensor,
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
) -> tuple[Tensor, ...]:
    """Return ``(dq, dk, dv, drate, dschedule, dgain, doffset, dinitial)``."""
    plan = _plan(q, schedule, state, cu_seqlens, reverse)
    inputs = [_gather(t, plan, state.dtype) for t in (q, k, v, rate[..., None])]
    shared = [t.to(state.dtype) for t in (schedule, gain, offset)]
    grad = _gather(do, plan, state.dtype)
    groups = list(_groups(plan.sizes, max(1, GROUP_TOKENS // schedule.shape[0])))
    entering = [state[plan.rank, :, :-1]]
    for rows, sizes in groups[:-1]:
        parts = [t[rows] for t in inputs]
        entering.append(_run(parts, shared, entering[-1], plan.complete[rows], sizes)[1])
    dinputs, dshared = [torch.zeros_like(t) for t in inputs], [torch.zeros_like(t) for t in shared]
    running = dstate[plan.rank, :, :-1].to(state.dtype)
    for rows, sizes in reversed(groups):

        def run(*given: Tensor, rows: slice = rows, sizes: list[int] = sizes) -> tuple[Tensor, Tensor]:
            return _run(given[:4], given[4:7], given[7], plan.complete[rows], sizes)

        # Not autograd.grad: below a custom operator autograd records nothing, while functional transforms do.
        parts = [t[rows] for t in inputs]
        pull = torch.func.vjp(run, *parts, *shared, entering.pop())[1]
        *found, running = pull((grad[rows], running))
        for target, part in zip(dinputs, found[: len(inputs)], strict=True):
            target[rows] = part
        for target, part in zip(dshared, found[len(inputs) :], strict=True):
            target += part
    dinitial = dstate.to(state.dtype, copy=True)  # the last row, a count, passes through
    dinitial[plan.rank, :, :-1] = running
    tensors = [_scatter(d, plan, t) for d, t in zip(dinputs, (q, k, v, rate[..., None]), strict=True)]
    tensors[3] = tensors[3].squeeze(-1)
    small = [d.to(t.dtype) for d, t in zip(dshared, (schedule, gain, offset), strict=True)]
    return *tensors, *small, dinitial


def _run(
    inputs: Sequence[Tensor], shared: Sequence[Tensor], state: Tensor, complete: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Run consecutive mini-batches.

    Args:
        inputs: q, k, v, rate, ``(P, H, C, D)`` each.
        shared: schedule, gain and offset.
        state: ``(S, H, 2D+2, D)``, in order of rank.
        complete: ``(P,)``.
        sizes: of the steps.
    """
    outputs = []
    for n, q, k, v, rate, full in zip(
        sizes, *(torch.split(t, sizes) for t in (*inputs, complete)), strict=True
    ):
        o, after = _mini_batch((q, k, v, rate), shared, state[:n], full)
        state = after if n == state.shape[0] else torch.cat([after, state[n:]])
        outputs.append(o)
    return torch.cat(outputs) if outputs else torch.zeros_like(inputs[0]), state


def _mini_batch(
    inputs: Sequence[Tensor], shared: Sequence[Tensor], state: Tensor, complete: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v, rate = inputs
    schedule, gain, offset = shared[0], shared[1][:, None], shared[2][:, None]
    weights, sums = state.chunk(2, 2)
    query, key = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1), value=1.0)
    step = rate * inner_gradient(key @ weights, v - k, gain, offset)
    update = (query @ key.mT).tril() @ step + query @ sums
    o = q + normalise(query @ weights - schedule[:, None] * update, gain, offset)
    sums = sums + key.mT @ step
    full = complete[:, None, None, None]
    weights = torch.where(full, weights - schedule[-1] * sums, weights)
    return o, torch.cat([weights, torch.where(full, 0.0, sums)], 2)


def _groups(sizes: list[int], count: int) -> Iterator[tuple[slice, list[int]]]:
    """Cut the steps into runs of ``count``: their rows among P, and their sizes."""
    begins = [0, *accumulate(sizes)]
    steps = [*range(0, len(sizes), count), len(sizes)]
    for first, last in pairwise(steps):
        yield slice(begins[first], begins[last]), sizes[first:last]


def _plan(x: Tensor, schedule: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Plan:
    batch, length = x.shape[:2]
    C = schedule.shape[0]
    row, begin, end = (
        torch.tensor(spans(cu_seqlens, batch, length), dtype=torch.long).reshape(-1, 3).unbind(1)
    )
    tokens = end - begin
    start, direction = row * length + (end - 1 if reverse else begin), -1 if reverse else 1
    place = state[:, 0, -1, 0].detach().round().long().cpu()
    count = torch.where(tokens > 0, (place + tokens + C - 1) // C, 0)
    rank = count.argsort(descending=True, stable=True)
    sequence = rank.repeat_interleave(count[rank])
    first = count[rank].cumsum(0) - count[rank]
    number = torch.arange(sequence.shape[0]) - first.repeat_interleave(count[rank])
    order = number.argsort(stable=True)
    sizes = number.bincount().tolist()
    sequence, number = sequence[order], number[order]
    walk = number[:, None] * C + torch.arange(C) - place[sequence][:, None]
    filled = (walk >= 0) & (walk < tokens[sequence][:, None])
    rows = torch.where(filled, start[sequence][:, None] + direction * walk, 0)
    complete = (number + 1) * C <= (place + tokens)[sequence]
    on = x.device
    return Plan(
        rows.to(on), filled.to(on), complete.to(on), sizes, rank.to(on), ((place + tokens) % C - place).to(on)
    )


def _gather(x: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Bring ``(B, T, H, D)`` to ``(P, H, C, D)``, zero where there is no token."""
    taken = x.flatten(0, 1)[plan.tokens].to(dtype)
    return taken.masked_fill(~plan.filled[..., None, None], 0.0).transpose(1, 2).contiguous()


def _scatter(x: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """Bring ``(P, H, C, D)`` back to ``(B, T, H, D)``."""
    flat = like.new_empty(like.shape).flatten(0, 1)
    flat[plan.tokens[plan.filled]] = x.transpose(1, 2)[plan.filled].to(like.dtype)
    return flat.view(like.shape)


def _final(running: Tensor, state: Tensor, plan: Plan) -> Tensor:
    final = torch.empty_like(state)
    final[plan.rank, :, :-1] = running
    final[:, :, -1] = state[:, :, -1] + plan.grown[:, None, None]
    return final
