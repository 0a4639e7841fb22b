"""Sequences in chunks of equally many tokens, for recurrences whose matrices do not change with time.

Within a chunk such a recurrence is a convolution, and from chunk to chunk only its state passes. All shapes
follow from those of the tokens, never from the values of ``cu_seqlens``, so that graphs compile and export.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packed import lengths_of


class Chunks(NamedTuple):
    """Where the tokens of N chunks of S sequences lie.

    Attributes:
        size: C, tokens a chunk.
        batch: B where every row of the batch is a sequence, and 1 where they are packed.
        token: ``(N, C)``, the token at each place; B·T for none.
        slot: ``(B·T,)``, the place among N · C of each token.
        bounds: ``(S+2,)``, the chunks of each sequence, then those that are not used; ``None`` where each row
            has as many.
        place: ``(N,)``, how many chunks of its sequence lie before a chunk.
        sequence: ``(N,)``, which it is; S for a chunk that is not used.
        last: ``(S,)``, the last chunk of each sequence, −1 for an empty one.
        rest: ``(S,)``, tokens in that chunk.
        end: ``(S, C)``, the tokens in that chunk as they end at place C−1; B·T for none.
    """

    size: int
    batch: int
    token: Tensor
    slot: Tensor
    bounds: Tensor | None
    place: Tensor
    sequence: Tensor
    last: Tensor
    rest: Tensor
    end: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor | None, reverse: bool, x: Tensor, size: int) -> "Chunks":
        """Cut ``x (B, T, …)`` into chunks of ``size`` tokens; in reverse the last token comes first."""
        B, T = x.shape[:2]
        device, total = x.device, B * T
        if cu_seqlens is None:
            begin = torch.arange(B, device=device) * T
            n = torch.full_like(begin, T)
            chunks = B * ((T + size - 1) // size)
        else:
            begin, n = cu_seqlens[:-1].long(), lengths_of(cu_seqlens).long()
            # However the tokens are divided, they never need more.
            chunks = (T // size) + begin.shape[0]
        count = (n + size - 1) // size
        ends = count.cumsum(0)
        rest = n - (count - 1) * size
        # One sequence more, empty, for the chunks that are not used.
        begin, n, first = (F.pad(t, (0, 1)) for t in (begin, n, ends - count))

        def token(position: Tensor, of: Tensor) -> Tensor:
            start, length = begin[of, None], n[of, None]
            at = start + (length - 1 - position if reverse else position)
            return torch.where((position >= 0) & (position < length), at, total)

        index, offsets = torch.arange(chunks, device=device), torch.arange(size, device=device)
        sequence = torch.searchsorted(ends, index, right=True)
        place = index - first[sequence]
        flat = torch.arange(total, device=device)
        of = torch.searchsorted((begin + n)[:-1], flat, right=True)
        p = flat - begin[of]
        p = n[of] - 1 - p if reverse else p
        late = offsets - (size - rest[:, None])  # below 0: before the last chunk
        late = torch.where(late >= 0, (count - 1)[:, None] * size + late, -1)
        bounds = None
        if cu_seqlens is not None:
            bounds = torch.cat([F.pad(ends, (1, 0)), ends.new_full((1,), chunks)]).int()
        return Chunks(
            size=size,
            batch=B,
            token=token(place[:, None] * size + offsets, sequence),
            slot=first[of] * size + p,
            bounds=bounds,
            place=place,
            sequence=sequence,
            last=torch.where(count > 0, ends - 1, -1),
            rest=torch.where(count > 0, rest, 0),
            end=token(late, torch.arange(count.shape[0], device=device)),
        )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of ``x (B, T, D)`` by chunk ``(N, C, D)``, and those of `end` ``(S, C, D)``."""
        rows = F.pad(x.flatten(0, 1), (0, 0, 0, 1))
        return rows[self.token], rows[self.end]

    def join(self, y: Tensor, like: Tensor) -> Tensor:
        """Undo the first part of `split`."""
        return y.flatten(0, 1)[self.slot].view(like.shape)

    def before(self, states: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Shift states after each chunk ``(N, …)`` to what enters each, and what enters the last ``(S, …)``.

        ``initial (S, …)`` enters the first chunk of each sequence, and where there is none it is the last.
        """
        entering = F.pad(initial, [0, 0] * (initial.ndim - 1) + [0, 1])[self.sequence]
        first = (self.place == 0).view(-1, *[1] * (states.ndim - 1))
        entered = torch.where(first, entering, states.roll(1, 0))
        empty = (self.last < 0).view(-1, *[1] * (states.ndim - 1))
        # A row of zeros in front, for a batch without any chunk.
        rows = F.pad(entered, [0, 0] * (entered.ndim - 1) + [1, 0])
        return entered, torch.where(empty, initial, rows[self.last + 1])
