from typing import Any, cast

import pytest
import torch
from scipy import stats
from torch import Tensor

from mainstem import BackboneConfig
from mainstem.domains.forecasting.heads import build_head
from mainstem.domains.forecasting.model import ForecastModel, Inputs, PatchResidual
from mainstem.domains.forecasting.ridge import RidgeHead, window_moments

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]
CALENDAR = {"hour_of_day": 24, "day_of_week": 7}
HEADS = ["point", "quantile", "gaussian", "student_t"]


def batch_of(
    B: int = 3,
    L: int = 10,
    H: int = 7,
    C: int = 2,
    *,
    known: int = 0,
    past: int = 0,
    static: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hours = torch.arange(L + H) + torch.arange(B)[:, None]
    return {
        "past_values": torch.randn(B, L, C, generator=g),
        "past_observed": torch.rand(B, L, C, generator=g) > 0.2,
        "future_values": torch.randn(B, H, C, generator=g),
        "future_observed": torch.ones(B, H, C, dtype=torch.bool),
        "dt": torch.ones(B, L + H),
        "calendar": torch.stack([hours % 24, hours // 24 % 7], -1),
        "past_covariates": torch.randn(B, L, past, generator=g),
        "known_covariates": torch.randn(B, L + H, known, generator=g),
        "static": torch.randn(B, static, generator=g),
        "item": torch.zeros(B, dtype=torch.long),
        "start": torch.arange(B),
    }


def residual(L: int = 10, H: int = 7, C: int = 2, mixer: Any = "gla", **keywords: Any) -> PatchResidual:
    torch.manual_seed(0)
    covariates = {name: keywords.pop(name, 0) for name in ("known", "past", "static")}
    inputs = Inputs(channels=C, calendar=CALENDAR, cycles=("hour_of_day",), **covariates)
    backbone = BackboneConfig(mixer=mixer, dim=16, depth=1, heads=2)
    return PatchResidual(inputs, L, H, backbone, **{"patch_length": 4, "patch_stride": 4, **keywords})


def fitted_ridge(L: int = 10, H: int = 7, C: int = 2) -> RidgeHead:
    ridge = RidgeHead(L, H, calendar=CALENDAR, candidates=["hour_of_day"])

    class One:
        def __len__(self) -> int:
            return 40

        def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
            return {name: tensor[indices] for name, tensor in batch_of(40, L, H, C, seed=9).items()}

    ridge.fit(One(), One())
    return ridge


def awake(model: ForecastModel | PatchResidual) -> None:
    """Move the last layer away from zero."""
    part = model.residual if isinstance(model, ForecastModel) else model
    assert part is not None
    torch.manual_seed(1)
    torch.nn.init.normal_(part.output.weight, std=0.5)


@pytest.mark.parametrize("name", HEADS)
def test_untrained_model_is_the_ridge_exactly(name: Any) -> None:
    head = build_head(name, LEVELS)
    ridge = fitted_ridge()
    model = ForecastModel(head, 7, ridge, residual(num_outputs=head.num_outputs))
    batch = batch_of()
    assert torch.equal(head.point(model(batch)), ridge(batch))


@pytest.mark.parametrize("name", HEADS)
def test_untrained_model_without_ridge_is_the_window_mean(name: Any) -> None:
    head = build_head(name, LEVELS)
    model = ForecastModel(head, 7, None, residual(num_outputs=head.num_outputs))
    batch = batch_of()
    mean, _ = window_moments(batch["past_values"], batch["past_observed"])
    torch.testing.assert_close(head.point(model(batch)), mean.expand(-1, 7, -1))


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize(
    ("L", "H", "length", "stride"), [(10, 7, 4, 4), (10, 7, 4, 3), (8, 1, 8, 8), (5, 9, 1, 1)]
)
def test_shapes(L: int, H: int, length: int, stride: int, mixing: bool) -> None:
    part = residual(L, H, patch_length=length, patch_stride=stride, channel_mixing=mixing, num_outputs=3)
    assert part(batch_of(3, L, H)).shape == (3, H, 2, 3)


def test_patches_hold_every_step_once_and_end_at_the_last_row() -> None:
    part = residual(10, 7, patch_length=4, patch_stride=4)
    steps = torch.arange(1.0, 18.0)[None, :, None]
    patches = part.patches(steps)[0]
    assert patches.tolist() == [
        [0, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 0],
    ]  # fmt: skip
    assert part.last_steps(10).tolist() == [1, 5, 9, 13, 16]


@pytest.mark.parametrize("hidden", [float("nan"), -1e6])
def test_masked_inputs_and_future_targets_change_nothing(hidden: float) -> None:
    head = build_head("quantile", LEVELS)
    model = ForecastModel(head, 7, fitted_ridge(), residual(num_outputs=5))
    awake(model)
    batch = batch_of()
    other = {**batch, "future_values": torch.full_like(batch["future_values"], hidden)}
    other["past_values"] = torch.where(batch["past_observed"], batch["past_values"], hidden)
    forecast = model(other)
    assert forecast.isfinite().all()
    assert torch.equal(forecast, model(batch))
    forecast.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_observed_input_changes_the_forecast_of_its_channel_only_unless_channels_mix() -> None:
    batch = batch_of()
    changed = {
        **batch,
        "past_values": batch["past_values"].clone(),
        "past_observed": batch["past_observed"].clone(),
    }
    changed["past_values"][:, -1, 0] += 1
    changed["past_observed"][:, -1, 0] = True
    for mixing in (False, True):
        part = residual(channel_mixing=mixing)
        awake(part)
        difference = (part(changed) - part(batch)).abs().amax((0, 1, 3))
        assert difference[0] > 0
        assert bool(difference[1] > 0) == mixing


def test_known_covariates_reach_their_own_steps_and_past_ones_only_the_lookback() -> None:
    part = residual(known=1, past=2, static=1)
    awake(part)
    batch = batch_of(known=1, past=2, static=1)
    plain = part(batch)
    later = {**batch, "known_covariates": batch["known_covariates"].clone()}
    later["known_covariates"][:, -1] += 1
    difference = (part(later) - plain).abs().amax((0, 2, 3))
    assert not difference[:4].any()  # the first of two patches, causal
    assert difference[4:].all()
    for name in ("past_covariates", "static"):
        assert not torch.equal(part({**batch, name: batch[name] + 1}), plain)


def test_uneven_time_steps_are_seen() -> None:
    part = residual()
    awake(part)
    batch = batch_of()
    assert not torch.equal(part({**batch, "dt": batch["dt"] * 3}), part(batch))


@pytest.mark.parametrize("mixer", ["gla", "attention", "lstm", ["gla", "attention"]])
def test_every_parameter_gets_a_gradient(mixer: Any) -> None:
    part = residual(mixer=mixer, known=1, past=1, static=1)
    awake(part)
    part(batch_of(known=1, past=1, static=1)).square().sum().backward()
    assert [name for name, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", HEADS)
def test_forecast_follows_the_scale_of_the_data(name: Any) -> None:
    head = build_head(name, LEVELS)
    model = ForecastModel(head, 7, None, residual(num_outputs=head.num_outputs))
    awake(model)
    batch = batch_of()
    stretched = {**batch, "past_values": 4 * batch["past_values"] + 3}
    expected = 4 * head.quantiles(model(batch)) + 3
    torch.testing.assert_close(head.quantiles(model(stretched)), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["quantile", "gaussian", "student_t"])
def test_quantiles_never_cross(name: Any) -> None:
    head = build_head(name, LEVELS)
    raw = 20 * torch.randn(50, 7, 2, head.num_outputs, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1.0, 1e3):
        quantiles = head.quantiles(head(raw, torch.randn(50, 7, 2), torch.full((50, 7, 2), scale)))
        assert quantiles.isfinite().all()
        assert bool((quantiles.diff(dim=-1) >= 0).all())


def test_zero_outputs_of_the_quantile_head_are_normal_quantiles() -> None:
    head = build_head("quantile", LEVELS)
    quantiles = head.quantiles(
        head(torch.zeros(1, 1, 1, 5), torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]]))
    )
    torch.testing.assert_close(quantiles[0, 0, 0], torch.tensor(stats.norm.ppf(LEVELS, 2, 3)).float())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_losses_have_finite_gradients(name: Any, scale: float) -> None:
    head = build_head(name, LEVELS)
    raw = (10 * torch.randn(20, 3, 2, head.num_outputs)).requires_grad_()
    loss = head.loss(
        head(raw, torch.zeros(20, 3, 2), torch.full((20, 3, 2), scale)), torch.randn(20, 3, 2)
    ).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    assert loss.isfinite()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_head(cast(Any, "normal"), LEVELS),
            "head='normal' is unknown: choose one of point, quantile",
        ),
        (
            lambda: build_head("point", LEVELS, cast(Any, "l3")),
            "loss='l3' is unknown: choose one of mse, l1, huber",
        ),
        (lambda: build_head("quantile", [0.1, 0.9]), "has no 0.5"),
        (lambda: build_head("point", [0.1, 1.0]), "between 0 and 1"),
        (
            lambda: residual(patch_length=11, patch_stride=4),
            "patch_length=11 must be from 1 to the lookback, 10",
        ),
        (lambda: residual(patch_stride=5), "patch_stride=5 must be from 1 to patch_length, 4"),
        (lambda: ForecastModel(build_head("point", LEVELS), 7, None, None), "leave no model"),
    ],
)
def test_bad_settings_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
