"""Scores of forecasts, and the metrics that torchmetrics does not have."""

import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torchmetrics import Metric


def pinball(quantiles: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """Quantile loss max(τ e, (τ − 1) e), e = y − q: quantiles (…, Q), target (…), levels (Q,) -> (…, Q)."""
    error = target[..., None] - quantiles
    return torch.maximum(levels * error, (levels - 1) * error)


def crps_quantiles(quantiles: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """CRPS as 2 ∫ quantile loss dτ over (0, 1), each level standing for what is nearest to it."""
    middle = (levels[1:] + levels[:-1]) / 2
    borders = torch.cat([levels.new_zeros(1), middle, levels.new_ones(1)])
    return 2 * (pinball(quantiles, target, levels) * borders.diff()).sum(-1)


def crps_normal(mean: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """CRPS of N(μ, σ²): σ [z (2Φ(z) − 1) + 2φ(z) − 1/√π]. Gneiting & Raftery 2007."""
    z = (target - mean) / scale
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return scale * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


def crps_student_t(df: Tensor, mean: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """CRPS of the Student t, df > 1. Jordan, Krüger & Lerch 2019, "Evaluating Probabilistic Forecasts"."""
    z = (target - mean) / scale
    density = (-(df + 1) / 2 * torch.log1p(z.square() / df) - _log_beta(df / 2)).exp() / df.sqrt()
    cdf = _on_cpu(special.stdtr, df, z)
    tail: Tensor = 2 * df.sqrt() / (df - 1) * torch.exp(_log_beta(df - 0.5) - 2 * _log_beta(df / 2))
    return scale * (z * (2 * cdf - 1) + 2 * density * (df + z.square()) / (df - 1) - tail)


def _log_beta(x: Tensor) -> Tensor:
    """Log of B(1/2, x)."""
    return math.lgamma(0.5) + torch.lgamma(x) - torch.lgamma(x + 0.5)


def student_t_quantile(df: Tensor, level: Tensor) -> Tensor:
    """Quantile of the standard Student t, for which torch has no function."""
    return _on_cpu(special.stdtrit, df, level)


def _on_cpu(function: Any, *tensors: Tensor) -> Tensor:
    arrays = [tensor.detach().double().cpu().numpy() for tensor in tensors]
    return torch.from_numpy(np.asarray(function(*arrays))).to(tensors[0])


class ObservedMean(Metric):
    """Mean over the observed entries of all batches and processes, whatever their sizes.

    Args:
        horizon: H for a mean of each horizon step, values (B, H, C) -> (H,); None for one mean.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, horizon: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = () if horizon is None else (horizon,)
        self.axes = None if horizon is None else (0, 2)
        self.add_state("total", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, observed: Tensor) -> None:
        """Add `values`, of the same shape as the mask `observed`."""
        self.total += torch.where(observed, values, 0).sum(self.axes)
        self.count += observed.sum(self.axes)

    def compute(self) -> Tensor:
        """The mean so far; NaN when nothing was observed."""
        return self.total / self.count
