from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem.domains.forecasting import ForecastData, ridge
from mainstem.domains.forecasting.ridge import RidgeHead, blocks, window_moments

ETT = Path(__file__).parents[4] / "shared/data/forecasting/ett"


class Windows:
    """Windows of L + H rows over values (N, C); NaN is missing; hours count up from 0."""

    def __init__(self, values: Tensor, L: int, H: int, item: int = 0) -> None:
        self.values, self.observed = values.nan_to_num(0), ~values.isnan()
        self.L, self.H, self.item = L, H, item

    def __len__(self) -> int:
        return max(0, len(self.values) - self.L - self.H + 1)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = torch.tensor(indices, dtype=torch.long)[:, None] + torch.arange(self.L + self.H)
        values, observed = self.values[rows], self.observed[rows]
        return {
            "past_values": values[:, : self.L],
            "past_observed": observed[:, : self.L],
            "future_values": values[:, self.L :],
            "future_observed": observed[:, self.L :],
            "calendar": (rows % 24)[..., None],
            "item": torch.full((len(indices),), self.item),
        }

    def all(self) -> dict[str, Tensor]:
        return self.__getitems__(list(range(len(self))))


def series(rows: int = 400, channels: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    values = noise.clone()
    for t in range(2, rows):
        values[t] = 1.2 * values[t - 1] - 0.4 * values[t - 2] + noise[t]
    return values.float()


def head(L: int = 12, H: int = 4, **keywords: Any) -> RidgeHead:
    return RidgeHead(L, H, calendar={"hour_of_day": 24}, candidates=["hour_of_day"], **keywords)


def design(windows: Windows) -> tuple[Tensor, Tensor]:
    """Features [x − mean, sd] (C, n, L + 1) and centred targets (C, n, H), by plain torch."""
    batch = windows.all()
    past, future = batch["past_values"].double(), batch["future_values"].double()
    mean, sd = past.mean(1, keepdim=True), past.std(1, correction=0, keepdim=True)
    x = torch.cat([past - mean, sd], 1)
    return x.permute(2, 0, 1), (future - mean).permute(2, 0, 1)


def ridge_solution(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    # Ridge as least squares over augmented rows: another route than the normal equations.
    F = x.shape[1]
    rows = torch.cat([x, penalty.sqrt() * torch.eye(F, dtype=x.dtype)])
    solution: Tensor = torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(F, y.shape[1])])).solution
    return solution


@pytest.mark.parametrize("block", [1, 1_000, 1_000_000])
def test_pooled_fit_is_the_ridge_solution_for_any_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(ridge, "_BLOCK_ELEMENTS", block)
    windows = Windows(series(), 12, 4)
    model = head()
    weight = model.solve(model.accumulate(windows), None, None)
    x, y = design(windows)
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    expected = ridge_solution(x, y, 0.01 * x.square().sum(0).mean())
    torch.testing.assert_close(weight[0, :13], expected, rtol=1e-8, atol=1e-9)
    assert not weight[0, 13:].any()


def test_channels_are_shrunk_toward_the_pooled_fit() -> None:
    windows = Windows(series(), 12, 4)
    model = head()
    equations = model.accumulate(windows)
    pooled = model.solve(equations, None, None)[0, :13]
    weight = model.solve(equations, None, 0.1)
    x, y = design(windows)
    penalty = 0.1 * x.square().sum((0, 1)).mean() / 2
    for channel in range(2):
        expected = pooled + ridge_solution(x[channel], y[channel] - x[channel] @ pooled, penalty)
        torch.testing.assert_close(weight[1 + channel, :13], expected, rtol=1e-8, atol=1e-9)


def test_forecast_moves_and_stretches_with_the_data() -> None:
    values = series()
    model = head(shrinkage=())
    model.fit(Windows(values, 12, 4))
    model = RidgeHead(12, 4, shrinkage=())
    model.fit(Windows(values, 12, 4))
    plain = model(Windows(values, 12, 4).all())
    moved = model(Windows(3 * values + 5, 12, 4).all())
    torch.testing.assert_close(moved, 3 * plain + 5, rtol=1e-4, atol=1e-4)


def test_validation_chooses_the_calendar_where_there_is_a_daily_pattern() -> None:
    values = series(900)
    pattern = torch.randn(24, 1, generator=torch.Generator().manual_seed(1)) * 3
    daily = values + pattern[torch.arange(900) % 24]
    for data, expected in ((values, None), (daily, "hour_of_day")):
        model = head()
        choice = model.fit(Windows(data[:600], 12, 4), Windows(data[600:], 12, 4))
        assert choice["calendar"] == expected
        assert model.weight.shape[1] == 13 + (24 if expected else 0)


