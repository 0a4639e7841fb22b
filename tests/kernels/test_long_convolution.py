from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from mainstem.kernels import elementwise_scan, long_convolution

D = 5


def values(*args: Any, **keywords: Any) -> Tensor:
    result = long_convolution(*args, **keywords)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("taps", [1, 30, 129, 130, 500])
def test_is_the_convolution_of_pytorch(taps: int) -> None:
    x, kernel = torch.randn(2, 900, D).double(), torch.randn(D, taps).double()
    wanted = conv1d(pad(x.mT, (taps - 1, 0)), kernel.flip(1)[:, None], groups=D).mT
    torch.testing.assert_close(values(x, kernel), wanted)
    torch.testing.assert_close(values(x.flip(1), kernel, reverse=True).flip(1), wanted)


def test_an_exponential_filter_is_a_scan() -> None:
    x, a = torch.randn(1, 30_000, D).double(), torch.rand(D).double()
    kernel = a[:, None] ** torch.arange(2000)
    torch.testing.assert_close(values(x, kernel), elementwise_scan(a.expand_as(x), x))


@pytest.mark.parametrize("taps", [20, 300])
def test_what_is_not_finite_stays_in_its_sequence(taps: int) -> None:
    x, kernel = torch.randn(1, 900, D), torch.randn(D, taps)
    x[:, 400] = torch.nan
    y = values(x, kernel, cu_seqlens=torch.tensor([0, 300, 600, 900]))
    assert y[:, :300].isfinite().all()
    assert y[:, 600:].isfinite().all()
    assert y[:, 400:].isnan().any()


def test_few_taps_never_see_the_future_not_even_by_a_bit() -> None:
    x, kernel = torch.randn(1, 1000, D), torch.randn(D, 128)
    other = torch.cat([x[:, :600], 100 * torch.randn(1, 400, D)], 1)
    assert torch.equal(values(x, kernel)[:, :600], values(other, kernel)[:, :600])


def test_a_million_tokens_in_memory_that_does_not_grow_with_the_filter() -> None:
    x, kernel = torch.randn(1, 1_000_000, 1), torch.randn(1, 1024) / 32
    y = values(x, kernel)
    part = values(x[:, -3000:].double(), kernel.double())
    torch.testing.assert_close(y[:, -1000:].double(), part[:, -1000:], rtol=1e-4, atol=1e-4)


def test_a_state_that_nobody_asks_for_is_not_made() -> None:
    x, kernel = torch.randn(1, 4, D), torch.randn(D, 3)
    y, state = torch.ops.mainstem.long_convolution(x, kernel, None, None, None, False, False, "chunked")
    assert y.shape == x.shape
    assert state.numel() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, D)}, "x must be"),
        ({"kernel": torch.zeros(D + 1, 3)}, "kernel must be"),
        ({"kernel": torch.zeros(D, 0)}, "kernel must be"),
        ({"skip": torch.zeros(D, 1)}, "skip must be"),
        ({"initial_state": torch.zeros(1, D, 3)}, "initial_state must be"),
        ({"backend": "triton"}, "long_conv has no triton backend"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 4, D), "kernel": torch.zeros(D, 3), **change}
    with pytest.raises(ValueError, match=message):
        long_convolution(**arguments)
