from functools import partial
from typing import Any

import torch
from operation_case import Case, Inputs


def make(B: int, T: int, sequences: int | None, width: int = 4, D: int = 5, bias: bool = True) -> Inputs:
    shapes: dict[str, Any] = {
        "x": (B, T, D),
        "weight": (D, width),
        "bias": (D,),
        "initial_state": (B if sequences is None else sequences, D, width - 1),
    }
    if not bias:
        del shapes["bias"]
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def scaled(size: float) -> Inputs:
    inputs = make(1, 70, None)
    return inputs | {"x": size * inputs["x"]}


CASES = [
    Case(
        name=f"short_convolution-width{width}{'-silu' * bool(activation)}{'-no_bias' * (not bias)}",
        operation="short_convolution",
        folder="conv",
        make=partial(make, width=width, bias=bias),
        keywords={"activation": activation},
        timed=("x",),
        step="short_convolution_step",
        sizes={f"D{D}": partial(make, 2, 9, None, width, D) for D in (1, 16, 60, 96, 130)}
        if width == 4
        else {},
        hostile={"zeros": partial(scaled, 0.0), "1e4": partial(scaled, 1e4)} if width == 4 else {},
    )
    for width, activation, bias in ((4, "silu", True), (2, None, False), (8, None, True), (1, "silu", False))
]
