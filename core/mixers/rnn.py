"""Gated non-linear recurrences with head-wise recurrent matrices: LSTM and GRU."""

from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels import gated_rnn, gated_rnn_step
from ..state import State
from .base import Mixer, Pass, pick

GATES = {"lstm": 4, "gru": 3}
STATES = {"lstm": 2, "gru": 1}


class RNNMixer(Mixer):
    """LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014); ``(B, T, D)`` to ``(B, T, D)``.

    The recurrent matrix is block-diagonal over heads, as in xLSTM (arXiv:2405.04517); ``heads=1`` is the
    textbook cell. Recurrent matrices start orthogonal, the LSTM's forget bias at one.

    Args:
        dim: D.
        heads: H.
        cell: which.
        backend: of the kernels.
    """

    operation = "rnn"

    def __init__(self, dim: int, heads: int, cell: Literal["lstm", "gru"], backend: str = "auto") -> None:
        super().__init__(dim, heads, backend)
        self.cell, self.size, gates = cell, dim // heads, GATES[cell]
        # The GRU's reset gate lies between the two biases of its candidate; the LSTM needs only one.
        self.in_proj = nn.Linear(dim, gates * dim, bias=cell == "gru")
        self.recurrent_weight = nn.Parameter(torch.empty(gates, heads, self.size, self.size))
        self.recurrent_bias = nn.Parameter(torch.zeros(gates, heads, self.size))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            for matrix in self.recurrent_weight.flatten(0, 1):
                nn.init.orthogonal_(matrix)
            if cell == "lstm":
                self.recurrent_bias[1] = 1.0

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the cell; see `Mixer.mix`."""
        gates = self.in_proj(x).unflatten(-1, (GATES[self.cell], self.heads, self.size))
        R, b, before = self.recurrent_weight, self.recurrent_bias, pick(state, "hidden")
        if p.one_token and before is not None:
            h, hidden = gated_rnn_step(gates[:, 0], R, b, before, cell=self.cell)
            h = h.unsqueeze(1)
        else:
            h, hidden = gated_rnn(gates, R, b, cell=self.cell, initial_state=before, **p.keywords("rnn"))
        return self.out_proj(h.flatten(-2)), {"hidden": hidden}

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; see `Mixer.init_state`."""
        shape = (batch, STATES[self.cell], self.heads, self.size)
        return {"hidden": self._zeros(*shape, device=device, dtype=dtype)}
