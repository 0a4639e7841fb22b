"""What is particular to the generalised delta rule; all that the operations share is in
`test_every_operation`.
"""

from typing import Any

import pytest
import torch
from cases.dplr import make
from torch import Tensor

from mainstem import kernels

# Calls by keyword dictionaries, some of them wrong on purpose, say nothing to a type checker.
generalized_delta_rule: Any = kernels.generalized_delta_rule
step: Any = kernels.generalized_delta_rule_step
delta_rule: Any = kernels.delta_rule
linear_recurrence: Any = kernels.linear_recurrence


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_delta_rule_is_a_special_case(decay: str, backend: str) -> None:
    x = make(2, 40, None, decay)
    q, v, g, state = x["q"], x["v"], x.get("decay"), x["initial_state"]
    k, beta = x["a"], 2 * torch.rand(x["q"].shape[:3], dtype=torch.float64)
    keep = 1.0 if g is None else (g if decay == "channel" else g[..., None]).exp()
    written = beta[..., None] * k
    how = {"initial_state": state, "return_final_state": True, "backend": backend}
    got = generalized_delta_rule(q, written, v, keep * k, -written, g, **how)
    for a, b in zip(got, delta_rule(q, k, v, beta, g, **how)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("nothing", ["a", "b"])
def test_without_a_or_b_it_is_the_linear_recurrence(nothing: str, backend: str) -> None:
    x = make(2, 40, None)
    x[nothing].zero_()
    plain = {name: y for name, y in x.items() if name not in ("a", "b")}
    how = {"return_final_state": True, "backend": backend}
    for a, b in zip(generalized_delta_rule(**x, **how), linear_recurrence(**plain, **how)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_state_is_the_product_of_the_transitions(backend: str) -> None:
    x = make(1, 12, None)
    x["k"].zero_()
    A = x["decay"].exp().diag_embed() + x["b"][..., :, None] * x["a"][..., None, :]
    product = torch.eye(9, dtype=torch.float64)
    for A_t in A.unbind(1):
        product = A_t @ product
    _, state = generalized_delta_rule(**x, return_final_state=True, backend=backend)
    torch.testing.assert_close(state, product @ x["initial_state"])


def token(**change: Tensor) -> dict[str, Tensor]:
    x = {name: y[:, 0] for name, y in make(2, 1, None).items() if name != "initial_state"}
    return {**x, "state": torch.zeros(2, 2, 9, 20), **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 5, 2, 8)},
            r"q and k must have one shape .*got q \(2, 5, 2, 9\) and k \(2, 5, 2, 8\)",
        ),
        ({"v": torch.zeros(2, 4, 2, 8)}, r"v must be \(B, T, H, V\)"),
        ({"a": torch.zeros(2, 5, 2, 8)}, r"a and b must be \(B, T, H, K\) .*got a \(2, 5, 2, 8\) and b"),
        ({"b": torch.zeros(2, 5, 2)}, r"a and b must be \(B, T, H, K\) .*and b \(2, 5, 2\)"),
        ({"b": torch.zeros(2, 5, 2, 9, dtype=torch.int64)}, "b must be floating point"),
        ({"decay": torch.zeros(2)}, r"decay must be \(B, T, H\) or"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generalized_delta_rule(**{**make(2, 5, None), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 1, 9)}, r"a and b must be \(B, H, K\)"),
        ({"q": torch.zeros(2, 2, 8)}, r"one token needs q and k \(B, H, K\)"),
        ({"state": torch.zeros(2, 2, 9, 8)}, "state must be"),
    ],
)
def test_errors_of_a_step(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(**token(**change))
