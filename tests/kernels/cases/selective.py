"""The selective scan, bare and with its skip and gate."""

from functools import partial
from typing import Any

import torch
from operation_case import Case, Inputs
from torch.nn.functional import softplus


def make(
    B: int, T: int, sequences: int | None, full: bool = True, D: int = 5, N: int = 2, size: float = 1.0
) -> Inputs:
    states = B if sequences is None else sequences
    double: Any = {"dtype": torch.float64}
    inputs = {
        "x": size * torch.randn(B, T, D, **double),
        "dt": softplus(torch.randn(B, T, D, **double) - 2),
        "A": -torch.arange(1.0, N + 1, **double) * torch.rand(D, N, **double),
        "B": torch.randn(B, T, N, **double),
        "C": torch.randn(B, T, N, **double),
        "initial_state": torch.randn(states, D, N, **double),
    }
    if full:
        inputs |= {"D": torch.randn(D, **double), "z": torch.randn(B, T, D, **double)}
    return inputs


def constant(rate: float) -> Inputs:
    """Decay by ``exp(rate)`` at every step."""
    inputs = make(1, 70, None, D=3)
    inputs["dt"].fill_(1.0)
    inputs["A"].fill_(rate)
    return inputs


def mixed() -> Inputs:
    """States that forget all, nothing, and by e^-20, and steps of zero."""
    inputs = make(2, 70, None, D=4)
    inputs["A"][0], inputs["A"][1, ::2] = 0.0, -20.0
    inputs["A"][2, 1], inputs["A"][3] = -torch.inf, -torch.inf
    inputs["dt"][:, 5::7, :2] = 0.0
    inputs["dt"][:, 6::9] = 1.0
    return inputs


def growing() -> Inputs:
    """Steps below zero, and states that grow."""
    inputs = make(1, 40, None, D=4)
    inputs["A"][1:] *= -1
    inputs["dt"] = 0.05 * torch.randn_like(inputs["dt"])
    return inputs


def zeros() -> Inputs:
    return {name: x if name == "A" else 0 * x for name, x in make(1, 70, None, D=3).items()}


CASES = [
    Case(
        name="selective_scan",
        operation="selective_scan",
        folder="selective",
        make=make,
        timed=("x", "dt", "B", "C", "z"),
        step="selective_scan_step",
        sizes={
            f"D{D}-N{N}": partial(make, 1, T, None, D=D, N=N)
            for D, N, T in ((1, 1, 13), (2, 16, 9), (37, 3, 13))
        },
        hostile={
            "decay 0": partial(constant, 0.0),
            "decay -20": partial(constant, -20.0),
            "decay -inf": partial(constant, -torch.inf),
            "strong decay -15": partial(constant, -15.0),
            "mixed decays": mixed,
            "growing": growing,
            "zeros": zeros,
            "1e4": partial(make, 1, 70, None, D=3, size=1e4),
        },
        long=lambda T: make(1, T, None, D=2, N=2),
    ),
    Case(
        name="selective_scan-bare",
        operation="selective_scan",
        folder="selective",
        make=partial(make, full=False),
        timed=("x", "dt", "B", "C"),
    ),
]
