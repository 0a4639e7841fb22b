from functools import partial

import torch
from operation_case import Case, Inputs
from torch.nn.functional import normalize

from cases import linear


def make(B: int, T: int, sequences: int | None, decay: str = "channel", R: int = 3) -> Inputs:
    inputs = linear.make(B, T, sequences, decay)
    H, K, V = inputs["initial_state"].shape[1:]
    k, v = (torch.randn((B, T, R, H, size), dtype=torch.float64) for size in (K, V))
    beta = 2 * torch.rand((B, T, R, H), dtype=torch.float64)
    return inputs | {"k": normalize(k, dim=-1), "v": v, "beta": beta}


CASES = [
    Case(
        name=f"delta_product-{decay}-{R}",
        operation="delta_product",
        folder="delta",
        make=partial(make, decay=decay, R=R),
        timed=("q", "k", "v", "beta", *(("decay",) if decay != "none" else ())),
        step="delta_product_step",
    )
    for decay, R in (("none", 2), ("token", 1), ("channel", 3))
]
