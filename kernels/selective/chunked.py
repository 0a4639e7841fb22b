"""The selective scan in plain PyTorch, on any device: one token at a time within chunks of known state.

The backward pass keeps the state before every chunk, and runs a chunk again to get those within it. Tensors
of a chunk have time in front: ``(C, b, …)``.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..chunk_decay import walk
from ..sequences import spans

CHUNK = 64

Bounds = tuple[int, int]


class _Chunk(NamedTuple):
    """One chunk in the order of the walk and in the type of the state.

    Attributes:
        x, dt: ``(C, b, D)``.
        B, C: ``(C, b, N)``.
    """

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor

    def states(self, A: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decays ``(C, b, D, N)`` and the states ``(C+1, b, D, N)``, the first as given."""
        decay = torch.exp(self.dt[..., None] * A)
        written = (self.dt * self.x)[..., None] * self.B[:, :, None]
        states = decay.new_empty(decay.shape[0] + 1, *decay.shape[1:])
        states[0] = before
        rows = states.unbind(0)
        for a, b, h, after in zip(decay.unbind(0), written.unbind(0), rows, rows[1:]):
            torch.addcmul(b, a, h, out=after)
        return decay, states


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
    y, final = x.new_empty(x.shape), torch.empty_like(state)
    for rows, begin, end in _pieces(x, cu_seqlens):
        h = state[rows]
        for bounds in walk(begin, end, CHUNK, reverse):
            chunk = _chunk(x, dt, B, C, bounds, reverse, h.dtype)
            _, states = chunk.states(A, h)
            o = _read(states[1:], chunk.C) + D * chunk.x
            if z is not None:
                o = o * silu(_cut(z, bounds, reverse, h.dtype))
            _put(y, o, bounds, reverse)
            h = states[-1].clone()
        final[rows] = h
    return y, final


def backward(
    dy: Tensor,
    dstate: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, dt, A, B, C, D, z and the state."""
    dx, ddt, dB, dC = (t.new_empty(t.shape) for t in (x, dt, B, C))
    dz = None if z is None else z.new_empty(z.shape)
    dA, dD, dinitial = torch.zeros_like(A), torch.zeros_like(D), torch.empty_like(state)
    for rows, begin, end in _pieces(x, cu_seqlens):
        bounds_of = walk(begin, end, CHUNK, reverse)
        before = [state[rows]]
        for bounds in bounds_of[:-1]:
            chunk = _chunk(x, dt, B, C, bounds, reverse, A.dtype)
            before.append(chunk.states(A, before[-1])[1][-1].clone())
        d = dstate[rows]
        for bounds, h in zip(reversed(bounds_of), reversed(before)):
            chunk = _chunk(x, dt, B, C, bounds, reverse, A.dtype)
            decay, states = chunk.states(A, h)
            grad = _cut(dy, bounds, reverse, A.dtype)
            if z is not None and dz is not None:
                gate, slope = _gate(_cut(z, bounds, reverse, A.dtype))
                o = _read(states[1:], chunk.C) + D * chunk.x
                _put(dz, grad * o * slope, bounds, reverse)
                grad = grad * gate
            dstates, d = _states_back(grad[..., None] * chunk.C[:, :, None], decay, d)
            _put(dC, torch.einsum("cbdn,cbd->cbn", states[1:], grad), bounds, reverse)
            _put(dB, torch.einsum("cbdn,cbd->cbn", dstates, chunk.dt * chunk.x), bounds, reverse)
            dwritten = _read(dstates, chunk.B)
            dexponent = dstates.mul_(states[:-1]).mul_(decay)
            _put(dx, dwritten * chunk.dt + D * grad, bounds, reverse)
            _put(ddt, dwritten * chunk.x + torch.einsum("cbdn,dn->cbd", dexponent, A), bounds, reverse)
            dA += torch.einsum("cbdn,cbd->dn", dexponent, chunk.dt)
            dD += (grad * chunk.x).sum((0, 1))
        dinitial[rows] = d
    return dx, ddt, dA, dB, dC, dD, dz, dinitial


def _pieces(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, int, int]]:
    """List rows of the state, begin and end: the whole batch at once, or one entry a packed sequence."""
    if cu_seqlens is None:
        return [(slice(None), 0, x.shape[1])]
    found = spans(cu_seqlens, x.shape[0], x.shape[1])
    return [(slice(i, i + 1), begin, end) for i, (_, begin, end) in enumerate(found)]


def _chunk(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, bounds: Bounds, reverse: bool, dtype: torch.dtype
) -> _Chunk:
    return _Chunk(*(_cut(t, bounds, reverse, dtype) for t in (x, dt, B, C)))


def _cut(x: Tensor, bounds: Bounds, reverse: bool, dtype: torch.dtype) -> Tensor:
    """Take a chunk of ``(B, T, ·)`` as ``(C, b, ·)``, in the order of the walk."""
    piece = x[:, bounds[0] : bounds[1]].transpose(0, 1).to(dtype)
    return piece.flip(0) if reverse else piece.contiguous()


def _put(to: Tensor, piece: Tensor, bounds: Bounds, reverse: bool) -> None:
    """Write a chunk ``(C, b, ·)`` back to its place in ``(B, T, ·)``."""
    to[:, bounds[0] : bounds[1]] = (piece.flip(0) if reverse else piece).transpose(0, 1)


def _read(states: Tensor, by: Tensor) -> Tensor:
    """Sum the states ``(C, b, D, N)`` weighted by ``(C, b, N)``."""
    return torch.einsum("cbdn,cbn->cbd", states, by)


def _gate(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``silu(z)`` and its derivative."""
    s = z.sigmoid()
    gate = z * s
    return gate, s + gate * (1 - s)


def _states_back(read: Tensor, decay: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states of a chunk, and of the state before it.

    Args:
        read: ``(C, b, D, N)``, what each state receives from its output; it is overwritten.
        decay: ``(C, b, D, N)``.
        d: ``(b, D, N)``, what the last state receives from behind.
    """
    rows = read.unbind(0)
    rows[-1].add_(d)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(decay[t + 1], rows[t + 1])
    return read, decay[0] * rows[0]
