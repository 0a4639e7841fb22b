"""What is forecast of every step: a point, quantiles, or a distribution."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import StudentT
from torch.nn import functional as F

from .metrics import crps_normal, crps_quantiles, crps_student_t, pinball, student_t_quantile

HeadName = Literal["point", "quantile", "gaussian", "student_t"]
LossName = Literal["mse", "l1", "huber"]

_MIN_SCALE = 1e-4
_SOFTPLUS_INVERSE_OF_1 = math.log(math.e - 1)


class Head(nn.Module, ABC):
    """Turns raw outputs into a forecast: location + scale · (what the network adds).

    Outputs of zero give the location. `forward` maps raw (B, H, C, P), location and scale (B, H, C) to the
    parameters (B, H, C, R) that the other methods read. `levels` are the quantile levels, in rising order.
    """

    num_outputs: int
    levels: Tensor

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(check_levels(levels)), persistent=False)

    @abstractmethod
    def forward(self, raw: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The parameters of the forecast."""

    @abstractmethod
    def loss(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Loss of every step, (B, H, C)."""

    @abstractmethod
    def crps(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Continuous ranked probability score of every step, (B, H, C)."""

    @abstractmethod
    def quantiles(self, forecast: Tensor) -> Tensor:
        """The quantiles at `levels`, (B, H, C, Q), never crossing."""

    def point(self, forecast: Tensor) -> Tensor:
        """Mean, or median of a quantile forecast, (B, H, C)."""
        return forecast[..., 0]


class PointHead(Head):
    """One number; its quantiles are all that number until a calibration spreads them."""

    num_outputs = 1

    def __init__(self, levels: Sequence[float], loss: LossName = "mse") -> None:
        super().__init__(levels)
        self.loss_name = loss

    def forward(self, raw: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The parameters of the forecast."""
        return location[..., None] + scale[..., None] * raw

    def loss(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Loss of every step, (B, H, C)."""
        point = forecast[..., 0]
        if self.loss_name == "mse":
            return F.mse_loss(point, target, reduction="none")
        if self.loss_name == "l1":
            return F.l1_loss(point, target, reduction="none")
        return F.huber_loss(point, target, reduction="none")

    def crps(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Absolute error, which the CRPS of a single number is."""
        return (forecast[..., 0] - target).abs()

    def quantiles(self, forecast: Tensor) -> Tensor:
        """The point, once for every level."""
        return forecast[..., :1].expand(*forecast.shape[:-1], len(self.levels))


class QuantileHead(Head):
    """Median, and steps of softplus width outward from it, so that quantiles cannot cross; quantile loss."""

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__(levels)
        if 0.5 not in self.levels:
            raise ValueError(
                f"quantiles={list(levels)} has no 0.5: a quantile head is built outward from the median"
            )
        self.num_outputs = len(self.levels)
        self.middle = int((self.levels == 0.5).nonzero())
        # Zero outputs give the quantiles of a normal distribution.
        widths = torch.diff(_normal_quantile(self.levels.double())).float()
        self.register_buffer("bias", torch.log(torch.expm1(widths)), persistent=False)

    bias: Tensor

    def forward(self, raw: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The parameters of the forecast: its quantiles."""
        scale, m = scale[..., None].clamp_min(_MIN_SCALE), self.middle
        center = location[..., None] + scale * raw[..., m : m + 1]
        widths = scale * F.softplus(torch.cat([raw[..., :m], raw[..., m + 1 :]], -1) + self.bias)
        below = center - widths[..., :m].flip(-1).cumsum(-1).flip(-1)
        return torch.cat([below, center, center + widths[..., m:].cumsum(-1)], -1)

    def loss(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Loss of every step, (B, H, C)."""
        return pinball(forecast, target, self.levels).mean(-1)

    def crps(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Continuous ranked probability score from the quantiles at hand, (B, H, C)."""
        return crps_quantiles(forecast, target, self.levels)

    def quantiles(self, forecast: Tensor) -> Tensor:
        """The quantiles at `levels`, (B, H, C, Q)."""
        return forecast

    def point(self, forecast: Tensor) -> Tensor:
        """The median."""
        return forecast[..., self.middle]


class GaussianHead(Head):
    """Normal distribution, by maximum likelihood."""

    num_outputs = 2

    def forward(self, raw: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The parameters of the forecast: mean and standard deviation."""
        mean, spread = location + scale * raw[..., 0], _positive(raw[..., 1], scale)
        return torch.stack([mean, spread], -1)

    def loss(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Loss of every step, (B, H, C)."""
        mean, scale = forecast.unbind(-1)
        variance = scale.square()
        return F.gaussian_nll_loss(mean, target, variance, full=True, reduction="none", eps=_MIN_SCALE**2)

    def crps(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Continuous ranked probability score of every step, (B, H, C)."""
        return crps_normal(forecast[..., 0], forecast[..., 1], target)

    def quantiles(self, forecast: Tensor) -> Tensor:
        """The quantiles at `levels`, (B, H, C, Q)."""
        return forecast[..., :1] + forecast[..., 1:] * _normal_quantile(self.levels.to(forecast))


class StudentTHead(Head):
    """Student t of more than two degrees of freedom (heavy tails, finite variance), by maximum likelihood."""

    num_outputs = 3

    def forward(self, raw: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """The parameters of the forecast: mean, scale and degrees of freedom."""
        df = 2.01 + 8 * F.softplus(raw[..., 2] + _SOFTPLUS_INVERSE_OF_1)
        mean, spread = location + scale * raw[..., 0], _positive(raw[..., 1], scale)
        return torch.stack([mean, spread, df], -1)

    def loss(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Loss of every step, (B, H, C)."""
        mean, scale, df = forecast.unbind(-1)
        log_prob: Tensor = StudentT(df, mean, scale).log_prob(target)  # type: ignore[no-untyped-call]
        return -log_prob

    def crps(self, forecast: Tensor, target: Tensor) -> Tensor:
        """Continuous ranked probability score of every step, (B, H, C)."""
        mean, scale, df = forecast.unbind(-1)
        return crps_student_t(df, mean, scale, target)

    def quantiles(self, forecast: Tensor) -> Tensor:
        """The quantiles at `levels`, (B, H, C, Q)."""
        mean, scale, df = (parameter[..., None] for parameter in forecast.unbind(-1))
        return mean + scale * student_t_quantile(df, self.levels.to(forecast))


def _normal_quantile(level: Tensor) -> Tensor:
    quantile: Tensor = torch.special.ndtri(level)
    return quantile


def _positive(raw: Tensor, scale: Tensor) -> Tensor:
    return scale * F.softplus(raw + _SOFTPLUS_INVERSE_OF_1) + _MIN_SCALE


def check_levels(levels: Sequence[float]) -> list[float]:
    """The quantile levels, in rising order.

    Raises:
        ValueError: if one is not inside (0, 1), or there twice, or there is none.
    """
    if not levels or any(not 0 < level < 1 for level in levels) or len(set(levels)) < len(levels):
        raise ValueError(f"quantiles={list(levels)} must be different numbers between 0 and 1")
    return sorted(levels)


def build_head(name: HeadName, levels: Sequence[float], loss: LossName = "mse") -> Head:
    """The head of that name; `loss` is the point head's.

    Raises:
        ValueError: if the name or the loss is unknown.
    """
    if name not in get_args(HeadName):
        raise ValueError(f"head={name!r} is unknown: choose one of {', '.join(get_args(HeadName))}")
    if loss not in get_args(LossName):
        raise ValueError(f"loss={loss!r} is unknown: choose one of {', '.join(get_args(LossName))}")
    if name == "point":
        return PointHead(levels, loss)
    kinds: dict[str, type[Head]] = {
        "quantile": QuantileHead,
        "gaussian": GaussianHead,
        "student_t": StudentTHead,
    }
    return kinds[name](levels)
