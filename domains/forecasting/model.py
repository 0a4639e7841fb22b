"""The forecaster's network: closed-form ridge plus a backbone residual on patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core import BackboneConfig
from .heads import Head
from .ridge import Batch, RidgeHead, window_moments

_MIN_SD = 1e-4


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a batch holds: number of channels and covariates, and the calendar columns with their sizes.

    `cycles` are the calendar columns that the residual learns from: those that come round often in training.
    """

    channels: int
    calendar: Mapping[str, int] = field(default_factory=dict)
    cycles: Sequence[str] = ()
    past: int = 0
    known: int = 0
    static: int = 0


class PatchResidual(nn.Module):
    """A backbone over patches of the lookback, then of the horizon; those carry only what is known ahead.

    Every channel is a sequence of its own, (B·C, N, dim); with `channel_mixing` all are one, (B, N·C, dim).
    The last layer starts at zero, so that the untrained residual is exactly nothing.

    Args:
        inputs: what a batch holds.
        lookback: L.
        horizon: H.
        backbone: the stack of token mixers.
        num_outputs: values of every step and channel.
        patch_length: steps of a token.
        patch_stride: steps between the starts of the lookback's patches.
        channel_mixing: one sequence for all channels.
    """

    def __init__(
        self,
        inputs: Inputs,
        lookback: int,
        horizon: int,
        backbone: BackboneConfig,
        *,
        num_outputs: int = 1,
        patch_length: int = 16,
        patch_stride: int = 16,
        channel_mixing: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= patch_length <= lookback:
            raise ValueError(f"patch_length={patch_length} must be from 1 to the lookback, {lookback}")
        if not 1 <= patch_stride <= patch_length:
            raise ValueError(f"patch_stride={patch_stride} must be from 1 to patch_length, {patch_length}")
        self.inputs, self.lookback, self.horizon = inputs, lookback, horizon
        self.patch_length, self.patch_stride = patch_length, patch_stride
        self.num_outputs, self.channel_mixing = num_outputs, channel_mixing
        self.num_past = -(-(lookback - patch_length) // patch_stride) + 1
        self.num_future = -(-horizon // patch_length)
        dim = backbone.dim
        self.values = nn.Linear(2 * patch_length, dim)
        shared = patch_length * (1 + inputs.past + inputs.known) + inputs.static
        self.covariates = nn.Linear(shared, dim, bias=False)
        self.calendar = nn.ModuleDict(
            {name: nn.Embedding(inputs.calendar[name], dim) for name in inputs.cycles}
        )
        # Where every channel is a sequence of its own, knowing which one only helps to learn it by heart.
        self.channel = nn.Parameter(torch.zeros(inputs.channels, 1, dim)) if channel_mixing else None
        self.ahead = nn.Parameter(torch.zeros(self.num_future, dim))
        self.backbone = backbone.build()
        self.output = nn.Linear(dim, patch_length * num_outputs)
        for weight in self.calendar.parameters():
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.ahead, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Raw outputs (B, H, C, num_outputs) of a batch."""
        tokens = self.embed(batch)
        B, C, N, D = tokens.shape
        if self.channel_mixing:
            mixed = self.backbone(tokens.transpose(1, 2).reshape(B, N * C, D))
            tokens = mixed.view(B, N, C, D).transpose(1, 2)
        else:
            tokens = self.backbone(tokens.reshape(B * C, N, D)).view(B, C, N, D)
        out: Tensor = self.output(tokens[:, :, self.num_past :])
        out = out.view(B, C, self.num_future * self.patch_length, self.num_outputs)
        return out[:, :, : self.horizon].transpose(1, 2)

    def embed(self, batch: Batch) -> Tensor:
        """Tokens (B, C, N, dim) of a batch."""
        past, observed = batch["past_values"], batch["past_observed"]
        mean, sd = window_moments(past, observed)
        z = torch.where(observed, (past - mean) / sd.clamp_min(_MIN_SD), 0)
        steps = torch.stack([z, observed.to(z.dtype)], -1).transpose(1, 2)  # (B, C, L, 2)
        steps = F.pad(steps, (0, 0, 0, self.horizon))
        tokens: Tensor = self.values(self.patches(steps)) + self._shared(batch)[:, None]
        return tokens if self.channel is None else tokens + self.channel

    def _shared(self, batch: Batch) -> Tensor:
        """What all channels have in common: time steps, covariates, calendar, static; (B, N, dim)."""
        L = self.lookback
        # Steps are positive; a logarithm keeps a long gap from drowning the rest.
        gaps = torch.log(batch["dt"].clamp_min(1e-3))[..., None]
        past = F.pad(batch["past_covariates"], (0, 0, 0, self.horizon))
        features = self.patches(torch.cat([gaps, past, batch["known_covariates"]], -1).to(gaps.dtype))
        static = batch["static"][:, None].expand(-1, features.shape[1], -1)
        shared: Tensor = self.covariates(torch.cat([features, static], -1))
        shared = shared + F.pad(self.ahead, (0, 0, self.num_past, 0))
        last = self.last_steps(L).to(shared.device)
        columns = list(self.inputs.calendar)
        for name, embedding in self.calendar.items():
            shared = shared + embedding(batch["calendar"][:, last, columns.index(name)])
        return shared

    def patches(self, steps: Tensor) -> Tensor:
        """Steps (…, L + H, F) -> patches (…, N, patch_length·F), with zeros before and after."""
        past, future = steps[..., : self.lookback, :], steps[..., self.lookback :, :]
        size, stride = self.patch_length, self.patch_stride
        before = (self.num_past - 1) * stride + size - self.lookback
        after = self.num_future * size - self.horizon
        past = F.pad(past, (0, 0, before, 0)).unfold(-2, size, stride)
        future = F.pad(future, (0, 0, 0, after)).unfold(-2, size, size)
        return torch.cat([past, future], -3).flatten(-2)

    def last_steps(self, L: int) -> Tensor:
        """The last row of each token's patch, (N,)."""
        past = L - 1 - self.patch_stride * torch.arange(self.num_past - 1, -1, -1)
        future = L - 1 + self.patch_length * torch.arange(1, self.num_future + 1)
        return torch.cat([past, future.clamp_max(L + self.horizon - 1)])


class ForecastModel(nn.Module):
    r"""$\hat y = \text{ridge}(x) + \sigma(x)\, s_h\, r_\theta(x)$, with either part left out if it is None.

    σ is the window's standard deviation and s_h the ridge's relative error at step h (1 without a
    ridge, whose place the window's mean takes). What r holds besides the location depends on the head.
    """

    def __init__(
        self, head: Head, horizon: int, ridge: RidgeHead | None, residual: PatchResidual | None
    ) -> None:
        super().__init__()
        if ridge is None and residual is None:
            raise ValueError("ridge=False and residual=False leave no model: switch one of them on")
        self.head, self.horizon = head, horizon
        self.ridge, self.residual = ridge, residual

    def forward(self, batch: Batch) -> Tensor:
        """The head's parameters of the forecast, (B, H, C, R), in the units of the batch."""
        past = batch["past_values"]
        mean, sd = window_moments(past, batch["past_observed"])
        scale = sd.expand(-1, self.horizon, -1)
        if self.ridge is None:
            location = mean.expand_as(scale)
        else:
            location, scale = self.ridge(batch), scale * self.ridge.spread[:, None]
        if self.residual is None:
            raw = past.new_zeros(*scale.shape, self.head.num_outputs)
        else:
            raw = self.residual(batch).to(scale.dtype)
        forecast: Tensor = self.head(raw, location, scale)
        return forecast
