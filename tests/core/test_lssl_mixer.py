"""LSSL and HiPPO against the equations and figures of their papers (arXiv:2110.13985, arXiv:2008.07669)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem.core.hippo import bilinear, legs, legt
from mainstem.core.mixers.lssl import LSSLMixer
from mainstem.core.mixers.state_space import doubled
from mainstem.kernels import long_convolution


def test_matrices() -> None:
    (A, B), (L, M) = legs(9), legt(9)
    for n in range(9):
        torch.testing.assert_close([B[n].item(), M[n].item()], 2 * [math.sqrt(2 * n + 1)])
        for k in range(9):
            product = math.sqrt((2 * n + 1) * (2 * k + 1))
            assert A[n, k].item() == pytest.approx(-product if n > k else -(n + 1.0) * (n == k))
            assert L[n, k].item() == pytest.approx(-product * (1 if n >= k else (-1) ** (n - k)))


def test_legt_remembers_the_last_window() -> None:
    """The state holds the Legendre coefficients of the last unit of time."""
    steps, size = 4000, 12
    A, B = legt(size)
    Ad, Bd = bilinear(A, B, torch.tensor(1 / steps).double())
    t = torch.arange(3 * steps).double() / steps
    u = torch.sin(3 * t) + t**2 / 5
    x = torch.zeros(size).double()
    for u_t in u:
        x = Ad @ x + Bd * u_t
    # The newest instant is at the right end of the window.
    polynomials = torch.special.legendre_polynomial_p(
        torch.linspace(-1, 1, 101).double()[:, None], torch.arange(size)
    )
    remembered = (polynomials * (2 * torch.arange(size) + 1).sqrt()) @ x
    exact = u[-1 - torch.linspace(steps - 1, 0, 101).round().long()]
    assert (remembered - exact).abs().max() < 1e-2 * exact.abs().max()


def test_recurrence_and_convolution_agree_to_rounding() -> None:
    """N = 32, 500 tokens, float64: published as 7e-16."""
    A, B = bilinear(*legs(32), torch.tensor([0.01]).double())
    C, x = torch.randn(1, 32).double(), torch.randn(1, 500, 1).double()
    columns, powers = doubled(A, B, 512)
    kernel = torch.einsum("dn,dnt->dt", C, columns)[:, :500]
    torch.testing.assert_close(powers[-1], torch.linalg.matrix_power(A, 512), rtol=1e-10, atol=1e-14)
    h, outputs = torch.zeros(32).double(), []
    for x_t in x[0, :, 0]:
        h = A[0] @ h + B[0] * x_t
        outputs.append(C[0] @ h)
    recurrent = torch.stack(outputs)
    convolved = long_convolution(x, kernel)
    assert isinstance(convolved, Tensor)
    error = (convolved[0, :, 0] - recurrent).abs().max() / recurrent.abs().max()
    assert error < 1e-14


def test_half_the_step_at_twice_the_rate_is_the_same_system() -> None:
    """Continuous time: published as a change of the final state by 0.36 %."""
    coarse = LSSLMixer(1, 1, state_size=32, dt_min=0.01, dt_max=0.01).double()
    fine = LSSLMixer(1, 1, state_size=32, dt_min=0.01, dt_max=0.01, rate=0.5).double()
    t = torch.arange(1000).double() / 1000
    signal = torch.sin(20 * t) + 0.5 * torch.cos(7 * t)
    _, whole = fine(signal[None, :, None], return_state=True)
    _, half = coarse(signal[None, 1::2, None], return_state=True)
    change = (whole["hidden"] - half["hidden"]).norm() / whole["hidden"].norm()
    assert change < 0.01


@pytest.mark.parametrize("measure", ["legs", "legt"])
@pytest.mark.parametrize("chunk", [4, 512])
def test_the_scan_is_a_convolution_with_its_kernel(measure: Any, chunk: int) -> None:
    mixer = LSSLMixer(3, 1, state_size=12, measure=measure, chunk=chunk).double()
    x = torch.randn(2, 300, 3).double()
    y = long_convolution(x, mixer.kernel(300), mixer.skip)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(mixer._project(y), mixer(x))


def test_what_is_not_learned_is_kept_but_not_trained() -> None:
    fixed, learned = LSSLMixer(4, 1), LSSLMixer(4, 1, learn_A=True, learn_dt=True)
    assert {"A", "B", "log_dt"} <= set(fixed.state_dict())
    assert not {"A", "B", "log_dt"} & {name for name, _ in fixed.named_parameters()}
    assert {"A", "log_dt"} <= {name for name, _ in learned.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "state_size=0"),
        ({"measure": "legx"}, "choose one of legs, legt"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"chunk": 0}, "power of two"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSSLMixer(4, 1, **options)
