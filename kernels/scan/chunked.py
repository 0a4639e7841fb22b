"""The vector scans in plain PyTorch, on any device; their backward passes are the same scans in reverse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..prefix import Prefix, flip_sequences, owned
from . import softmax_blocks
from .blocked import blocked_scan
from .softmax_blocks import finite, previous


def elementwise_forward(
    a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(h, final_state)``."""
    if reverse:
        cu_seqlens, [state], [a, b] = flip_sequences(cu_seqlens, [state], [a, b])
    prefix = Prefix.of(cu_seqlens, b.shape[0], b.shape[1], 1, b.device)
    h = _affine(prefix, prefix.join(torch.zeros_like(state)[:, None], a), prefix.join(state[:, None], b))
    h, final = _results(cu_seqlens, reverse, [prefix.split(h)[1].to(b.dtype)], prefix.tails(h)[:, 0])
    return h, final


def elementwise_backward(
    dh: Tensor,
    dstate: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(da, db, dinitial)``."""
    if reverse:
        cu_seqlens, [state, dstate], [a, b, dh] = flip_sequences(cu_seqlens, [state, dstate], [a, b, dh])
    prefix = Prefix.of(cu_seqlens, b.shape[0], b.shape[1], 1, b.device)
    none = torch.zeros_like(state)[:, None]
    decay = prefix.join(none, a)
    h = _affine(prefix, decay, prefix.join(state[:, None], b))
    grad = prefix.join(none, dh)
    prefix.add_to_tails(grad, dstate[:, None])
    grad = _affine_back(prefix, decay.conj(), grad)
    dinitial, db = prefix.split(grad)
    _, da = prefix.split(grad * previous(h, 0.0).conj())
    da, db, dinitial = _results(cu_seqlens, reverse, [da.to(a.dtype), db.to(b.dtype)], dinitial[:, 0])
    return da, db, dinitial


def logsumexp_forward(
    s: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    if reverse:
        cu_seqlens, [state], [s, v] = flip_sequences(cu_seqlens, [state], [s, v])
    prefix = Prefix.of(cu_seqlens, v.shape[0], v.shape[1], 1, v.device)
    o, final = softmax_blocks.forward(prefix, s, v, state)
    o, final = _results(cu_seqlens, reverse, [o.to(v.dtype)], final)
    return o, final


def logsumexp_backward(
    do: Tensor,
    dstate: Tensor,
    s: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(ds, dv, dinitial)``."""
    if reverse:
        cu_seqlens, [state, dstate], [s, v, do] = flip_sequences(cu_seqlens, [state, dstate], [s, v, do])
    prefix = Prefix.of(cu_seqlens, v.shape[0], v.shape[1], 1, v.device)
    ds, dv, dinitial = softmax_blocks.backward(prefix, do, dstate, s, v, state)
    ds, dv, dinitial = _results(cu_seqlens, reverse, [ds.to(s.dtype), dv.to(v.dtype)], dinitial)
    return ds, dv, dinitial


def logcumsumexp_forward(
    s: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(z, final_state)``."""
    if reverse:
        cu_seqlens, [state], [s] = flip_sequences(cu_seqlens, [state], [s])
    prefix = Prefix.of(cu_seqlens, s.shape[0], s.shape[1], 1, s.device)
    level, decay, gate = _gates(prefix, prefix.join(state[:, None], s))
    # Level and sum stay apart until the end: far from 0, one float32 would lose the small terms.
    z = level + _affine(prefix, decay, gate).log()
    z, final = _results(cu_seqlens, reverse, [prefix.split(z)[1].to(s.dtype)], prefix.tails(z)[:, 0])
    return z, final


def logcumsumexp_backward(
    dz: Tensor,
    dstate: Tensor,
    s: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(ds, dinitial)``."""
    if reverse:
        cu_seqlens, [state, dstate], [s, dz] = flip_sequences(cu_seqlens, [state, dstate], [s, dz])
    prefix = Prefix.of(cu_seqlens, s.shape[0], s.shape[1], 1, s.device)
    _, decay, gate = _gates(prefix, prefix.join(state[:, None], s))
    total = _affine(prefix, decay, gate)
    grad = prefix.join(torch.zeros_like(state)[:, None], dz)
    prefix.add_to_tails(grad, dstate[:, None])
    grad = gate * _affine_back(prefix, decay, grad / total.masked_fill(total == 0, 1))
    dinitial, ds = prefix.split(grad)
    ds, dinitial = _results(cu_seqlens, reverse, [ds.to(s.dtype)], dinitial[:, 0])
    return ds, dinitial


def max_plus_forward(
    g: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(m, final_state)``."""
    if reverse:
        cu_seqlens, [state], [g, i] = flip_sequences(cu_seqlens, [state], [g, i])
    prefix = Prefix.of(cu_seqlens, i.shape[0], i.shape[1], 1, i.device)
    steps = prefix.join(torch.zeros_like(state)[:, None], g)
    m = blocked_scan("max_plus", steps, prefix.join(state[:, None], i), prefix.first())
    m, final = _results(cu_seqlens, reverse, [prefix.split(m)[1].to(i.dtype)], prefix.tails(m)[:, 0])
    return m, final


def _affine(prefix: Prefix, a: Tensor, b: Tensor) -> Tensor:
    return blocked_scan("affine", a, b, prefix.first())


def _affine_back(prefix: Prefix, a: Tensor, b: Tensor) -> Tensor:
    """Return ``g_t = a_{t+1} g_{t+1} + b_t``, each sequence from its end."""
    last = prefix.last()
    following = torch.cat((a[:, 1:], a[:, :1]), 1)
    return blocked_scan("affine", following.flip(1), b.flip(1), None if last is None else last.flip(0)).flip(
        1
    )


def _gates(prefix: Prefix, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the running maximum, and by what the sum below it decays and grows at each token."""
    first = prefix.first()
    level = blocked_scan("max_plus", s.new_zeros(1, 1, 1).expand(*s.shape[:2], 1), s, first)
    base = finite(level)
    before = previous(level, -torch.inf)
    if first is not None:
        before = before.masked_fill(first[:, None], -torch.inf)
    return base, (before - base).exp(), (s - base).exp()


def _results(
    cu_seqlens: Tensor | None, reverse: bool, outputs: list[Tensor], state: Tensor
) -> Sequence[Tensor]:
    """Turn time back."""
    if reverse:
        _, [state], outputs = flip_sequences(cu_seqlens, [state], outputs)
    return [owned(x) for x in (*outputs, state)]
