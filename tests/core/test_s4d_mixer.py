"""S4D against the equations of its paper (arXiv:2206.11893)."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem.core.mixers.s4d import S4DMixer, frequencies
from mainstem.kernels import long_convolution


def naive(mixer: S4DMixer, x: Tensor) -> Tensor:
    """Channel by channel and token by token, with all N states of conjugate pairs."""
    A = torch.complex(-mixer.log_decay.exp(), mixer.frequency)
    step = mixer.log_dt.exp()[:, None]
    if mixer.discretisation == "zoh":
        power = (step * A).exp()
        added = (power - 1) / A
    else:
        power, added = (1 + step / 2 * A) / (1 - step / 2 * A), step / (1 - step / 2 * A)
    C = torch.view_as_complex(mixer.state_proj)
    power, added, C = (torch.cat([t, t.conj()], -1) for t in (power, added, C))
    h, outputs = torch.zeros_like(C).expand(x.shape[0], -1, -1), []
    for x_t in x.unbind(1):
        h = power * h + added * x_t[..., None]
        outputs.append((C * h).sum(-1))
    o = torch.stack(outputs, 1)
    assert o.imag.abs().max() < 1e-12
    return F.glu(mixer.out_proj(F.gelu(o.real + mixer.skip * x)), -1)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("initialisation", ["linear", "inverse"])
@pytest.mark.parametrize("chunk", [8, 256])
def test_is_the_recurrence_of_the_paper(discretisation: Any, initialisation: Any, chunk: int) -> None:
    mixer = S4DMixer(
        6, 1, discretisation=discretisation, initialisation=initialisation, state_size=10, chunk=chunk
    ).double()
    x = torch.randn(2, 300, 6).double()
    torch.testing.assert_close(mixer(x), naive(mixer, x))


def test_initial_frequencies() -> None:
    n = torch.arange(32).double()
    torch.testing.assert_close(frequencies(64, "linear"), math.pi * n)
    torch.testing.assert_close(frequencies(64, "inverse"), 64 / math.pi * (64 / (2 * n + 1) - 1))
    mixer = S4DMixer(4, 1)
    torch.testing.assert_close(mixer.log_decay.exp(), torch.full((4, 32), 0.5))
    assert ((mixer.log_dt >= math.log(1e-3)) & (mixer.log_dt <= math.log(1e-1))).all()


def test_the_scan_is_a_convolution_with_its_kernel() -> None:
    mixer = S4DMixer(5, 1, state_size=16).double()
    x = torch.randn(1, 500, 5).double()
    y = long_convolution(x, mixer.kernel(500), mixer.skip)
    torch.testing.assert_close(mixer._project(y), mixer(x))  # type: ignore[arg-type]


def test_zero_order_hold_is_exact_for_a_constant_input() -> None:
    mixer = S4DMixer(1, 1, state_size=2, initialisation="linear", dt_min=0.01, dt_max=0.01).double()
    _, state = mixer(torch.ones(1, 300, 1).double(), return_state=True)
    A = torch.complex(-mixer.log_decay.exp(), mixer.frequency)
    exact = ((A * 300 * mixer.log_dt.exp()).exp() - 1) / A
    torch.testing.assert_close(state["hidden"][0], exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 5}, "must be even"),
        ({"initialisation": "random"}, "choose one of linear, inverse"),
        ({"discretisation": "euler"}, "choose one of zoh, bilinear"),
        ({"dt_min": 0.0}, "dt_min and dt_max"),
        ({"chunk": 48}, "power of two"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4DMixer(4, 1, **options)  # type: ignore[arg-type]
