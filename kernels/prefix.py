"""Lay the state of every sequence in front of its tokens, so that a scan needs no special first token.

A batch ``(B, T, …)`` becomes ``(B, n+T, …)``, and packed sequences ``(1, T, …)`` become ``(1, S·n+T, …)``; no
sequence is empty afterwards, and its final state is its last ``n`` rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import check_cu_seqlens


class Prefix(NamedTuple):
    """Where the ``n`` rows in front of each sequence, its tokens and its last ``n`` rows lie."""

    n: int
    length: int
    front: Tensor | None
    body: Tensor | None
    tail: Tensor | None
    sequence: Tensor | None

    @staticmethod
    def of(cu_seqlens: Tensor | None, batch: int, length: int, n: int, device: torch.device) -> "Prefix":
        """Plan ``n`` rows in front of each sequence of a tensor ``(batch, length, …)``."""
        if cu_seqlens is None:
            return Prefix(n, length + n, None, None, None, None)
        bounds = torch.tensor(check_cu_seqlens(cu_seqlens, batch, length), device=device)
        lengths = bounds.diff()
        index = torch.arange(lengths.numel(), device=device)
        rows = torch.arange(n, device=device)
        sequence = index.repeat_interleave(lengths + n)
        body = torch.arange(length, device=device) + (index.repeat_interleave(lengths) + 1) * n
        front = (bounds[:-1] + index * n)[:, None] + rows
        tail = (bounds[1:] + index * n)[:, None] + rows
        return Prefix(n, length + n * lengths.numel(), front, body, tail, sequence)

    def join(self, front: Tensor, body: Tensor) -> Tensor:
        """Lay ``front (S, n, …)`` before the sequences of ``body``, in the type of ``front``."""
        if self.front is None or self.body is None:
            return torch.cat((front, body.to(front.dtype)), 1)
        x = front.new_empty((self.length, *body.shape[2:]))
        x[self.front] = front
        x[self.body] = body[0].to(front.dtype)
        return x[None]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``(front, body)`` apart again."""
        if self.front is None or self.body is None:
            return x[:, : self.n], x[:, self.n :]
        return x[0, self.front], x[:, self.body]

    def tails(self, x: Tensor) -> Tensor:
        """Return the last ``n`` rows of each sequence."""
        return x[:, self.length - self.n :].clone() if self.tail is None else x[0, self.tail]

    def add_to_tails(self, x: Tensor, value: Tensor) -> None:
        """Add ``value (S, n, …)`` in place to the last ``n`` rows of each sequence."""
        if self.tail is None:
            x[:, self.length - self.n :] += value
        else:
            x[0, self.tail] += value

    def first(self) -> Tensor | None:
        """Say which rows begin a sequence, ``(length,)``; ``None`` where only row 0 does."""
        return None if self.front is None else self._mark(self.front[:, 0])

    def last(self) -> Tensor | None:
        """Say which rows end a sequence, ``(length,)``; ``None`` where only the last row does."""
        return None if self.tail is None else self._mark(self.tail[:, -1])

    def _mark(self, rows: Tensor) -> Tensor:
        mark = torch.zeros(self.length, dtype=torch.bool, device=rows.device)
        mark[rows] = True
        return mark


def flip_sequences(
    cu_seqlens: Tensor | None, states: list[Tensor], inputs: list[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Turn time round: a scan from last to first over ``inputs`` is one from first to last over these.

    Packed sequences also come in the opposite order, and so do their states; doing it twice undoes it.
    """
    flipped = [x.flip(1) for x in inputs]
    if cu_seqlens is None:
        return None, states, flipped
    return cu_seqlens[-1] - cu_seqlens.flip(0), [x.flip(0) for x in states], flipped


def owned(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and alone in its memory, as what a custom operator returns must be."""
    alone = x.numel() > 0 and x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)