def test_selection_error_is_the_error_of_the_forecast() -> None:
    values = series(600)
    validation = Windows(values[400:], 12, 4)
    model = head()
    choice = model.fit(Windows(values[:400], 12, 4), validation)
    batch = validation.all()
    error = model(batch) - batch["future_values"]
    assert float(error.square().mean()) == pytest.approx(choice["validation_mse"], rel=1e-5)
    _, sd = window_moments(batch["past_values"], batch["past_observed"])
    spread = (error.square().mean((0, 2)) / sd.square().mean()).sqrt()
    torch.testing.assert_close(model.spread, spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [float("nan"), 1e9])
def test_masked_values_change_nothing(hidden: float) -> None:
    values = series()
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(2)) < 0.1] = torch.nan
    clean, other = Windows(values, 12, 4), Windows(values, 12, 4)
    other.values = torch.where(other.observed, other.values, hidden)
    fits = []
    for windows in (clean, other):
        model = head()
        model.fit(windows, windows)
        fits.append((model.weight, model(windows.all())))
    assert fits[0][1].isfinite().all()
    assert torch.equal(fits[0][0], fits[1][0])
    assert torch.equal(fits[0][1], fits[1][1])


def test_missing_targets_give_nearly_least_squares_over_the_observed() -> None:
    values = series(2000, channels=1)
    windows = Windows(values, 8, 3)
    windows.observed = windows.observed.clone()
    batch = windows.all()
    known = torch.rand(batch["future_values"].shape, generator=torch.Generator().manual_seed(3)) > 0.15

    class Masked(Windows):
        def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
            return {**super().__getitems__(indices), "future_observed": known[indices]}

    model = RidgeHead(8, 3, shrinkage=())
    model.fit(Masked(values, 8, 3))
    x, y = design(windows)
    for step in range(3):
        rows = known[:, step, 0]
        exact = ridge_solution(x[0][rows], y[0][rows][:, step : step + 1], 0.01 * x[0].square().sum(0).mean())
        torch.testing.assert_close(model.weight[0, :, step], exact[:, 0].float(), rtol=0.02, atol=0.01)


def test_unseen_item_gets_the_pooled_fit() -> None:
    values = series()
    model = RidgeHead(12, 4)
    model.fit(Windows(values, 12, 4))
    assert len(model.weight) == 3
    known, unseen = Windows(values, 12, 4), Windows(values, 12, 4, item=-1)
    assert not torch.equal(model(known.all()), model(unseen.all()))
    x, mean = model.features(unseen.all())
    expected = mean + (x @ model.weight[0]).permute(1, 2, 0)
    assert torch.equal(model(unseen.all()), expected)


def test_items_are_fitted_one_by_one() -> None:
    first, second = series(seed=0), series(seed=1) * torch.linspace(1, 3, 400)[:, None]

    class Both:
        parts = (Windows(first, 12, 4, 0), Windows(second, 12, 4, 1))

        def __len__(self) -> int:
            return sum(len(part) for part in self.parts)

        def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
            split = len(self.parts[0])
            batches = [
                self.parts[0].__getitems__([i for i in indices if i < split]),
                self.parts[1].__getitems__([i - split for i in indices if i >= split]),
            ]
            return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    model = RidgeHead(12, 4, shrinkage=(0.01,))
    model.fit(Both())
    assert len(model.weight) == 1 + 2 * 2
    x, y = design(Both.parts[1])
    pooled = model.weight[0].double()
    both = torch.cat([design(part)[0] for part in Both.parts], 1)
    expected = pooled + ridge_solution(
        x[1], y[1] - x[1] @ pooled, 0.01 * both.square().sum((0, 1)).mean() / 4
    )
    torch.testing.assert_close(model.weight[4], expected.float(), rtol=1e-3, atol=1e-4)


def test_state_dict_restores_a_fit_of_any_size() -> None:
    values = series()
    fitted, fresh = head(), head()
    fitted.fit(Windows(values, 12, 4), Windows(values, 12, 4))
    fresh.load_state_dict(fitted.state_dict())
    batch = Windows(values, 12, 4).all()
    assert fresh.fitted
    assert fresh.choice == fitted.choice
    assert torch.equal(fresh(batch), fitted(batch))


def test_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="train has no window"):
        head().fit(Windows(series(10), 12, 4))


def test_half_precision_does_not_reach_the_ridge() -> None:
    windows = Windows(series(), 12, 4)
    model = head()
    model.fit(windows)
    batch = windows.all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch)
    assert torch.equal(half, model(batch))


@pytest.mark.skipif(not ETT.exists(), reason="ETTh1 is not there")
def test_ridge_on_etth1_reaches_the_figures() -> None:
    data = ForecastData(source="etth1", path=str(ETT), lookback=96, horizon=96)
    model = RidgeHead(96, 96, calendar=data.calendar, candidates=["hour_of_day"])
    model.fit(data.train_set, data.val_set)
    squared = absolute = count = 0.0
    for batch in blocks(data.test_set, 500):
        error = (model(batch) - batch["future_values"]).double()
        squared += float(error.square().sum())
        absolute += float(error.abs().sum())
        count += error.numel()
    assert count == 2785 * 96 * 7
    assert squared / count <= 0.372
    assert absolute / count <= 0.389
