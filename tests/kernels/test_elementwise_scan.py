from typing import Any

import pytest
import torch
from operation_case import backends
from torch import Tensor

from mainstem.kernels import elementwise_scan

D = 5
BACKENDS = backends("scan")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1000, 4096])
def test_coefficients_that_break_products_and_logarithms(backend: str, length: int) -> None:
    if backend == "triton":
        length = 132  # the interpreter takes its time
    b = torch.randn(1, length, 6)
    b[..., 3] = b[..., 5] = 0
    a = torch.stack(
        [
            torch.zeros(length),
            torch.full((length,), -1.0),
            torch.full((length,), 1e-38),
            torch.tensor([1e30, -1e30, 0.0, 0.5]).repeat(length // 4),
            torch.tensor([2.0, 0.5]).repeat(length // 2),
            torch.full((length,), 2.0),
        ],
        -1,
    )[None]
    got = elementwise_scan(a, b, backend=backend)
    wanted = elementwise_scan(a.double(), b.double(), backend="reference")
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    keep = wanted.abs() < 1e38
    assert got[keep].isfinite().all()
    torch.testing.assert_close(got[keep].double(), wanted[keep], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_from_its_token_to_the_end_of_its_sequence(backend: str) -> None:
    a, b = torch.rand(1, 90, D), torch.randn(1, 90, D)
    b[:, 35] = torch.nan
    h = elementwise_scan(a, b, cu_seqlens=torch.tensor([0, 30, 60, 90]), backend=backend)
    assert isinstance(h, Tensor)
    assert h.isnan().any(-1)[0].nonzero().flatten().tolist() == list(range(35, 60))


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_a_hundred_thousand_tokens(backend: str) -> None:
    a, b = torch.full((1, 100_000, 2), 0.999), torch.ones(1, 100_000, 2)
    h = elementwise_scan(a, b, backend=backend)
    assert isinstance(h, Tensor)
    exact = (1 - 0.999 ** torch.arange(1, 100_001, dtype=torch.float64)) / (1 - 0.999)
    torch.testing.assert_close(h[0, :, 0].double(), exact, rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(1, 4, D + 1)}, "a and b must have one shape"),
        ({"a": torch.zeros(1, 4, D, dtype=torch.complex64)}, "both be complex"),
        ({"initial_state": torch.zeros(2, D)}, "initial_state must be"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"a": torch.zeros(1, 4, D), "b": torch.zeros(1, 4, D), **change}
    with pytest.raises(ValueError, match=message):
        elementwise_scan(**arguments)
