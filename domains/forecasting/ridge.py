"""Closed-form forecasting head: pooled ridge, and per-channel ridge shrunk toward it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

_BLOCK_ELEMENTS = 4_000_000
_MAX_ELEMENTS = 250_000_000


class Windows(Protocol):
    """A window dataset that gives a whole batch in one gather."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int], /) -> Any: ...


def window_moments(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every window and channel over its observed steps.

    values (B, L, C), observed (B, L, C) bool -> two (B, 1, C). A window with nothing observed gives 0 and 0.
    """
    count = observed.sum(1, keepdim=True).clamp_min(1)
    # `where`, not a product: 0 · NaN is NaN.
    mean = torch.where(observed, values, 0).sum(1, keepdim=True) / count
    deviation = torch.where(observed, values - mean, 0)
    return mean, (deviation.square().sum(1, keepdim=True) / count).sqrt()


def blocks(windows: Windows, size: int) -> Iterator[Batch]:
    """The windows in order, `size` at a time."""
    for first in range(0, len(windows), size):
        yield windows.__getitems__(list(range(first, min(first + size, len(windows)))))


@dataclass(kw_only=True)
class NormalEquations:
    """Sums over windows in float64, by item: XX (C, F, F), XY (C, F, H), windows used, targets observed."""

    xx: dict[int, Tensor] = field(default_factory=dict)
    xy: dict[int, Tensor] = field(default_factory=dict)
    used: dict[int, Tensor] = field(default_factory=dict)
    observed: dict[int, Tensor] = field(default_factory=dict)

    def add(self, item: int, x: Tensor, y: Tensor, known: Tensor) -> None:
        """Add windows of one item: x (C, n, F), y (C, n, H), known (C, n, H) bool."""
        if item not in self.xx:
            C, _, F = x.shape
            self.xx[item], self.xy[item] = x.new_zeros(C, F, F), x.new_zeros(C, F, y.shape[-1])
            self.used[item], self.observed[item] = x.new_zeros(C, 1, 1), x.new_zeros(C, 1, y.shape[-1])
        self.xx[item].baddbmm_(x.mT, x)
        self.xy[item].baddbmm_(x.mT, y)
        self.used[item] += known.any(-1).sum(1)[:, None, None]
        self.observed[item] += known.sum(1, keepdim=True)

    @property
    def complete(self) -> bool:
        """Whether every target of every window in use was observed."""
        return all(bool((self.used[i] == self.observed[i]).all()) for i in self.xx)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """XX (G, F, F) and XY (G, F, H), G = items · C; zeros for an item without a window."""
        empty_xx, empty_xy = (torch.zeros_like(next(iter(t.values()))) for t in (self.xx, self.xy))
        items = range(max(self.xx) + 1)
        xx, xy = [self.xx.get(i, empty_xx) for i in items], [self.xy.get(i, empty_xy) for i in items]
        return torch.cat(xx), torch.cat(xy)


def _ridge(xx: Tensor, xy: Tensor, penalty: Tensor) -> Tensor:
    """(XX + λ I)⁻¹ XY over the last two axes."""
    # A lookback that is constant everywhere has XX = 0.
    penalty = torch.where(penalty > 0, penalty, 1)
    eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
    return torch.cholesky_solve(xy, torch.linalg.cholesky(xx + penalty * eye))


class RidgeHead(nn.Module):
    r"""Linear forecast in closed form, fitted in one streaming pass over the training windows.

    $\hat y = \mu + W_g^\top \phi$ with $\phi = [x - \mu,\ \sigma,\ \text{one-hot of the calendar}]$ at the
    last step, $W_0 = (S + \lambda I)^{-1} XY$ over all series, and
    $W_g = W_0 + (XX_g + \lambda_2 I)^{-1}(XY_g - XX_g W_0)$ for every (item, channel) g of G;
    λ is relative to the mean diagonal of S, λ₂ to that of S / G. The squared error on the validation windows
    chooses λ₂ (or W₀ for all) and the calendar column (or none). Toner & Darlow, "An Analysis of Linear Time
    Series Forecasting Models", arXiv 2403.14587.

    Missing inputs take the window's mean over its observed steps. Missing targets take no part: where there
    are any, two further passes put the current pooled fit in their place, which converges to least squares
    over the observed targets. An item that was not there in training gets W₀.

    Args:
        lookback: L.
        horizon: H.
        calendar: number of values of every calendar column by name, in the order of the batch's last axis.
        candidates: calendar columns to try.
        penalty: λ.
        shrinkage: values of λ₂ to try.
    """

    weight: Tensor
    spread: Tensor

    def __init__(
        self,
        lookback: int,
        horizon: int,
        *,
        calendar: Mapping[str, int] | None = None,
        candidates: Sequence[str] = (),
        penalty: float = 1e-2,
        shrinkage: Sequence[float] = (0.003, 0.01, 0.1),
    ) -> None:
        super().__init__()
        self.lookback, self.horizon = lookback, horizon
        self.calendar = dict(calendar or {})
        self.penalty, self.shrinkage = penalty, tuple(shrinkage)
        self.columns = [name for name in self.calendar if name in candidates]
        self.num_channels = 0
        self.choice: dict[str, Any] = {}
        # Row 0 is the pooled fit, row 1 + item·C + channel that of one channel of an item.
        self.register_buffer("weight", torch.zeros(1, self.num_features, horizon))
        # Root mean square validation error of every horizon step, relative to the windows' deviation.
        self.register_buffer("spread", torch.ones(horizon))

    @property
    def num_features(self) -> int:
        """F = L + 1 + the number of values of the calendar columns in use."""
        return self.lookback + 1 + sum(self.calendar[name] for name in self.columns)

    @property
    def fitted(self) -> bool:
        """Whether `fit` has run, here or before the checkpoint was written."""
        return bool(self.choice)

    def features(self, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Features (C, B, F) and window means (B, 1, C) of a batch."""
        past, observed = batch["past_values"].to(dtype), batch["past_observed"]
        B, L, C = past.shape
        mean, sd = window_moments(past, observed)
        x = past.new_zeros(C, B, self.num_features)
        x[..., :L] = torch.where(observed, past - mean, 0).permute(2, 0, 1)
        x[..., L] = sd[:, 0].T
        offset, names = L + 1, list(self.calendar)
        for name in self.columns:
            value = batch["calendar"][:, L - 1, names.index(name)]
            x[:, torch.arange(B, device=x.device), offset + value] = 1
            offset += self.calendar[name]
        return x, mean

    def forward(self, batch: Batch) -> Tensor:
        """Forecast (B, H, C) of a batch in the units of its values."""
        # The fit needs its last digits, so no half precision here.
        with torch.autocast(batch["past_values"].device.type, enabled=False):
            x, mean = self.features(batch)
            return mean + self._predict(self.weight, x, batch["item"]).permute(1, 2, 0)

    def _predict(self, weight: Tensor, x: Tensor, item: Tensor) -> Tensor:
        """X (C, B, F) -> (C, B, H) with the weights (1 + G, F, H) of each row's item, or the pooled ones."""
        C, weight = len(x), weight.to(x.dtype)
        if len(weight) == 1 or self.num_channels != C:
            return x @ weight[0]
        out = x.new_empty(C, x.shape[1], self.horizon)
        for index in torch.unique(item).tolist():
            known = 0 <= index < (len(weight) - 1) // C
            rows = item == index
            out[:, rows] = x[:, rows] @ (weight[1 + index * C : 1 + (index + 1) * C] if known else weight[0])
        return out

    @torch.no_grad()
    def fit(self, train: Windows, validation: Windows | None = None) -> dict[str, Any]:
        """Fit on the training windows and choose on the validation windows; returns what was chosen.

        Without validation windows: the first calendar column and the largest λ₂.

        Raises:
            ValueError: if there is no training window.
        """
        if not len(train):
            raise ValueError("train has no window: give more rows, or a shorter lookback or horizon")
        equations = self.accumulate(train)
        if not equations.complete:
            # To begin with, missing targets are like the observed ones.
            for i, xy in equations.xy.items():
                xy *= equations.used[i] / equations.observed[i].clamp_min(1)
            for _ in range(2):
                equations = self.accumulate(train, fill=self.solve(equations, None, None)[0])
        return self.choose(equations, validation) | {"windows": len(train)}

    def choose(self, equations: NormalEquations, validation: Windows | None = None) -> dict[str, Any]:
        """Solve for every candidate and keep the one with the smallest validation error."""
        self.num_channels = len(next(iter(equations.xx.values())))
        if validation is None or not len(validation):
            column = self.columns[0] if self.columns else None
            shrinkage = max(self.shrinkage, default=None)
            choice: dict[str, Any] = {"calendar": column, "shrinkage": shrinkage}
            weight = self.solve(equations, column, shrinkage)
        else:
            names = [(column, s) for column in (None, *self.columns) for s in (None, *self.shrinkage)]
            fits = [self.solve(equations, *name) for name in names]
            mse, spread = self._errors(fits, validation)
            best = int(mse.argmin())
            weight, (column, shrinkage) = fits[best], names[best]
            choice = {"calendar": column, "shrinkage": shrinkage, "validation_mse": float(mse[best])}
            self.spread = spread[best].to(self.spread)
        self._keep(weight, column)
        self.choice = choice
        return choice

    def _keep(self, weight: Tensor, column: str | None) -> None:
        """Keep the weights and, of the calendar columns, the chosen one."""
        self.weight = weight[:, self._used_features(column)].to(self.weight)
        self.columns = [column] if column else []

    def _used_features(self, column: str | None) -> Tensor:
        kept, offset = [torch.arange(self.lookback + 1)], self.lookback + 1
        for name in self.columns:
            if name == column:
                kept.append(torch.arange(offset, offset + self.calendar[name]))
            offset += self.calendar[name]
        return torch.cat(kept)

    def accumulate(
        self, windows: Windows, equations: NormalEquations | None = None, fill: Tensor | None = None
    ) -> NormalEquations:
        """Add the windows to the sums; a missing target is what `fill` (F, H) forecasts, or the mean."""
        sums = NormalEquations() if equations is None else equations
        for batch in blocks(windows, self._block_size(windows)):
            x, mean = self.features(batch, torch.float64)
            y = (batch["future_values"].to(x) - mean).permute(2, 0, 1)
            known = batch["future_observed"].permute(2, 0, 1)
            y = torch.where(known, y, 0 if fill is None else x @ fill)
            known = known & batch["past_observed"].any(1).T[..., None]
            x = x * known.any(-1, keepdim=True)
            for item in torch.unique(batch["item"]).tolist():
                rows = batch["item"] == item
                sums.add(self._group(sums, item, x), x[:, rows], y[:, rows], known[:, rows])
        return sums

    def _group(self, sums: NormalEquations, item: int, x: Tensor) -> int:
        """The key under which an item is summed: its own, as long as the sums of all items fit in memory."""
        C, _, F = x.shape
        if item in sums.xx or (len(sums.xx) + 1) * C * F * (F + self.horizon) <= _MAX_ELEMENTS or not sums.xx:
            return item
        warnings.warn(
            f"the ridge has a fit of its own only for the first {len(sums.xx)} items; the others share one",
            stacklevel=4,
        )
        return max(sums.xx)

    def solve(self, equations: NormalEquations, column: str | None, shrinkage: float | None) -> Tensor:
        """Weights (1 or 1 + G, F, H) of one candidate."""
        xx, xy = equations.stacked()
        used = self._used_features(column)
        weight = xx.new_zeros(1 if shrinkage is None else 1 + len(xx), *xy.shape[1:])
        xx, xy = xx[:, used][:, :, used], xy[:, used]
        total = xx.sum(0)
        diagonal = total.diagonal().mean()
        pooled = _ridge(total, xy.sum(0), self.penalty * diagonal)
        weight[:, used] = pooled
        if shrinkage is not None:
            weight[1:, used] += _ridge(xx, xy - xx @ pooled, shrinkage * diagonal / len(xx))
        return weight

    def _errors(self, fits: list[Tensor], windows: Windows) -> tuple[Tensor, Tensor]:
        """Mean squared error (K,) and root mean square error per horizon step over the window's sd (K, H)."""
        fits = [fit.float() for fit in fits]
        error = torch.zeros(len(fits), self.horizon, dtype=torch.float64)
        variance, count = torch.zeros(self.horizon, dtype=torch.float64), 0
        for batch in blocks(windows, self._block_size(windows)):
            x, mean = self.features(batch)
            y = (batch["future_values"] - mean).permute(2, 0, 1)
            known = batch["future_observed"].permute(2, 0, 1)
            for k, fit in enumerate(fits):
                squared = torch.where(known, y - self._predict(fit, x, batch["item"]), 0).square()
                error[k] += squared.sum((0, 1)).cpu()
            variance += (x[..., self.lookback, None].square() * known).sum((0, 1)).cpu()
            count += int(known.sum())
        return error.sum(-1) / max(count, 1), (error / variance.clamp_min(1e-12)).sqrt()

    def _block_size(self, windows: Windows) -> int:
        C = int(windows.__getitems__([0])["past_values"].shape[-1])
        return max(1, _BLOCK_ELEMENTS // (C * (self.num_features + self.horizon)))

    def get_extra_state(self) -> dict[str, Any]:
        """What was chosen, as plain values."""
        return {"choice": self.choice, "columns": self.columns, "num_channels": self.num_channels}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave."""
        self.choice, self.columns = dict(state["choice"]), list(state["columns"])
        self.num_channels = int(state["num_channels"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # How many series there are, and which calendar column, is only known once fitted.
        stored = state_dict.get(f"{prefix}weight")
        if stored is not None and stored.shape[-1] == self.horizon:
            self.weight = self.weight.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
