from functools import partial

import torch
from operation_case import Case, Inputs

GATES_AND_STATES = {"lstm": (4, 2), "gru": (3, 1), "slstm": (4, 4), "slstm_exp": (4, 4), "elman": (1, 1)}


def make(B: int, T: int, sequences: int | None, cell: str, H: int = 2, D: int = 3) -> Inputs:
    gates, states = GATES_AND_STATES[cell]
    shapes = {
        "x": (B, T, gates, H, D),
        "R": (gates, H, D, D),
        "b": (gates, H, D),
        "initial_state": (B if sequences is None else sequences, states, H, D),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    if states == 4:  # n is a sum of exponentials
        inputs["initial_state"][:, 2] = inputs["initial_state"][:, 2].abs() + 0.5
    if cell == "slstm_exp":  # a logarithm of a decay: m does not grow without bound
        inputs["b"][1] -= 3
    return inputs


def size(cell: str, D: int) -> Inputs:
    inputs = make(2, 9, None, cell, D=D)
    return inputs | {"R": inputs["R"] / D**0.5}


def scaled(cell: str, factor: float) -> Inputs:
    inputs = make(2, 20, None, cell)
    return inputs | {"x": factor * inputs["x"]}


def empty_state(cell: str) -> Inputs:
    """Nothing written yet, and inputs so low that they would vanish beside an m of 0."""
    inputs = make(2, 20, None, cell)
    inputs["x"][:, :10, 0] -= 200
    return inputs | {"initial_state": 0 * inputs["initial_state"]}


CASES = [
    Case(
        name=f"gated_rnn-{cell}",
        operation="gated_rnn",
        folder="rnn",
        make=partial(make, cell=cell),
        keywords={"cell": cell},
        timed=("x",),
        step="gated_rnn_step",
        sizes={f"D{D}": partial(size, cell, D) for D in (1, 16, 60, 96, 128, 256)},
        hostile={
            "zeros": partial(scaled, cell, 0.0),
            "1e4": partial(scaled, cell, 1e4),
            "empty state": partial(empty_state, cell),
        },
    )
    for cell in GATES_AND_STATES
]
