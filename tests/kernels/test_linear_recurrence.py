from typing import Any

import pytest
import torch
from cases.linear import make

from mainstem import kernels

# Calls by keyword dictionaries, some of them wrong on purpose, say nothing to a type checker.
linear_recurrence: Any = kernels.linear_recurrence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 5, 2, 8)},
            r"q and k must have one shape .*got q \(2, 5, 2, 9\) and k \(2, 5, 2, 8\)",
        ),
        ({"v": torch.zeros(2, 4, 2, 8)}, r"v must be \(B, T, H, V\)"),
        (
            {"q": torch.zeros(5, 2, 9), "k": torch.zeros(5, 2, 9)},
            r"q and k must have one shape \(B, T, H, K\)",
        ),
        ({"v": torch.zeros(2, 5, 2, 8, dtype=torch.int64)}, "v must be floating point"),
        ({"decay": torch.zeros(2, 5, 9)}, r"decay must be \(H,\), \(B, T, H\) or \(B, T, H, K\)"),
        ({"initial_state": torch.zeros(1, 2, 9, 8)}, r"initial_state must be .* = \(2, 2, 9, 20\)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{**make(2, 5, None), **change})
