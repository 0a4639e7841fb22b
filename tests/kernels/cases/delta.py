from functools import partial

import torch
from operation_case import Case, Inputs
from torch.nn.functional import normalize

from cases import linear


def make(
    B: int, T: int, sequences: int | None, decay: str = "channel", H: int = 2, K: int = 9, V: int = 20
) -> Inputs:
    inputs = linear.make(B, T, sequences, decay, H, K, V)
    # Keys of length one keep the recurrence stable for β up to 2.
    inputs["k"] = normalize(inputs["k"], dim=-1)
    inputs["beta"] = 2 * torch.rand((B, T, H), dtype=torch.float64)
    return inputs


def constant(decay: str, rate: float) -> Inputs:
    inputs = make(1, 70, None, decay, H=1)
    inputs["decay"].fill_(rate)
    return inputs


def mixed(decay: str) -> Inputs:
    inputs = make(2, 70, None, decay)
    return inputs | {"decay": linear.mixed(decay)["decay"]}


def identical_keys(decay: str, beta: float) -> Inputs:
    inputs = make(1, 150, None, decay)
    inputs["k"][:] = inputs["k"][:, :1].clone()
    inputs["beta"].fill_(beta)
    return inputs


def scaled(decay: str, names: tuple[str, ...], size: float) -> Inputs:
    inputs = make(1, 70, None, decay, H=1)
    return inputs | {name: size * inputs[name] for name in names}


CASES = [
    Case(
        name=f"delta_rule-{decay}",
        operation="delta_rule",
        folder="delta",
        make=partial(make, decay=decay),
        timed=("q", "k", "v", "beta", "decay") if decay != "none" else ("q", "k", "v", "beta"),
        step="delta_rule_step",
        keywords={"scale": 0.7} if decay == "token" else {},
        sizes={f"K{K}-V{V}": partial(make, 1, 37, None, decay, H=1, K=K, V=V) for K, V in sizes},
        hostile={label: partial(constant, decay, rate) for label, rate in rates.items()}
        | ({"mixed decays": partial(mixed, decay)} if decay != "none" else {})
        | {f"identical keys beta {beta:g}": partial(identical_keys, decay, beta) for beta in (0.0, 1.0, 2.0)}
        | {f"{name} 0": partial(scaled, decay, (name,), 0.0) for name in ("q", "k", "v")}
        | {"1e4": partial(scaled, decay, ("v", "initial_state"), 1e4)},
        long=partial(make, 1, sequences=None, decay=decay, H=1, K=4, V=4) if decay == "token" else None,
    )
    for decay, sizes, rates in (
        ("none", (), {}),
        ("token", linear.SIZES[2:4], linear.RATES),
        ("channel", linear.SIZES, linear.RATES),
    )
]
