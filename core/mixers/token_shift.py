"""The token before, as RWKV's mixers look back by one."""

import torch
from torch import Tensor, nn

from ..packed import lengths_of, previous
from .base import Pass, upcast


class TokenShift(nn.Module):
    """Shift tokens by one place within each sequence: ``(B, T, D)`` to ``(B, T, D)``.

    Peng et al. 2023, arXiv:2305.13048; a module without parameters, used like
    `ShortConvolution`. Before the first token come zeros. In reverse the token before is the later one.
    """

    def forward(self, x: Tensor, p: Pass, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the token before each token of ``x`` (B, T, D), and the last token of each sequence.

        Args:
            x: the tokens, packed ``(1, T, D)`` where the pass has ``cu_seqlens``.
            p: the pass.
            state: ``(B|S, D)``, the token before the first one of each sequence; ``None`` is zeros.

        Returns:
            ``(shifted, state)``: like x, and ``(B|S, D)`` in float32 (float64 for float64 x). The state of
            a sequence without tokens is the one it had.
        """
        cu_seqlens = p.cu_seqlens
        if state is None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = upcast(x).new_zeros(sequences, x.shape[2])
        before = state.to(x.dtype)
        if cu_seqlens is None:
            parts = [x, before.unsqueeze(1)] if p.reverse else [before.unsqueeze(1), x]
            joined = torch.cat(parts, 1)
            return (
                (joined[:, 1:], upcast(joined[:, 0]))
                if p.reverse
                else (joined[:, :-1], upcast(joined[:, -1]))
            )
        # States and tokens lie in one table, so that a sequence without tokens finds its own state.
        table = torch.cat([before, x[0]])
        own = torch.arange(before.shape[0], device=x.device)
        bounds = cu_seqlens.long() + before.shape[0]
        last = torch.where(lengths_of(cu_seqlens) > 0, bounds[:-1] if p.reverse else bounds[1:] - 1, own)
        return previous(x, before, cu_seqlens, reverse=p.reverse), upcast(table[last])
