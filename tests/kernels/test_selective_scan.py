from typing import Any

import pytest
import torch
from cases.selective import make
from torch import Tensor

from mainstem import kernels
from mainstem.kernels import elementwise_scan

# Calls by keyword dictionaries, some of them wrong on purpose, say nothing to a type checker.
selective_scan: Any = kernels.selective_scan
selective_scan_step: Any = kernels.selective_scan_step

BACKENDS = ["reference", "chunked", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_state_a_channel_is_an_elementwise_scan(backend: str) -> None:
    inputs = make(2, 150, None, full=False, N=1)
    x, dt, A, B, C, state = inputs.values()
    y = selective_scan(**inputs, backend=backend)
    h = elementwise_scan(torch.exp(dt * A[:, 0]), dt * B * x, initial_state=state[..., 0])
    assert isinstance(h, Tensor)
    torch.testing.assert_close(y, C * h)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize(("channels", "states"), [(3, 60), (17, 96), (2, 255), (96, 256), (1, 33)])
def test_many_states_are_as_exact_as_few(backend: str, channels: int, states: int) -> None:
    inputs = make(2, 67, None, D=channels, N=states)
    single = {name: x.float().requires_grad_() for name, x in inputs.items()}
    double = {name: x.detach().double().requires_grad_() for name, x in single.items()}
    results = []
    for leaves, used in ((single, backend), (double, "reference")):
        y, final = selective_scan(**leaves, return_final_state=True, backend=used)
        total = y.double().square().sum() + final.double().sum()
        results.append([y, final, *torch.autograd.grad(total, list(leaves.values()))])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_and_gate_are_what_they_are_outside(backend: str) -> None:
    inputs = make(1, 70, None)
    D, z = inputs["D"], inputs["z"]
    bare = selective_scan(**{name: x for name, x in inputs.items() if name not in "Dz"}, backend=backend)
    assert isinstance(bare, Tensor)
    y = selective_scan(**inputs, backend=backend)
    torch.testing.assert_close(y, (bare + D * inputs["x"]) * torch.nn.functional.silu(z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_zero_keeps_the_state_and_a_rate_of_minus_infinity_forgets_it(backend: str) -> None:
    inputs = make(1, 3, None, full=False)
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    _, kept = selective_scan(**inputs, return_final_state=True, backend=backend)
    assert torch.equal(kept, inputs["initial_state"])
    inputs["dt"] += 0.1
    inputs["A"] = torch.full_like(inputs["A"], -torch.inf)
    _, final = selective_scan(**inputs, return_final_state=True, backend=backend)
    last = (inputs["dt"] * inputs["x"])[:, -1, :, None] * inputs["B"][:, -1, None]
    torch.testing.assert_close(final, last)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_a_slow_decay_does_not_drift(backend: str) -> None:
    """The sum of 100,000 decays is known in closed form; an error in each of them would add up."""
    T, rate = 100_000, 1e-4
    ones = torch.ones(1, T, 1)
    y = selective_scan(ones, ones, torch.full((1, 1), -rate), ones, ones, backend=backend)
    assert isinstance(y, Tensor)
    decay = torch.tensor(-rate, dtype=torch.float32).double().exp()
    exact = (1 - decay ** torch.arange(1, T + 1, dtype=torch.float64)) / (1 - decay)
    torch.testing.assert_close(y[0, :, 0].double(), exact, rtol=2e-3, atol=0)


def test_mixed_types_keep_the_type_of_x() -> None:
    inputs = make(1, 20, None)
    inputs = {name: x.float() if name in ("dt", "A", "D") else x.bfloat16() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y, state = selective_scan(**leaves, return_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    gradients = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"x must be \(B, T, D\)"),
        ({"dt": torch.zeros(2, 3, 4)}, r"dt must be \(B, T, D\) = \(2, 3, 5\), got \(2, 3, 4\)"),
        ({"A": torch.zeros(4, 3)}, r"A must be \(D, N\) with the D of x \(2, 3, 5\)"),
        ({"A": torch.zeros(5, 0)}, r"A must be \(D, N\)"),
        ({"B": torch.zeros(2, 3, 5)}, r"B must be \(B, T, N\) = \(2, 3, 2\)"),
        ({"C": torch.zeros(2, 4, 3)}, r"C must be"),
        ({"D": torch.zeros(3)}, r"D must be \(D,\) = \(5,\)"),
        ({"z": torch.zeros(2, 3)}, r"z must be"),
        ({"initial_state": torch.zeros(2, 3, 5)}, r"initial_state must be \(sequences, D, N\) = \(2, 5, 2\)"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int64)}, "x must be floating point"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "the batch must be 1"),
        ({"backend": "fast"}, "choose one of"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make(2, 3, None), **change})


def test_errors_of_a_step() -> None:
    x, dt, A, B, C, state = make(2, 1, None, full=False).values()
    token = [x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], None, None]
    with pytest.raises(ValueError, match=r"one token needs x \(B, D\)"):
        selective_scan_step(x, *token[1:], state)
    with pytest.raises(ValueError, match=r"B must be \(B, N\) = \(2, 2\)"):
        selective_scan_step(*token[:3], B, *token[4:], state)
    with pytest.raises(ValueError, match=r"state must be"):
        selective_scan_step(*token, state[:1])
