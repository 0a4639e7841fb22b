from functools import partial
from typing import Any

import torch
from operation_case import Case, Inputs
from torch import Tensor

H, V = 2, 3


def elementwise(
    B: int, T: int, sequences: int | None, dtype: torch.dtype = torch.float64, D: int = 5
) -> Inputs:
    a = torch.randn(B, T, D, dtype=dtype)
    a = a / a.abs().clamp(min=1)
    if T > 20:
        a[:, ::7] = 0
        a[:, ::11] *= 1e-30
        a[:, 5:9] *= 3
    inputs = {"a": a, "b": torch.randn(B, T, D, dtype=dtype)}
    inputs["initial_state"] = torch.randn(B if sequences is None else sequences, D, dtype=dtype)
    return inputs


def constant(a: float, b: float = 1.0) -> Inputs:
    inputs = elementwise(1, 70, None)
    return {"a": torch.full_like(inputs["a"], a), "b": b * inputs["b"]}


def alternating() -> Inputs:
    inputs = elementwise(1, 132, None)
    del inputs["initial_state"]
    inputs["b"][..., 1] = 0
    inputs["a"][..., :2] = torch.tensor([2.0, 0.5]).repeat(66)[:, None]
    inputs["a"][..., 2] = torch.tensor([1e9, -1e9, 0.0, 0.5]).repeat(33)
    return inputs


def logsumexp(
    B: int, T: int, sequences: int | None, H: int = H, V: int = V, masked: float = -torch.inf
) -> Inputs:
    states = B if sequences is None else sequences
    s = 3 * torch.randn(B, T, H, dtype=torch.float64)
    s[:, ::5, 0] = masked
    w = torch.randn(states, H, V, dtype=torch.float64)
    m, u = torch.randn(states, H, 1, dtype=torch.float64), torch.rand(states, H, 1, dtype=torch.float64)
    v = torch.randn(B, T, H, V, dtype=torch.float64)
    return {"s": s, "v": v, "initial_state": torch.cat((m, 1 + u, w), -1)}


def average(state: Tensor) -> tuple[Tensor, ...]:
    """What does not depend on the level m that a state of `logsumexp_scan` is measured from."""
    m, u, w = state[..., 0], state[..., 1], state[..., 2:]
    seen = u > 0
    u = torch.where(seen, u, 1)
    return torch.where(seen, m + u.log(), -torch.inf), w / u[..., None]


def far(offset: float) -> Inputs:
    inputs = {"s": torch.randn(1, 130, H).round(decimals=1) * 3 + offset, "v": torch.randn(1, 130, H, V)}
    inputs["s"][:, ::3] = -inputs["s"][:, ::3]
    return inputs


def masked(share: Any, names: tuple[str, ...] = ("s", "v")) -> Inputs:
    inputs = logsumexp(1, 70, None)
    inputs["s"][:, share] = -torch.inf
    return {name: inputs[name] for name in names}


def logcumsumexp(B: int, T: int, sequences: int | None) -> Inputs:
    state = torch.randn(B if sequences is None else sequences, H, dtype=torch.float64)
    return {"s": logsumexp(B, T, None)["s"], "initial_state": state}


def max_plus(B: int, T: int, sequences: int | None) -> Inputs:
    inputs = {name: torch.randn(B, T, 5, dtype=torch.float64) for name in ("g", "i")}
    inputs["g"][:, ::9], inputs["i"][:, ::4] = -torch.inf, -torch.inf
    inputs["initial_state"] = torch.randn(B if sequences is None else sequences, 5, dtype=torch.float64)
    return inputs


EVERY = slice(None)

CASES = [
    Case(
        name="elementwise_scan",
        operation="elementwise_scan",
        folder="scan",
        make=elementwise,
        timed=("a", "b"),
        step="elementwise_scan_step",
        sizes={f"D{D}": partial(elementwise, 1, 9, None, D=D) for D in (1, 16, 60, 130)},
        hostile={
            "a 0": partial(constant, 0.0),
            "a -1": partial(constant, -1.0),
            "a 1": partial(constant, 1.0),
            "a tiny": partial(constant, 1e-38),
            "zeros": partial(constant, 0.5, 0.0),
            "1e4": partial(constant, 0.5, 1e4),
            "large and small": alternating,
        },
        long=lambda T: {"a": torch.full((1, T, 2), 0.999), "b": torch.ones(1, T, 2)},
    ),
    Case(
        name="elementwise_scan-complex",
        operation="elementwise_scan",
        folder="scan",
        make=partial(elementwise, dtype=torch.complex128),
        timed=("a", "b"),
        step="elementwise_scan_step",
    ),
    Case(
        name="logsumexp_scan",
        operation="logsumexp_scan",
        folder="scan",
        make=logsumexp,
        timed=("s", "v"),
        step="logsumexp_scan_step",
        readings=average,
        sizes={f"H{h}-V{v}": partial(logsumexp, 1, 9, None, h, v) for h, v in ((1, 1), (3, 60), (1, 128))},
        hostile={
            "far below 0": partial(far, -1e4),
            "far above 0": partial(far, 1e4),
            "nothing seen": partial(masked, EVERY),
            "nothing seen at first": partial(masked, slice(0, 65)),
        },
    ),
    Case(
        name="logcumsumexp",
        operation="logcumsumexp",
        folder="scan",
        make=logcumsumexp,
        timed=("s",),
        hostile={
            "far below 0": lambda: {"s": far(-1e4)["s"]},
            "far above 0": lambda: {"s": far(1e4)["s"]},
            "nothing seen": partial(masked, EVERY, ("s",)),
            "nothing seen at first": partial(masked, slice(0, 65), ("s",)),
        },
    ),
    Case(
        name="max_plus_scan",
        operation="max_plus_scan",
        folder="scan",
        make=max_plus,
        timed=("g", "i"),
        differentiable=False,
    ),
]
