from functools import partial

import torch
from operation_case import Case, Inputs


def make(
    B: int, T: int, sequences: int | None, taps: int = 7, D: int = 5, skip: bool = True, size: float = 1.0
) -> Inputs:
    shapes = {
        "x": (B, T, D),
        "kernel": (D, taps),
        "skip": (D,),
        "initial_state": (B if sequences is None else sequences, D, taps - 1),
    }
    if not skip:
        del shapes["skip"]
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return inputs | {"x": size * inputs["x"], "kernel": inputs["kernel"] / taps**0.5}


# A filter of 7 taps is a matrix, one of 200 goes through a Fourier transform but for a few tokens.
CASES = [
    Case(
        name=f"long_convolution-{taps}{'-no_skip' * (not skip)}",
        operation="long_convolution",
        folder="long_conv",
        make=partial(make, taps=taps, skip=skip),
        timed=("x",),
        step="long_convolution_step",
        sizes={f"D{D}": partial(make, 2, 9, None, taps, D) for D in (1, 16, 60, 96, 130)} if skip else {},
        hostile={
            "zeros": partial(make, 1, 70, None, taps, size=0.0),
            "1e4": partial(make, 1, 70, None, taps, size=1e4),
            "long": partial(make, 1, 5000, None, taps),
        },
    )
    for taps, skip in ((1, True), (7, False), (200, True))
]
