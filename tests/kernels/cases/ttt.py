"""Test-time training: mini-batches of 5 tokens, some of them begun in the state that comes in.

LayerNorm of two channels is a sign: its gradients are nothing to compare, so head sizes begin at 3.
"""

from functools import partial

import torch
from operation_case import Case, Inputs
from torch import Tensor

MINI_BATCH = 5


def make(B: int, T: int, sequences: int | None, H: int = 2, D: int = 6) -> Inputs:
    states = B if sequences is None else sequences

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    state = 0.3 * normal(states, H, 2 * D + 3, D)
    place = torch.arange(states) % MINI_BATCH
    # Nothing is summed up where no token of the mini-batch was seen.
    state[:, :, D + 1 : -1] *= (place > 0).view(-1, 1, 1, 1)
    state[:, :, -1] = place.double()[:, None, None]
    return {
        "q": normal(B, T, H, D),
        "k": normal(B, T, H, D),
        "v": normal(B, T, H, D),
        "rate": normal(B, T, H).sigmoid() / D,
        "schedule": 1 / torch.arange(1, MINI_BATCH + 1, dtype=torch.float64),
        "gain": 1 + 0.3 * normal(H, D),
        "offset": 0.3 * normal(H, D),
        "initial_state": state,
    }


def like(T: int, **changes: float) -> Inputs:
    inputs = make(1, T, None)
    return inputs | {name: torch.full_like(inputs[name], value) for name, value in changes.items()}


CASES = [
    Case(
        name="ttt_linear",
        operation="ttt_linear",
        folder="ttt",
        make=make,
        timed=("q", "k", "v", "rate"),
        step="ttt_linear_step",
        sizes={f"head size {D}": partial(make, 1, 12, None, 1, D) for D in (3, 16, 60, 64)},
        hostile={
            "zeros": partial(like, 23, q=0.0, k=0.0, v=0.0, rate=0.0),
            "identical keys": partial(like, 23, k=0.5, rate=0.5),
            "values of 1e4": partial(like, 23, v=1e4),
            "one token": partial(make, 1, 1, None),
        },
    )
]
