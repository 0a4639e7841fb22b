"""Gated recurrent cells in plain PyTorch: time is sequential, everything else is not.

All heads and gates of a step are one batched product. Sequences are sorted by length, so that the batch of a
step is the sequences that still run; what needs no order is computed for all steps at once.

Letters: H heads, D channels a head, G gates, S sequences, P all tokens, ordered by step. Tensors of all steps
are ``(H, P, …)`` and running states ``(H, n, S, D)``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..sequences import check_cu_seqlens


class Steps(NamedTuple):
    """Which tokens a step takes."""

    tokens: Tensor  # (P,): rows of the flattened (B·T), ordered by step
    sizes: list[int]  # how many sequences still run at each step
    rank: Tensor  # (S,): sequences from the longest to the shortest
    before: Tensor  # (P − sizes[0],): for tokens after a first one, where their predecessor lies in P


def forward(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(h, final_state, gates)``; the gates ``(H, P, 5·D)`` are for `backward`."""
    steps = _steps(x, cu_seqlens, reverse)
    inputs = _by_step(x.flatten(0, 1), steps, state.dtype)
    bias = b.to(state.dtype).transpose(0, 1).flatten(1)[:, None]
    running = _to_running(state, steps)
    run = _lstm_forward if cell == "lstm" else _gru_forward
    h, gates = run(inputs, _fused(R, state.dtype), bias, running, steps.sizes)
    o = x.new_empty(h.shape[1], *x.shape[3:])
    o[steps.tokens] = h.transpose(0, 1).to(x.dtype)
    return o.view(*x.shape[:2], *x.shape[3:]), _from_running(running, steps), gates


def backward(
    dh: Tensor,
    dstate: Tensor,
    gates: Tensor,
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dR, db, dinitial)``."""
    steps = _steps(x, cu_seqlens, reverse)
    grad = _by_step(dh.flatten(0, 1)[:, None], steps, state.dtype)
    start, running = _to_running(state, steps), _to_running(dstate, steps)
    run = _lstm_backward if cell == "lstm" else _gru_backward
    before, dinputs, drecurrent = run(gates, grad, _fused(R, state.dtype), start, running, steps)
    num_gates = R.shape[0]
    dR = (drecurrent.mT @ before).view(R.shape[1], num_gates, *R.shape[2:]).transpose(0, 1)
    db = drecurrent.sum(1).view(R.shape[1], num_gates, -1).transpose(0, 1)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format).flatten(0, 1)
    dx[steps.tokens] = dinputs.view(R.shape[1], -1, num_gates, R.shape[2]).permute(1, 2, 0, 3).to(x.dtype)
    return (
        dx.view(x.shape),
        dR.to(R.dtype).contiguous(),
        db.to(b.dtype).contiguous(),
        _from_running(running, steps),
    )


def _lstm_forward(
    inputs: Tensor, weight: Tensor, bias: Tensor, running: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Advance ``running`` in place and return ``h`` and ``[i, f, g, o, c]``."""
    h, c = running.unbind(1)
    D = h.shape[-1]
    kept = torch.cat((inputs.add_(bias), inputs.new_empty(*inputs.shape[:2], D)), -1)
    outputs = inputs.new_empty(*inputs.shape[:2], D)
    begin = 0
    for n in sizes:
        step = kept[:, begin : begin + n]
        step[..., : 4 * D].baddbmm_(h[:, :n], weight)
        step[..., : 2 * D].sigmoid_()
        i, f, g, o, cell = step.chunk(5, -1)
        g.tanh_()
        o.sigmoid_()
        torch.addcmul(i * g, f, c[:, :n], out=cell)
        c[:, :n] = cell
        torch.mul(o, cell.tanh(), out=outputs[:, begin : begin + n])
        h[:, :n] = outputs[:, begin : begin + n]
        begin += n
    return outputs, kept


