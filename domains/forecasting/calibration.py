"""Split-conformal calibration of quantiles, fitted on validation windows and kept in the checkpoint."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

_MIN_SCALE = 1e-4
# Flat windows would otherwise get no width at all, and a validation score that ruins the others.
_TYPICAL_SHARE = 0.5


class ConformalCalibration(nn.Module):
    r"""Moves every quantile so that it covers at its level: $q_\tau + \sigma\,\delta_{\tau,h,c}$.

    δ is the ⌈(n + 1) τ⌉-th smallest (below the median the ⌊(n + 1) τ⌋-th) of the n scores (y − q_τ) / σ
    of the validation windows, for every horizon step and channel; σ is the standard deviation of the window
    plus half of its mean over those windows. For exchangeable windows P(y ≤ q_τ + σ δ) ≥ τ above the
    median, and ≤ τ below it. The median stays where it is. Romano, Patterson & Candès 2019, "Conformalized
    Quantile Regression".

    Args:
        levels: τ in rising order.
        horizon: H.
    """

    shift: Tensor
    typical: Tensor

    def __init__(self, levels: list[float], horizon: int) -> None:
        super().__init__()
        self.levels, self.horizon = list(levels), horizon
        self.register_buffer("shift", torch.zeros(0, horizon, 0))
        self.register_buffer("typical", torch.zeros(0))

    @property
    def fitted(self) -> bool:
        """Whether there is a calibration to apply."""
        return self.shift.numel() > 0

    @torch.no_grad()
    def fit(self, quantiles: Tensor, target: Tensor, observed: Tensor, sd: Tensor) -> None:
        """Fit: quantiles (N, H, C, Q), target and observed (N, H, C), sd (N, 1, C) of the windows."""
        self.typical = sd.mean((0, 1)).to(self.typical)
        scale = self._scale(sd)
        count = observed.sum(0)
        shifts = []
        for index, level in enumerate(self.levels):
            if level == 0.5:
                shifts.append(torch.zeros_like(target[0]))
                continue
            score = (target - quantiles[..., index]) / scale
            ordered = torch.where(observed, score, torch.inf).sort(0).values
            rank = torch.ceil((count + 1) * level) if level > 0.5 else torch.floor((count + 1) * level)
            rank = rank.long().clamp_min(1).minimum(count).sub(1).clamp_min(0)
            shifts.append(torch.where(count > 0, ordered.gather(0, rank[None])[0], 0))
        self.shift = torch.stack(shifts).to(self.shift)
        needed = max(1 / min(level, 1 - level) for level in self.levels) - 1
        if int(count.min()) < needed:
            warnings.warn(
                f"calibration: {int(count.min())} validation windows are too few for the outermost quantile, "
                f"which needs {needed:.0f}; its coverage is not guaranteed",
                stacklevel=2,
            )

    def forward(self, quantiles: Tensor, sd: Tensor) -> Tensor:
        """Calibrated quantiles (B, H, C, Q), never crossing; sd (B, 1, C) of the windows."""
        if not self.fitted:
            return quantiles
        if self.shift.shape[-1] != quantiles.shape[2]:
            raise ValueError(
                f"the calibration is for {self.shift.shape[-1]} channels, the data has {quantiles.shape[2]}"
            )
        shift = self.shift.permute(1, 2, 0).to(quantiles)
        return uncross(quantiles + self._scale(sd)[..., None] * shift, self.levels)

    def _scale(self, sd: Tensor) -> Tensor:
        return (sd + _TYPICAL_SHARE * self.typical).clamp_min(_MIN_SCALE)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of channels is only known once fitted.
        stored = state_dict.get(f"{prefix}shift")
        if stored is not None and stored.shape[1] == self.horizon:
            self.shift = self.shift.new_zeros(stored.shape)
            self.typical = self.typical.new_zeros(stored.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)


def uncross(quantiles: Tensor, levels: list[float]) -> Tensor:
    """Let no quantile lie on the wrong side of one that is nearer to the median; (…, Q)."""
    middle = min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))
    above = quantiles[..., middle:].cummax(-1).values
    below = quantiles[..., : middle + 1].flip(-1).cummin(-1).values.flip(-1)
    return torch.cat([below, above[..., 1:]], -1)
