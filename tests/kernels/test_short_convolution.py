from typing import Any

import pytest
import torch
from operation_case import backends
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from mainstem.kernels import short_convolution

BACKENDS = backends("conv")
D = 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_conv1d(backend: str) -> None:
    x, weight, bias = torch.randn(2, 30, D), torch.randn(D, 4), torch.randn(D)
    wanted = silu(conv1d(pad(x.mT, (3, 0)), weight[:, None], bias, groups=D)).mT
    y = short_convolution(x, weight, bias, activation="silu", backend=backend)
    torch.testing.assert_close(y, wanted)
    mirrored = short_convolution(x.flip(1), weight, bias, activation="silu", reverse=True, backend=backend)
    assert isinstance(mirrored, Tensor)
    torch.testing.assert_close(mirrored.flip(1), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_sequence_keeps_part_of_its_initial_state(backend: str) -> None:
    state = torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    x = torch.tensor([[[7.0], [8.0]]])
    _, final = short_convolution(
        x,
        torch.ones(1, 4),
        cu_seqlens=torch.tensor([0, 0, 2]),
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    assert final.tolist() == [[[1, 2, 3]], [[6, 7, 8]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_as_far_as_the_filter_in_its_sequence(backend: str) -> None:
    x = torch.randn(1, D, 30)
    x[:, :, 12] = torch.nan
    y = short_convolution(x.mT, torch.randn(D, 4), cu_seqlens=torch.tensor([0, 14, 30]), backend=backend)
    assert isinstance(y, Tensor)
    assert y.isnan().any(-1)[0].nonzero().flatten().tolist() == [12, 13]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(D + 1, 4)}, "weight must be"),
        ({"bias": torch.zeros(D, 1)}, "bias must be"),
        ({"activation": "relu"}, "choose None or 'silu'"),
        ({"initial_state": torch.zeros(1, D, 4)}, "initial_state must be"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 4, D), "weight": torch.zeros(D, 4), **change}
    with pytest.raises(ValueError, match=message):
        short_convolution(**arguments)
