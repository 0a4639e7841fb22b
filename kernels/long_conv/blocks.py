"""Overlapping windows: how sequences of any lengths become equal blocks that are convolved by themselves.

Each sequence is cut into blocks of M outputs, and the window of a block is the M inputs at its outputs and
the ``front`` inputs before them. The inputs lie as rows in memory, those of a sequence's initial state in
front of its tokens; what lies outside a sequence is read from one more row, of zeros.

Only gathers are used, in both directions, so that results do not depend on the order of threads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..sequences import spans


class Blocks(NamedTuple):
    """Indices of rows, on the device of the tensors.

    Attributes:
        size: M.
        front: inputs of a window before its outputs.
        inputs: ``(N, front + M)``, rows of the inputs in the window of each block.
        outputs: ``(N, M)``, tokens of each block.
        slot: ``(B·T,)``, which of the N · M outputs is a token's.
        seen: ``(K, rows)``, which of the N · (front + M) places show a row; one beyond them for none.
        tail_rows: rows that end as part of the final state.
        tail: which of the S · (L-1) entries of the final state each of them is.
        state: ``(S, L-1)``, rows of the final state.
    """

    size: int
    front: int
    inputs: Tensor
    outputs: Tensor
    slot: Tensor
    seen: Tensor
    tail_rows: Tensor
    tail: Tensor
    state: Tensor


def longest_sequence(cu_seqlens: Tensor | None, batch: int, length: int) -> int:
    """Length of the longest sequence, after checking ``cu_seqlens``."""
    return max((end - begin for _, begin, end in spans(cu_seqlens, batch, length)), default=0)


def plan(
    cu_seqlens: Tensor | None,
    batch: int,
    length: int,
    taps: int,
    stateful: bool,
    size: int,
    front: int,
    device: torch.device,
) -> Blocks:
    """Cut the sequences of ``(batch, length, …)`` into blocks.

    Args:
        cu_seqlens: bounds of packed sequences.
        batch: B.
        length: T.
        taps: L.
        stateful: whether L-1 rows of initial state lie in front of each sequence.
        size: M.
        front: inputs of a window before its outputs.
        device: of the indices.
    """
    found = torch.tensor(spans(cu_seqlens, batch, length), dtype=torch.int64).reshape(-1, 3)
    row, begin, end = found.unbind(1)
    n, tokens = end - begin, row * length + begin
    count = len(n)
    before = taps - 1 if stateful else 0
    origin = tokens + (torch.arange(count) + 1) * before  # row of each sequence's first token
    rows, total = batch * length + count * before, batch * length
    blocks = (n + size - 1) // size
    first = blocks.cumsum(0) - blocks
    owner = torch.arange(count).repeat_interleave(blocks)
    start = (torch.arange(len(owner)) - first[owner]) * size

    place = start[:, None] + torch.arange(-front, size)
    inside = (place >= -before) & (place < n[owner, None])
    inputs = torch.where(inside, origin[owner, None] + place, rows)
    place = place[:, front:]
    outputs = torch.where(place < n[owner, None], tokens[owner, None] + place, total)

    p = torch.arange(total) - tokens.repeat_interleave(n)
    slot = first.repeat_interleave(n) * size + p

    # A row is in the body of one block, and in the front of those that follow within `front` tokens.
    span, places = size + front, len(owner) * (size + front)
    owner = torch.arange(count).repeat_interleave(n + before)
    p = torch.arange(rows) - origin[owner]
    block = p // size + torch.arange(1 + -(-front // size))[:, None]
    seen = (block >= 0) & (block < blocks[owner]) & (block * size <= p + front)
    seen = torch.where(seen, (first[owner] + block) * span + p + front - block * size, places)

    state = n[:, None] - (taps - 1) + torch.arange(taps - 1)
    age = p - n[owner] + taps - 1
    tail_rows = torch.nonzero(age >= 0)[:, 0]
    tail = (owner * (taps - 1) + age)[tail_rows]
    state = torch.where(state >= -before, origin[:, None] + state, rows)
    indices = (inputs, outputs, slot, seen, tail_rows, tail, state)
    return Blocks(size, front, *(x.to(device) for x in indices))
