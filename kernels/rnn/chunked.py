"""Gated recurrent cells in plain PyTorch: time is sequential, everything else is not.

All heads and gates of a step are one batched product. Sequences are sorted by length, so that the batch of a
step is the sequences that still run; what needs no order is computed for all steps at once.

Letters: H heads, D channels a head, G gates, S sequences, P all tokens, ordered by step. Tensors of all steps
are ``(H, P, …)`` and running states ``(H, n, S, D)``.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(h, final_state, gates)``; the gates ``(H, P, kept·D)``, for `backward`, need ``keep``."""
    steps = _steps(x, cu_seqlens, reverse)
    inputs = _by_step(x.flatten(0, 1), steps, state.dtype)
    bias = b.to(state.dtype).transpose(0, 1).flatten(1)[:, None]
    running = _to_running(state, steps)
    h, gates = _FORWARD[cell](inputs, _fused(R, state.dtype), bias, running, steps.sizes)
    o = x.new_empty(h.shape[1], *x.shape[3:])
    o[steps.tokens] = h.transpose(0, 1).to(x.dtype)
    return (
        o.view(*x.shape[:2], *x.shape[3:]),
        _from_running(running, steps),
        gates if keep else gates.new_empty(0),
    )


def backward(
    dh: Tensor,
    dstate: Tensor,
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dR, db, dinitial)``."""
    steps = _steps(dh, cu_seqlens, reverse)
    grad = _by_step(dh.flatten(0, 1)[:, None], steps, state.dtype)
    start, running = _to_running(state, steps), _to_running(dstate, steps)
    before, dinputs, drecurrent = _BACKWARD[cell](gates, grad, _fused(R, state.dtype), start, running, steps)
    num_gates, H, D = R.shape[:3]
    dR = (drecurrent.mT @ before).view(H, num_gates, D, D).transpose(0, 1)
    db = drecurrent.sum(1).view(H, num_gates, D).transpose(0, 1)
    dx = dh.new_empty(dh.shape[0] * dh.shape[1], num_gates, H, D)
    dx[steps.tokens] = dinputs.view(H, -1, num_gates, D).permute(1, 2, 0, 3).to(dh.dtype)
    return (
        dx.view(*dh.shape[:2], num_gates, H, D),
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


def _slstm_forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Tensor,
    sizes: list[int],
    *,
    exponential: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance ``running`` in place and return ``h`` and ``[i', f', z, o, c, n, d log f / df]``."""
    h, c, n, m = running.unbind(1)
    D = h.shape[-1]
    kept = inputs.new_empty(*inputs.shape[:2], 7 * D)
    outputs = inputs.new_empty(*inputs.shape[:2], D)
    inputs.add_(bias)
    begin = 0
    for active in sizes:
        now = slice(begin, begin + active)
        enter, forget, z, o, c_t, n_t, slope = kept[:, now].chunk(7, -1)
        i, f, z_in, o_in = torch.baddbmm(inputs[:, now], h[:, :active], weight).chunk(4, -1)
        torch.tanh(z_in, out=z)
        torch.sigmoid(o_in, out=o)
        if exponential:
            slope.fill_(1)
        else:
            torch.sigmoid(-f, out=slope)
            f = logsigmoid(f)
        past = (f + m[:, :active]).masked_fill_(n[:, :active] == 0, -torch.inf)
        m[:, :active] = torch.maximum(past, i)
        torch.exp(past.sub_(m[:, :active]), out=forget)
        torch.exp(i - m[:, :active], out=enter)
        torch.addcmul(enter * z, forget, c[:, :active], out=c_t)
        torch.addcmul(enter, forget, n[:, :active], out=n_t)
        c[:, :active], n[:, :active] = c_t, n_t
        h[:, :active] = outputs[:, now] = o * c_t / n_t
        begin += active
    return outputs, kept


def _slstm_backward(
    kept: Tensor, grad: Tensor, weight: Tensor, start: Tensor, running: Tensor, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the state's gradient ``running`` to the start in place; return ``(before, dx, drecurrent)``."""
    enter, forget, z, o, c, n, slope = kept.chunk(7, -1)
    ratio = c / n
    before = _previous(start[:, 0], o * ratio, steps)
    c_before, n_before = _previous(start[:, 1], c, steps), _previous(start[:, 2], n, steps)
    by_o, to_c = ratio * o * (1 - o), o / n
    by_z = enter * (1 - z * z)
    # The larger of the two terms is the one that m was, and its gate is exp(0).
    past_won = forget == 1
    dh, dc, dn, dm = running.unbind(1)
    dgates = kept.new_empty(*kept.shape[:2], 4, grad.shape[-1])
    end = kept.shape[1]
    for active in reversed(steps.sizes):
        now = slice(end - active, end)
        dh_t = dh[:, :active] + grad[:, now]
        dc_t = torch.addcmul(dc[:, :active], dh_t, to_c[:, now])
        dn_t = dn[:, :active] - dh_t * to_c[:, now] * ratio[:, now]
        dpast = (dc_t * c_before[:, now] + dn_t * n_before[:, now]) * forget[:, now]
        di = (dc_t * z[:, now] + dn_t) * enter[:, now]
        dm_t = dm[:, :active] - dpast - di
        dpast += dm_t * past_won[:, now]
        torch.sub(di + dm_t, dm_t * past_won[:, now], out=dgates[:, now, 0])
        torch.mul(dpast, slope[:, now], out=dgates[:, now, 1])
        torch.mul(dc_t, by_z[:, now], out=dgates[:, now, 2])
        torch.mul(dh_t, by_o[:, now], out=dgates[:, now, 3])
        dc[:, :active], dn[:, :active], dm[:, :active] = dc_t * forget[:, now], dn_t * forget[:, now], dpast
        dh[:, :active] = dgates[:, now].flatten(2) @ weight.mT
        end -= active
    dgates = dgates.flatten(2)
    return before, dgates, dgates


def _elman_forward(
    inputs: Tensor, weight: Tensor, bias: Tensor, running: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Advance ``running`` in place and return ``h`` twice: it is all that the backward needs."""
    h = running[:, 0]
    outputs = inputs.add_(bias)
    begin = 0
    for n in sizes:
        h[:, :n] = outputs[:, begin : begin + n].baddbmm_(h[:, :n], weight).tanh_()
        begin += n
    return outputs, outputs


def _elman_backward(
    kept: Tensor, grad: Tensor, weight: Tensor, start: Tensor, running: Tensor, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the state's gradient ``running`` to the start in place; return ``(before, dx, drecurrent)``."""
    slope = 1 - kept * kept
    dh = running[:, 0]
    end = kept.shape[1]
    for n in reversed(steps.sizes):
        now = slice(end - n, end)
        dgate = grad[:, now].add_(dh[:, :n]).mul_(slope[:, now])
        dh[:, :n] = dgate @ weight.mT
        end -= n
    return _previous(start[:, 0], kept, steps), grad, grad


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lstm": _lstm_forward,
    "gru": _gru_forward,
    "slstm": _slstm_forward,
    "slstm_exp": partial(_slstm_forward, exponential=True),
    "elman": _elman_forward,
}
_BACKWARD = {
    "lstm": _lstm_backward,
    "gru": _gru_backward,
    "slstm": _slstm_backward,
    "slstm_exp": _slstm_backward,
    "elman": _elman_backward,
}


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
