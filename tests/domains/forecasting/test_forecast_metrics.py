from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from mainstem.domains.forecasting.metrics import (
    ObservedMean,
    crps_normal,
    crps_quantiles,
    crps_student_t,
    pinball,
    student_t_quantile,
)


def integral(distribution: Any, y: float) -> float:
    """∫ (F(x) − 1[x ≥ y])² dx, the definition of the CRPS."""
    below = integrate.quad(lambda x: distribution.cdf(x) ** 2, -np.inf, y)[0]
    above = integrate.quad(lambda x: distribution.sf(x) ** 2, y, np.inf)[0]
    return float(below + above)


@pytest.mark.parametrize("y", [-3.0, 0.4, 2.0])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.5, 0.3), (-2.0, 4.0)])
def test_crps_normal_is_its_integral(mean: float, scale: float, y: float) -> None:
    value = crps_normal(*(torch.tensor(x, dtype=torch.float64) for x in (mean, scale, y)))
    assert float(value) == pytest.approx(integral(stats.norm(mean, scale), y), rel=1e-6)


@pytest.mark.parametrize("df", [2.2, 4.0, 30.0])
@pytest.mark.parametrize("y", [-3.0, 0.4, 2.0])
def test_crps_student_t_is_its_integral(df: float, y: float) -> None:
    value = crps_student_t(*(torch.tensor(x, dtype=torch.float64) for x in (df, 0.5, 1.5, y)))
    assert float(value) == pytest.approx(integral(stats.t(df, 0.5, 1.5), y), rel=1e-5)


def test_crps_of_dense_quantiles_is_the_closed_form() -> None:
    levels = torch.arange(0.0005, 1, 0.001, dtype=torch.float64)
    quantiles = 0.3 + 2.0 * torch.special.ndtri(levels)
    y = torch.tensor([-1.0, 0.3, 4.0], dtype=torch.float64)
    value = crps_quantiles(quantiles.expand(3, -1), y, levels)
    expected = crps_normal(torch.tensor(0.3), torch.tensor(2.0), y)
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-4)


def test_crps_of_seven_quantiles_is_near_the_closed_form() -> None:
    levels = torch.tensor([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    y = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    value = crps_quantiles(torch.special.ndtri(levels).expand(len(y), -1), y, levels).mean()
    expected = crps_normal(torch.tensor(0.0), torch.tensor(1.0), y).mean()
    assert float(value) == pytest.approx(float(expected), rel=0.03)


def test_pinball_is_smallest_at_the_quantile() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20_000, generator=generator)
    candidates = torch.linspace(-2, 2, 81)
    losses = torch.stack([pinball(c.expand(len(y), 1), y, torch.tensor([0.9])).mean() for c in candidates])
    assert float(candidates[losses.argmin()]) == pytest.approx(stats.norm.ppf(0.9), abs=0.06)


def test_student_t_quantile_is_scipys() -> None:
    level, df = torch.tensor([0.05, 0.5, 0.99]), torch.tensor([[2.5], [10.0]])
    expected = stats.t.ppf(level.numpy(), df.numpy())
    np.testing.assert_allclose(student_t_quantile(df, level).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_observed_mean_does_not_depend_on_batches_or_masked_values() -> None:
    values, observed = torch.randn(11, 3, 2), torch.rand(11, 3, 2) > 0.4
    values[~observed] = torch.nan
    whole, parts, one, two = (ObservedMean() for _ in range(4))
    whole.update(values, observed)
    for rows in torch.split(torch.arange(11), 4):
        parts.update(values[rows], observed[rows])
    torch.testing.assert_close(whole.compute(), values[observed].mean())
    torch.testing.assert_close(parts.compute(), whole.compute())
    one.update(values[:5], observed[:5])
    two.update(values[5:], observed[5:])
    one.merge_state(two)
    torch.testing.assert_close(one.compute(), whole.compute())


def test_observed_mean_by_horizon_step() -> None:
    values, observed = torch.randn(5, 3, 2), torch.rand(5, 3, 2) > 0.3
    metric = ObservedMean(horizon=3)
    metric.update(values, observed)
    expected = torch.stack([values[:, step][observed[:, step]].mean() for step in range(3)])
    torch.testing.assert_close(metric.compute(), expected)
