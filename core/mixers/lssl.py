"""LSSL: linear state space layers with a dense HiPPO matrix (Gu et al. 2021, arXiv:2110.13985)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import hippo
from ..state import State
from ..system import System
from .base import Pass, upcast
from .chunks import Chunks
from .s4d import log_uniform
from .state_space import ChunkMatrices, StateSpaceMixer, doubled

MEASURES = {"legs": hippo.legs, "legt": hippo.legt}


class LSSLMixer(StateSpaceMixer):
    """Dense state space layer; ``(B, T, D)`` to ``(B, T, D)``.

    ``ẋ = A x + B u``, ``y = C x + D u`` for every channel, discretised by the bilinear rule with a step Δ a
    channel; then GELU and a linear layer. A and B are those of HiPPO and shared by the channels; powers of Ā
    and the Krylov kernel come by doubling. A model trained at one sampling rate runs at another by ``rate``.
    There are no heads; ``heads`` is taken so that all mixers are built alike.

    Args:
        dim: D.
        heads: ignored.
        backend: of the kernels.
        state_size: N.
        measure: ``"legs"`` (all of the past) or ``"legt"`` (a window).
        learn_A: train A.
        learn_dt: train the steps Δ.
        dt_min, dt_max: range of Δ, one a channel, log-uniform.
        rate: factor of Δ, for inputs sampled ``1 / rate`` times as often.
        chunk: tokens a chunk.
    """

    operation = "long_conv"

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        state_size: int = 64,
        measure: Literal["legs", "legt"] = "legs",
        learn_A: bool = False,
        learn_dt: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
        chunk: int = 64,
    ) -> None:
        super().__init__(dim, heads, backend, chunk)
        if state_size < 1:
            raise ValueError(f"state_size={state_size} must be at least 1")
        if measure not in MEASURES:
            raise ValueError(f"backbone.options: measure = {measure!r}: choose one of {', '.join(MEASURES)}")
        if not rate > 0:
            raise ValueError(f"rate={rate} must be above 0")
        self.states, self.rate = state_size, rate
        A, B = (t.float() for t in MEASURES[measure](state_size))
        self.A: Tensor
        self.B: Tensor
        self.log_dt: Tensor
        self._hold("A", A, learn_A)
        self._hold("B", B, False)
        self._hold("log_dt", log_uniform(dim, dt_min, dt_max), learn_dt)
        self.state_proj = nn.Parameter(torch.randn(dim, state_size))
        self.out_proj = nn.Linear(dim, dim)

    def _hold(self, name: str, value: Tensor, learn: bool) -> None:
        if learn:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ā ``(D, N, N)``, B̄ ``(D, N)`` and C ``(D, N)``."""
        step = self.rate * upcast(self.log_dt).exp()
        return *hippo.bilinear(upcast(self.A), upcast(self.B), step), upcast(self.state_proj)

    def _matrices(self, size: int) -> ChunkMatrices:
        A, B, C = self._discrete()
        columns, powers = doubled(A, B, size)
        rows, _ = doubled(A.mT, torch.einsum("dn,dnm->dm", C, A), size)
        kernel = torch.einsum("dn,dnc->dc", C, columns)
        return ChunkMatrices(kernel, rows.mT, columns.flip(-1), powers)

    def _carry(self, added: Tensor, m: ChunkMatrices, chunks: Chunks, initial: Tensor, p: Pass) -> Tensor:
        power = m.powers[-1]
        entering = F.pad(initial, (0, 0, 0, 0, 0, 1))[chunks.sequence]
        first = (chunks.place == 0)[:, None, None]
        h = added + torch.where(first, _apply(power, entering), 0)
        # Each round adds what came from twice as far.
        distance = 1
        reach = h.shape[0] if chunks.bounds is not None else h.shape[0] // max(chunks.batch, 1)
        while distance < reach:
            near = (chunks.place >= distance)[:, None, None]
            h = h + torch.where(near, _apply(power, h.roll(distance, 0)), 0)
            distance *= 2
            if distance < reach:
                power = power @ power
        return h

    def _advance(self, state: Tensor, m: ChunkMatrices, steps: Tensor) -> Tensor:
        for k, power in enumerate(m.powers):
            state = torch.where(((steps >> k) & 1 > 0)[:, None, None], _apply(power, state), state)
        return state

    def _one(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A, B, C = self._discrete()
        state = _apply(A, state) + B * x[..., None]
        return (C * state).sum(-1), state

    def _project(self, y: Tensor) -> Tensor:
        z: Tensor = self.out_proj(F.gelu(y))
        return z

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; see `Mixer.init_state`."""
        return {"hidden": self._zeros(batch, self.dim, self.states, device=device, dtype=dtype)}

    def system(self, x: Tensor) -> System:
        """Give A, B, C, u with a head for every channel and V = 1."""
        A, B, C = self._discrete()
        shape = (*x.shape, self.states)
        return System(A.expand(*shape, -1), B.expand(shape), C.expand(shape), upcast(x)[..., None])


def _apply(power: Tensor, state: Tensor) -> Tensor:
    """Multiply every state ``(M, D, N)`` by its channel's matrix ``(D, N, N)``."""
    return torch.einsum("dnk,mdk->mdn", power, state)
