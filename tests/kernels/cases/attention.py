from functools import partial

import torch
from operation_case import Case, Inputs


def make(B: int, T: int, sequences: int | None, H: int = 4, Hk: int = 2, D: int = 8, V: int = 5) -> Inputs:
    shapes = {"q": (B, T, H, D), "k": (B, T, Hk, D), "v": (B, T, Hk, V)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def scaled(name: str, factor: float) -> Inputs:
    inputs = make(1, 60, None)
    return inputs | {name: factor * inputs[name]}


CASES = [
    Case(
        name=f"attention{'-causal' * causal}{f'-window{window}' if window else ''}",
        operation="attention",
        folder="attention",
        make=make,
        keywords={"causal": causal, "window": window},
        timed=("q", "k", "v"),
        sizes={f"D{D}": partial(make, 1, 9, None, D=D, V=D) for D in (1, 16, 60, 96, 128, 256)}
        if causal and not window
        else {},
        hostile={"zero queries": partial(scaled, "q", 0.0), "values of 1e4": partial(scaled, "v", 1e4)},
    )
    for causal in (False, True)
    for window in (None, 7)
]
