import numpy as np
import pytest
import torch
from torch import Tensor

from mainstem.domains.forecasting.calibration import ConformalCalibration, uncross

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


def skewed(windows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets (n, 3, 2), wrong quantiles (n, 3, 2, Q) and the windows' standard deviation (n, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    sd = 0.5 + torch.rand(windows, 1, 2, generator=generator)
    noise = torch.empty(windows, 3, 2).exponential_(generator=generator) - 0.3
    widths = 0.5 + 0.1 * (torch.tensor(LEVELS) - 0.5)
    return sd * noise, sd[..., None] * widths.expand(windows, 3, 2, -1), sd


def fitted(windows: int = 2000, seed: int = 0) -> ConformalCalibration:
    calibration = ConformalCalibration(LEVELS, 3)
    target, quantiles, sd = skewed(windows, seed)
    calibration.fit(quantiles, target, torch.ones_like(target, dtype=torch.bool), sd)
    return calibration


def test_coverage_on_exchangeable_windows() -> None:
    target, quantiles, sd = skewed(5000, seed=1)
    below_before = (target[..., None] <= quantiles).float().mean((0, 1, 2))
    below = (target[..., None] <= fitted()(quantiles, sd)).float().mean((0, 1, 2))
    for index, level in enumerate(LEVELS):
        if level != 0.5:
            assert float(below[index]) == pytest.approx(level, abs=0.015)
            assert abs(float(below_before[index]) - level) > 0.05


def test_guarantee_holds_on_average_with_few_windows() -> None:
    # With n = 19, rank ceil(20 · 0.95) = 19 is the largest score: coverage 0.95 in expectation, not less.
    hits = []
    for seed in range(300):
        target, quantiles, sd = skewed(20, seed)
        calibration = ConformalCalibration([0.05, 0.5, 0.95], 3)
        q = quantiles[..., [0, 2, 4]]
        calibration.fit(q[:19], target[:19], torch.ones(19, 3, 2, dtype=torch.bool), sd[:19])
        hits.append((target[19:] <= calibration(q[19:], sd[19:])[..., 2]).float().mean())
    assert float(torch.stack(hits).mean()) == pytest.approx(0.95, abs=0.02)


def test_shift_is_the_order_statistic_of_the_observed_scores() -> None:
    target, quantiles, sd = skewed(50, seed=3)
    observed = torch.rand(target.shape, generator=torch.Generator().manual_seed(4)) > 0.2
    hidden = torch.where(observed, target, torch.nan)
    calibration = ConformalCalibration(LEVELS, 3)
    calibration.fit(quantiles, hidden, observed, sd)
    scale = sd + 0.5 * sd.mean((0, 1))
    scores = ((target - quantiles[..., 3]) / scale)[:, 1, 0][observed[:, 1, 0]].numpy()
    rank = int(np.ceil((len(scores) + 1) * 0.75))
    assert float(calibration.shift[3, 1, 0]) == pytest.approx(float(np.sort(scores)[rank - 1]))


def test_median_stays_and_nothing_crosses() -> None:
    _, quantiles, sd = skewed(500, seed=5)
    crossed = quantiles.flip(-1)
    calibrated = fitted()(crossed, sd)
    assert torch.equal(calibrated[..., 2], crossed[..., 2])
    assert bool((calibrated.diff(dim=-1) >= 0).all())


def test_uncross_leaves_ordered_quantiles() -> None:
    ordered = torch.randn(4, 5).sort(-1).values
    assert torch.equal(uncross(ordered, LEVELS), ordered)


def test_too_few_windows_warn() -> None:
    with pytest.warns(UserWarning, match="5 validation windows are too few"):
        fitted(windows=5)


def test_unfitted_changes_nothing_and_other_channels_are_refused() -> None:
    _, quantiles, sd = skewed(4, seed=6)
    assert ConformalCalibration(LEVELS, 3)(quantiles, sd) is quantiles
    with pytest.raises(ValueError, match="calibration is for 2 channels, the data has 1"):
        fitted()(quantiles[:, :, :1], sd[..., :1])


def test_state_dict_restores_the_calibration() -> None:
    fresh = ConformalCalibration(LEVELS, 3)
    fresh.load_state_dict(fitted().state_dict())
    _, quantiles, sd = skewed(4, seed=7)
    assert torch.equal(fresh(quantiles, sd), fitted()(quantiles, sd))
