from functools import partial

import torch
from operation_case import Case, Inputs
from torch.nn.functional import logsigmoid

RATES = {"decay 0": 0.0, "decay -20": -20.0, "decay -inf": -torch.inf, "strong decay -15": -15.0}
SIZES = [(1, 1), (16, 64), (60, 33), (64, 64), (96, 20), (128, 16), (256, 9)]


def make(
    B: int, T: int, sequences: int | None, decay: str = "channel", H: int = 2, K: int = 9, V: int = 20
) -> Inputs:
    shapes = {
        "q": (B, T, H, K),
        "k": (B, T, H, K),
        "v": (B, T, H, V),
        "initial_state": (B if sequences is None else sequences, H, K, V),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    shape = {"none": None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[decay]
    if shape is not None:
        inputs["decay"] = logsigmoid(2 + torch.randn(shape, dtype=torch.float64))
    return inputs


def constant(decay: str, rate: float) -> Inputs:
    inputs = make(1, 70, None, decay, H=1)
    inputs["decay"].fill_(rate)
    return inputs


def mixed(decay: str) -> Inputs:
    inputs = make(2, 70, None, decay)
    g = inputs["decay"]
    g[:, 5::7], g[:, 6::9], g[:, 20:23] = -torch.inf, -20.0, 0.0
    g[:, 40::11, 0] = -torch.inf
    return inputs


def scaled(decay: str, size: float) -> Inputs:
    inputs = make(1, 70, None, decay, H=1)
    return inputs | {name: size * inputs[name] for name in ("q", "k", "v")}


CASES = [
    Case(
        name=f"linear_recurrence-{decay}",
        operation="linear_recurrence",
        folder="linear",
        make=partial(make, decay=decay),
        timed=("q", "k", "v", "decay") if decay in ("token", "channel") else ("q", "k", "v"),
        step="linear_recurrence_step",
        keywords={"scale": 0.7} if decay == "token" else {},
        sizes={f"K{K}-V{V}": partial(make, 1, 37, None, decay, H=1, K=K, V=V) for K, V in sizes},
        hostile={label: partial(constant, decay, rate) for label, rate in rates.items()}
        | ({"mixed decays": partial(mixed, decay)} if decay in ("token", "channel") else {})
        | {"zeros": partial(scaled, decay, 0.0), "1e4": partial(scaled, decay, 1e4)},
        long=partial(make, 1, sequences=None, decay=decay, H=1, K=4, V=4) if decay == "token" else None,
    )
    for decay, sizes, rates in (
        ("none", (), {}),
        # One number that is a sum over all tokens cancels: it is not compared on its own scale.
        ("head", (), {label.removeprefix("strong "): rate for label, rate in RATES.items()}),
        ("token", SIZES[2:4], RATES),
        ("channel", SIZES, RATES),
    )
]
