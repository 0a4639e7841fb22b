"""Hyena against the equations of its paper (arXiv:2302.10866)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem.core.mixers.hyena import HyenaMixer, ImplicitFilters


def naive(mixer: HyenaMixer, x: Tensor) -> Tensor:
    """Every sum written out."""

    def convolve(z: Tensor, taps: Tensor) -> Tensor:
        rows = [
            sum(taps[:, j] * z[:, t - j] for j in range(min(t + 1, taps.shape[1]))) for t in range(z.shape[1])
        ]
        return torch.stack([torch.as_tensor(r) for r in rows], 1)

    projected = convolve(mixer.in_proj(x), mixer.conv_weight.flip(1)) + mixer.conv_bias
    z, *gates = projected.chunk(mixer.order + 1, -1)
    filters = mixer.filters(mixer.length).unflatten(0, (mixer.order, -1))
    for gate, taps, skip in zip(gates, filters, mixer.skip):
        z = gate * (convolve(z, taps) + skip * z)
    y: Tensor = mixer.out_proj(z)
    return y


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("max_length", [1, 5, 100])
def test_is_the_recurrence_of_the_paper(order: int, max_length: int) -> None:
    mixer = HyenaMixer(4, 1, order=order, max_length=max_length).double()
    x = torch.randn(2, 12, 4).double()
    torch.testing.assert_close(mixer(x), naive(mixer, x))


def test_filters_are_functions_of_the_position_under_a_window() -> None:
    filters = ImplicitFilters(6, 50, width=16, bands=3, sine=10.0).double()
    h = filters(50)
    assert h.shape == (6, 50)
    torch.testing.assert_close(filters(20), h[:, :20])
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    x = [
        t,
        *((2 * torch.pi * f * t).cos() for f in range(3)),
        *(-(2 * torch.pi * f * t).sin() for f in range(3)),
    ]
    z = torch.stack(x, 1)
    for layer in filters.layers:
        z = torch.sin(filters.sine * layer(z))
    torch.testing.assert_close(h, (filters.last(z) * torch.exp(-t[:, None] * filters.decay)).T)
    # The windows fall to a hundredth between 0.3 and 1.5 filter lengths.
    torch.testing.assert_close(
        torch.exp(-filters.decay * torch.linspace(0.3, 1.5, 6)), torch.full((6,), 0.01).double()
    )


def test_nothing_older_than_the_filter_is_seen() -> None:
    mixer = HyenaMixer(4, 1, order=1, max_length=5, conv=1).double()
    x = torch.randn(1, 20, 4).double()
    other = torch.cat([torch.randn(1, 10, 4).double(), x[:, 10:]], 1)
    same = torch.isclose(mixer(x), mixer(other)).all(-1)[0]
    assert same.tolist() == [False] * 14 + [True] * 6


def test_the_state_is_the_past_of_each_convolution() -> None:
    mixer = HyenaMixer(4, 1, max_length=9)
    shapes = {name: tuple(t.shape) for name, t in mixer.init_state(3).items()}
    assert shapes == {"conv": (3, 12, 2), "past0": (3, 4, 8), "past1": (3, 4, 8)}


@pytest.mark.parametrize("option", ["order", "max_length", "conv", "filter_width"])
def test_errors(option: str) -> None:
    sizes: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
        HyenaMixer(4, 1, **sizes)