def _lstm_backward(
    kept: Tensor, grad: Tensor, weight: Tensor, start: Tensor, running: Tensor, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the state's gradient ``running`` to the start in place; return ``(before, dx, drecurrent)``."""
    i, f, g, o, c = kept.chunk(5, -1)
    tanh = c.tanh()
    to_c = o * (1 - tanh * tanh)
    # What the gates before their non-linearity receive for a unit of dc, and o for a unit of dh.
    by_c = torch.stack((g * i * (1 - i), _previous(start[:, 1], c, steps) * f * (1 - f), i * (1 - g * g)), 2)
    by_h = tanh * o * (1 - o)
    dh, dc = running.unbind(1)
    dgates = kept.new_empty(*kept.shape[:2], 4, grad.shape[-1])
    end = kept.shape[1]
    for n in reversed(steps.sizes):
        now = slice(end - n, end)
        dh_t = dh[:, :n] + grad[:, now]
        dc_t = torch.addcmul(dc[:, :n], dh_t, to_c[:, now])
        torch.mul(by_c[:, now], dc_t[:, :, None], out=dgates[:, now, :3])
        torch.mul(by_h[:, now], dh_t, out=dgates[:, now, 3])
        dc[:, :n] = dc_t * f[:, now]
        dh[:, :n] = dgates[:, now].flatten(2) @ weight.mT
        end -= n
    dgates = dgates.flatten(2)
    return _previous(start[:, 0], o * tanh, steps), dgates, dgates


def _gru_forward(
    inputs: Tensor, weight: Tensor, bias: Tensor, running: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Advance ``running`` in place and return ``h`` and ``[r, z, n, R_n h + b_n, h]``."""
    h = running[:, 0]
    D = h.shape[-1]
    kept = inputs.new_empty(*inputs.shape[:2], 5 * D)
    begin = 0
    for n in sizes:
        now = slice(begin, begin + n)
        r, z, new, recurrent_n, h_t = kept[:, now].chunk(5, -1)
        recurrent = torch.baddbmm(bias, h[:, :n], weight)
        torch.add(inputs[:, now, : 2 * D], recurrent[..., : 2 * D], out=kept[:, now, : 2 * D]).sigmoid_()
        recurrent_n.copy_(recurrent[..., 2 * D :])
        torch.addcmul(inputs[:, now, 2 * D :], r, recurrent_n, out=new).tanh_()
        torch.lerp(new, h[:, :n], z, out=h_t)
        h[:, :n] = h_t
        begin += n
    return kept[..., 4 * D :], kept


def _gru_backward(
    kept: Tensor, grad: Tensor, weight: Tensor, start: Tensor, running: Tensor, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the state's gradient ``running`` to the start in place; return ``(before, dx, drecurrent)``."""
    r, z, new, recurrent_n, h = kept.chunk(5, -1)
    before = _previous(start[:, 0], h, steps)
    # What each sum before its non-linearity receives for a unit of dh.
    by_n = (1 - z) * (1 - new * new)
    by_z = (before - new) * z * (1 - z)
    by_r = by_n * recurrent_n * r * (1 - r)
    recurrent = torch.stack((by_r, by_z, by_n * r), 2)
    dh = running[:, 0]
    end = kept.shape[1]
    for n in reversed(steps.sizes):
        now = slice(end - n, end)
        dh_t = grad[:, now].add_(dh[:, :n])
        recurrent[:, now].mul_(dh_t[:, :, None])
        dh[:, :n] = torch.baddbmm(dh_t * z[:, now], recurrent[:, now].flatten(2), weight.mT)
        end -= n
    inputs = torch.cat((recurrent[:, :, :2].flatten(2), by_n * grad), -1)
    return before, inputs, recurrent.flatten(2)


def _steps(x: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Steps:
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        bounds = (
            torch.arange(0, batch * length + 1, length)
            if length
            else torch.zeros(batch + 1, dtype=torch.long)
        )
    else:
        bounds = torch.tensor(check_cu_seqlens(cu_seqlens, batch, length))
    rank = bounds.diff().argsort(descending=True, stable=True)
    starts, lengths = bounds[:-1][rank], bounds.diff()[rank]
    time = torch.arange(batch * length) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    token = (
        (starts + lengths - 1).repeat_interleave(lengths) - time
        if reverse
        else starts.repeat_interleave(lengths) + time
    )
    sizes = time.bincount()
    before = torch.arange(batch * length) - torch.cat((sizes[:1], sizes[:-1])).repeat_interleave(sizes)
    skip = int(sizes[0]) if sizes.numel() else 0
    order = time.argsort(stable=True)
    device = x.device
    return Steps(token[order].to(device), sizes.tolist(), rank.to(device), before[skip:].to(device))


def _by_step(x: Tensor, steps: Steps, dtype: torch.dtype) -> Tensor:
    """Bring ``(B·T, G, H, D)`` to ``(H, P, G·D)``."""
    return x.index_select(0, steps.tokens).to(dtype).permute(2, 0, 1, 3).contiguous().flatten(2)


def _fused(R: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring ``(G, H, D, D)`` to ``(H, D, G·D)``, input by output."""
    return R.to(dtype).permute(1, 3, 0, 2).contiguous().flatten(2)


def _to_running(state: Tensor, steps: Steps) -> Tensor:
    return state[steps.rank].permute(2, 1, 0, 3).contiguous()


def _from_running(running: Tensor, steps: Steps) -> Tensor:
    state = running.new_empty(running.shape[2], running.shape[1], running.shape[0], running.shape[3])
    state[steps.rank] = running.permute(2, 1, 0, 3)
    return state


def _previous(start: Tensor, x: Tensor, steps: Steps) -> Tensor:
    """Return what ``x`` was one step earlier, ``start`` at a first token."""
    first = steps.sizes[0] if steps.sizes else 0
    return torch.cat((start[:, :first], x.index_select(1, steps.before)), 1)
