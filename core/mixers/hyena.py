"""Hyena: gates and long convolutions in turn (Poli et al. 2023, arXiv:2302.10866)."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import long_convolution, long_convolution_step, short_convolution, short_convolution_step
from ..state import State
from .base import Mixer, Pass, pick, upcast


class ImplicitFilters(nn.Module):
    """Filters as functions of the position: a small network of sines under an exponential window.

    ``h_t = e^{−δ t} · MLP(t, cos 2π f_k t, −sin 2π f_k t)`` with t from 0 to 1 over the filter. The decays δ
    are spread over the channels, so that the windows fall to a hundredth between 0.3 and 1.5 filter lengths.

    Args:
        filters: how many.
        length: L, taps of a filter.
        width: of the hidden layers.
        bands: frequencies f_k, from 0 to ``bands − 1``.
        sine: factor of the argument of each sine, at the start.
    """

    def __init__(self, filters: int, length: int, width: int, bands: int, sine: float) -> None:
        super().__init__()
        self.length, self.bands = length, bands
        sizes = [2 * bands + 1, width, width, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.sine = nn.Parameter(torch.full((width,), sine))
        self.last = nn.Linear(width, filters, bias=False)
        self.decay = nn.Parameter(-math.log(1e-2) / torch.linspace(0.3, 1.5, filters))

    def forward(self, taps: int) -> Tensor:
        """Give the first ``taps`` of each filter: ``(filters, taps)``, float32 at least."""
        sine, decay = upcast(self.sine), upcast(self.decay)
        # Phases of many turns have no digits left in half precision.
        with torch.autocast(sine.device.type, enabled=False):
            t = torch.arange(taps, device=sine.device, dtype=sine.dtype)[:, None] / max(self.length - 1, 1)
            angle = 2 * math.pi * t * torch.arange(self.bands, device=sine.device)
            x = torch.cat([t, angle.cos(), -angle.sin()], -1)
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                x = torch.sin(sine * F.linear(x, upcast(layer.weight), upcast(layer.bias)))
            h = F.linear(x, upcast(self.last.weight))
            return (h * torch.exp(-t * decay.abs())).mT


class HyenaMixer(Mixer):
    """Hyena operator; ``(B, T, D)`` to ``(B, T, D)``.

    ``z¹ = v``, ``zⁿ⁺¹ = xⁿ ⊙ (hⁿ * zⁿ + bⁿ ⊙ zⁿ)`` for n ≤ order, then a linear layer; v and the gates xⁿ are
    projections of the input through short convolutions, the filters hⁿ are `ImplicitFilters`. The state is
    the last L−1 of the inputs zⁿ of each long convolution. A step evaluates the filters anew. There are no
    heads; ``heads`` is taken so that all mixers are built alike.

    Args:
        dim: D.
        heads: ignored.
        backend: of the kernels.
        order: how many long convolutions.
        max_length: L, how many tokens back they reach.
        conv: width of the short convolutions.
        filter_width: of the hidden layers of the filters' network.
        bands: frequencies of its positions.
        sine: factor of the arguments of its sines.
    """

    operation = "long_conv"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        order: int = 2,
        max_length: int = 1024,
        conv: int = 3,
        filter_width: int = 64,
        bands: int = 16,
        sine: float = 10.0,
    ) -> None:
        super().__init__(dim, heads, backend)
        sizes = {"order": order, "max_length": max_length, "conv": conv, "filter_width": filter_width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.order, self.length, self.width = order, max_length, conv
        channels = (order + 1) * dim
        self.in_proj = nn.Linear(dim, channels)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv).uniform_(-1, 1) * conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.filters = ImplicitFilters(order * dim, max_length, filter_width, bands, sine)
        self.skip = nn.Parameter(torch.randn(order, dim))
        self.out_proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the convolutions; see `Mixer.mix`."""
        projected, after = self._short(self.in_proj(x), p, pick(state, "conv"))
        z, *gates = projected.chunk(self.order + 1, -1)
        taps: Any = self.length
        if state is None and not p.keep_state:
            # Taps beyond the tokens meet nothing.
            taps = torch.sym_max(torch.sym_min(x.shape[1], self.length), 1)  # type: ignore[no-untyped-call]
        filters = self.filters(taps).unflatten(0, (self.order, self.dim))
        for n, (gate, kernel) in enumerate(zip(gates, filters.unbind(0))):
            name = f"past{n}"
            y, past = self._long(z, kernel, self.skip[n], p, pick(state, name))
            z = gate * y
            if past is not None:
                after[name] = past
        return self.out_proj(z), after

    def _short(self, x: Tensor, p: Pass, state: Tensor | None) -> tuple[Tensor, State]:
        if p.one_token and state is not None:
            y, after = short_convolution_step(x[:, 0], self.conv_weight, self.conv_bias, state)
            return y.unsqueeze(1), {"conv": after}
        y, after = short_convolution(
            x, self.conv_weight, self.conv_bias, initial_state=state, **p.keywords("conv")
        )
        return y, {"conv": after}

    def _long(
        self, z: Tensor, kernel: Tensor, skip: Tensor, p: Pass, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if p.one_token and state is not None:
            y, after = long_convolution_step(z[:, 0], kernel, skip, state)
            return y.unsqueeze(1), after
        keywords = p.keywords("long_conv") | {"return_final_state": p.keep_state}
        result = long_convolution(z, kernel, skip, initial_state=state, **keywords)
        return result if isinstance(result, tuple) else (result, None)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros: nothing came before; see `Mixer.init_state`."""
        channels = (self.order + 1) * self.dim
        state = {"conv": self._zeros(batch, channels, self.width - 1, device=device, dtype=dtype)}
        for n in range(self.order):
            state[f"past{n}"] = self._zeros(batch, self.dim, self.length - 1, device=device, dtype=dtype)
        return state
