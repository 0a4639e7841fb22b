from functools import partial

import torch
from operation_case import Case, Inputs
from torch.nn.functional import normalize

from cases import linear

LENGTH = 45
"""Of hostile inputs: some chunks of 16 and 32, and no more, for the sake of Triton's interpreter."""


def make(
    B: int, T: int, sequences: int | None, decay: str = "channel", H: int = 2, K: int = 9, V: int = 20
) -> Inputs:
    """A direction of length one is erased at a rate a channel, as in RWKV-7: stable whatever the decay."""
    inputs = linear.make(B, T, sequences, decay, H, K, V)
    a = normalize(torch.randn((B, T, H, K), dtype=torch.float64), dim=-1)
    return inputs | {"a": a, "b": -a * torch.rand((B, T, H, K), dtype=torch.float64)}


def constant(decay: str, rate: float) -> Inputs:
    inputs = make(1, LENGTH, None, decay)
    inputs["decay"].fill_(rate)
    return inputs


def mixed(decay: str) -> Inputs:
    inputs = make(1, LENGTH, None, decay)
    return inputs | {"decay": linear.mixed(decay)["decay"][:1, :LENGTH]}


def identical_keys(decay: str, beta: float) -> Inputs:
    """The delta rule with one key throughout."""
    inputs = make(1, 70, None, decay)
    k = inputs["a"][:, :1].expand(inputs["a"].shape).clone()
    a = k.clone()
    if decay != "none":
        a *= (inputs["decay"] if decay == "channel" else inputs["decay"][..., None]).exp()
    return inputs | {"k": beta * k, "a": a, "b": -beta * k}


def scaled(decay: str, names: tuple[str, ...], size: float) -> Inputs:
    inputs = make(1, LENGTH, None, decay)
    return inputs | {name: size * inputs[name] for name in names}


ARGUMENTS = ("q", "k", "v", "a", "b")
CASES = [
    Case(
        name=f"generalized_delta_rule-{decay}",
        operation="generalized_delta_rule",
        folder="dplr",
        make=partial(make, decay=decay),
        timed=(*ARGUMENTS, "decay") if decay != "none" else ARGUMENTS,
        step="generalized_delta_rule_step",
        sizes={f"K{K}-V{V}": partial(make, 1, 37, None, decay, K=K, V=V) for K, V in sizes},
        hostile={
            f"{label}": partial(constant, decay, rate)
            for label, rate in (
                ("decay 0", 0.0),
                ("decay -20", -20.0),
                ("decay -inf", -torch.inf),
                ("strong decay -15", -15.0),
            )
            if decay != "none"
        }
        | ({} if decay == "none" else {"mixed decays": partial(mixed, decay)})
        | {f"identical keys beta {beta:g}": partial(identical_keys, decay, beta) for beta in (0.0, 1.0, 2.0)}
        | {f"{name} 0": partial(scaled, decay, (name,), 0.0) for name in ARGUMENTS}
        | {"1e4": partial(scaled, decay, ("v", "initial_state"), 1e4)},
        long=partial(make, 1, sequences=None, decay=decay, H=1, K=4, V=4) if decay == "token" else None,
    )
    for decay, sizes in {"none": (), "token": linear.SIZES[2:4], "channel": linear.SIZES}.items()
]
