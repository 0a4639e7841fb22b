"""The oracle's loop: one sequence after the other, one token after the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sequences import spans

Step = Callable[..., tuple[Tensor, Tensor]]


def token_loop(
    step: Step,
    inputs: Sequence[Tensor],
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    empty: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run ``o_t, state = step(*inputs_t, state)`` over every sequence and return ``(o, final_state)``.

    Args:
        step: advances a batch of sequences by one token.
        inputs: each ``(B, T, …)``.
        state: ``(B, …)``, or ``(S, …)`` with ``cu_seqlens``.
        cu_seqlens: ``(S+1,)`` or ``None``.
        reverse: run from the last token to the first.
        empty: what the output is when there is no token.
    """
    batch, length = inputs[0].shape[:2]
    if cu_seqlens is None:
        pieces = [(slice(None), 0, length)]
    else:
        pieces = [(slice(i, i + 1), b, e) for i, (_, b, e) in enumerate(spans(cu_seqlens, batch, length))]
    outputs: list[Tensor] = []
    finals = [state[:0]]
    for rows, begin, end in pieces:
        current = state[rows]
        tokens = list(zip(*(x[:, begin:end].unbind(1) for x in inputs)))
        done = []
        for token in reversed(tokens) if reverse else tokens:
            o, current = step(*token, current)
            done.append(o)
        outputs += reversed(done) if reverse else done
        finals.append(current)
    return torch.stack(outputs, 1) if outputs else empty, torch.cat(finals)
