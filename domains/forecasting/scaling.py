"""Standardisation with statistics of the training rows only."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .records import Series

ScaleBy = Literal["channel", "item", "none"]
_Matrix = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Scaler:
    """z = (x − mean) / scale with mean and standard deviation (ddof 0) of the observed training rows.

    `mean` and `scale` are float64 (G, C): G is 1 for `by="channel"` and the number of items for `by="item"`.
    A constant channel keeps scale 1, as in scikit-learn's StandardScaler.
    """

    mean: Tensor
    scale: Tensor
    by: ScaleBy = "channel"
    items: tuple[str, ...] = ()

    @classmethod
    def identity(cls, channels: int) -> "Scaler":
        """The scaler that changes nothing."""
        zeros = torch.zeros(1, channels, dtype=torch.float64)
        return cls(mean=zeros, scale=torch.ones_like(zeros), by="none")

    @classmethod
    def fit(
        cls,
        parts: Sequence[_Matrix],
        *,
        by: ScaleBy = "channel",
        items: Sequence[str] = (),
        names: Sequence[str] = (),
    ) -> "Scaler":
        """Statistics of the training rows `parts`, one (N_i, C) array an item with NaN where missing.

        Raises:
            ValueError: if a channel has no observed value in a group.
        """
        width = parts[0].shape[1]
        if by == "none" or width == 0:
            return cls.identity(width)
        groups = [np.concatenate(parts)] if by == "channel" else list(parts)
        labels = [""] if by == "channel" else [f" of item '{item}'" for item in items]
        stats = [_statistics(rows, names, label) for rows, label in zip(groups, labels, strict=True)]
        mean, scale = (torch.from_numpy(np.stack(column)) for column in zip(*stats, strict=True))
        return cls(mean=mean, scale=scale, by=by, items=tuple(items) if by == "item" else ())

    def group(self, item: Tensor | int) -> Tensor:
        """Row of `mean` and `scale` that serves each item index."""
        index = torch.as_tensor(item)
        return index if self.by == "item" else torch.zeros_like(index)

    def transform(self, values: Tensor, item: Tensor | int = 0) -> Tensor:
        """Original units to z, for values (..., C) of one item, or (B, ..., C) with item (B,)."""
        mean, scale = self._expand(values, item)
        return ((values.double() - mean) / scale).to(values.dtype)

    def inverse(self, values: Tensor, item: Tensor | int = 0) -> Tensor:
        """Map z back to original units; shapes as in `transform`."""
        mean, scale = self._expand(values, item)
        return (values.double() * scale + mean).to(values.dtype)

    def inverse_scale(self, deviations: Tensor, item: Tensor | int = 0) -> Tensor:
        """Deviations in z (errors, standard deviations) to original units: multiplied by scale only."""
        _, scale = self._expand(deviations, item)
        return (deviations.double() * scale).to(deviations.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and strings, so that a checkpoint loads with weights_only=True."""
        return {
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "by": self.by,
            "items": list(self.items),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Scaler":
        """The scaler that `state_dict` described."""
        return cls(
            mean=torch.tensor(state["mean"], dtype=torch.float64),
            scale=torch.tensor(state["scale"], dtype=torch.float64),
            by=state["by"],
            items=tuple(state["items"]),
        )

    def for_items(self, items: Sequence[str]) -> "Scaler":
        """The same statistics in the order of `items`, for a file with another set or order of items.

        Raises:
            ValueError: if an item was not among those the scaler was fitted on.
        """
        if self.by != "item" or tuple(items) == self.items:
            return self
        unknown = [item for item in items if item not in self.items]
        if unknown:
            raise ValueError(
                f"item '{unknown[0]}' is not in the training data, and scale='item' knows nothing of it; "
                f"known items: {', '.join(self.items[:10])}; train with scale='channel' to forecast new items"
            )
        order = [self.items.index(item) for item in items]
        return Scaler(mean=self.mean[order], scale=self.scale[order], by=self.by, items=tuple(items))

    def _expand(self, values: Tensor, item: Tensor | int) -> tuple[Tensor, Tensor]:
        group = self.group(item).to(values.device)
        mean, scale = self.mean.to(values.device)[group], self.scale.to(values.device)[group]
        if group.ndim == 1:
            shape = (len(group), *(1,) * (values.ndim - 2), mean.shape[-1])
            mean, scale = mean.view(shape), scale.view(shape)
        return mean, scale


@dataclass(frozen=True, kw_only=True)
class Scalers:
    """The scaler of the channels and those of the covariates."""

    values: Scaler
    known: Scaler
    past: Scaler
    static: Scaler

    @classmethod
    def fit(cls, series: Sequence[Series], train: Sequence[tuple[int, int]], by: ScaleBy) -> "Scalers":
        """Fit on the training rows [begin, end) of every series; channels that are constant there are told.

        Raises:
            ValueError: if a channel has no observed value there.
        """
        rows = {
            role: [getattr(one, role)[begin:end] for one, (begin, end) in zip(series, train, strict=True)]
            for role in ("values", "known", "past")
        }
        names = series[0].channels
        scaler = Scaler.fit(rows["values"], by=by, items=[one.item for one in series], names=names)
        constant = constant_channels(rows["values"], names) if by != "none" else []
        if constant:
            warnings.warn(
                f"constant in the training rows, so centred but not scaled: {', '.join(constant)}",
                stacklevel=2,
            )
        return cls(
            values=scaler,
            known=Scaler.fit(rows["known"]),
            past=Scaler.fit(rows["past"]),
            static=Scaler.fit([one.static[None] for one in series]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and strings."""
        return {role: getattr(self, role).state_dict() for role in ("values", "known", "past", "static")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], items: Sequence[str]) -> "Scalers":
        """The scalers that `state_dict` described, for the series `items`."""
        scalers = {role: Scaler.from_state_dict(part) for role, part in state.items()}
        return cls(**scalers | {"values": scalers["values"].for_items(items)})


def constant_channels(parts: Sequence[_Matrix], names: Sequence[str]) -> list[str]:
    """Names of the channels that hold one single value in all of `parts`."""
    low, high = _extremes(np.concatenate(parts))
    return [name for name, flat in zip(names, low == high, strict=True) if flat]


def _extremes(rows: _Matrix) -> tuple[_Matrix, _Matrix]:
    missing = np.isnan(rows)
    low = np.where(missing, np.inf, rows).min(axis=0, initial=np.inf)
    high = np.where(missing, -np.inf, rows).max(axis=0, initial=-np.inf)
    return low, high


def _statistics(
    rows: _Matrix, names: Sequence[str], label: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = rows.astype(np.float64)
    observed = ~np.isnan(values)
    count = observed.sum(axis=0)
    if (count == 0).any():
        empty = int(np.argmax(count == 0))
        name = names[empty] if names else str(empty)
        raise ValueError(
            f"channel '{name}'{label} has no observed value in the {len(rows)} training rows; "
            f"leave it out with channels=[...] or move the split"
        )
    mean = np.where(observed, values, 0.0).sum(axis=0) / count
    centred = np.where(observed, values - mean, 0.0)
    scale = np.sqrt((centred**2).sum(axis=0) / count)
    low, high = _extremes(rows)
    return mean, np.where(low == high, 1.0, scale)
