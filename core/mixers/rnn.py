"""Gated non-linear recurrences with head-wise recurrent matrices: LSTM, GRU, Elman's network and sLSTM."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import gated_rnn, gated_rnn_step
from ...kernels.rnn.cells import CELLS, Cell
from ..norms import GatedNorm
from ..state import State
from .base import Mixer, Pass, ShortConvolution, pick


class RecurrentMixer(Mixer):
    """What the cells share: the recurrent half, whose matrices start orthogonal, and the projection of h."""

    operation = "rnn"

    def _add_recurrence(self, cell: Cell) -> None:
        self.cell, self.size, gates = cell, self.dim // self.heads, CELLS[cell].gates
        self.recurrent_weight = nn.Parameter(torch.empty(gates, self.heads, self.size, self.size))
        self.recurrent_bias = nn.Parameter(torch.zeros(gates, self.heads, self.size))
        self.out_proj = nn.Linear(self.dim, self.dim, bias=False)
        with torch.no_grad():
            for matrix in self.recurrent_weight.flatten(0, 1):
                nn.init.orthogonal_(matrix)

    def _run(self, gates: Tensor, p: Pass, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the cell on ``gates`` (B, T, G·D): h ``(B, T, H, D/H)`` and the state after the last token."""
        x = gates.view(*gates.shape[:-1], CELLS[self.cell].gates, self.heads, self.size)
        R, b = self.recurrent_weight, self.recurrent_bias
        if p.one_token and before is not None:
            h, after = gated_rnn_step(x[:, 0], R, b, before, cell=self.cell)
            return h.unsqueeze(1), after
        h, after = gated_rnn(x, R, b, cell=self.cell, initial_state=before, **p.keywords("rnn"))
        return h, after

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros; see `Mixer.init_state`."""
        shape = (batch, CELLS[self.cell].states, self.heads, self.size)
        return {"hidden": self._zeros(*shape, device=device, dtype=dtype)}


class RNNMixer(RecurrentMixer):
    """LSTM (Hochreiter & Schmidhuber 1997), GRU (Cho et al. 2014) or Elman's network (1990).

    ``(B, T, D)`` to ``(B, T, D)``. The recurrent matrix is block-diagonal over heads, as in xLSTM
    (arXiv:2405.04517); ``heads=1`` is the textbook cell. The LSTM's forget bias starts at one.

    Args:
        dim: D.
        heads: H.
        cell: which.
        backend: of the kernels.
    """

    def __init__(
        self, dim: int, heads: int, cell: Literal["lstm", "gru", "elman"], backend: str = "auto"
    ) -> None:
        super().__init__(dim, heads, backend)
        # The GRU's reset gate lies between the two biases of its candidate; the others need only one.
        self.in_proj = nn.Linear(dim, CELLS[cell].gates * dim, bias=cell == "gru")
        self._add_recurrence(cell)
        if cell == "lstm":
            with torch.no_grad():
                self.recurrent_bias[1] = 1.0

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the cell; see `Mixer.mix`."""
        h, hidden = self._run(self.in_proj(x), p, pick(state, "hidden"))
        return self.out_proj(h.flatten(-2)), {"hidden": hidden}


class SLSTMMixer(RecurrentMixer):
    """sLSTM of Beck et al., *xLSTM* (2024), arXiv:2405.04517, eq. 8–17; ``(B, T, D)`` to ``(B, T, D)``.

    ``c_t = f c_{t-1} + e^i tanh(z)``, ``n_t = f n_{t-1} + e^i``, ``h_t = σ(o) c_t / n_t``, with gates that
    see the input and ``h_{t-1}`` of their head, held in range by a running maximum. As in the paper's block
    (figure 10) i and f see the input through a short convolution with SiLU, and every head's h is normalised;
    its up-projection is left to the block's channel mixer. Memories of different heads start with different
    lengths: ``log f`` begins at log σ(3) in the first head and at log σ(6) in the last.

    Args:
        dim: D.
        heads: H.
        backend: of the kernels.
        forget: ``"sigmoid"``, or ``"exp"`` for ``f = e^f``.
        conv: width of the convolution; 0 leaves it out.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        *,
        forget: Literal["sigmoid", "exp"] = "sigmoid",
        conv: int = 4,
    ) -> None:
        super().__init__(dim, heads, backend)
        cells: dict[str, Cell] = {"sigmoid": "slstm", "exp": "slstm_exp"}
        if forget not in cells:
            raise ValueError(f"backbone.options: forget = {forget!r}: choose one of {', '.join(cells)}")
        self.conv = ShortConvolution(dim, conv, bias=True) if conv else None
        self.gate_proj = nn.Linear(dim, 2 * dim, bias=False)  # i, f
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)  # z, o
        self._add_recurrence(cells[forget])
        self.norm = GatedNorm(heads, self.size, "layer", "none")
        rate = torch.linspace(3.0, 6.0, heads)[:, None]
        with torch.no_grad():
            self.recurrent_bias[1] = rate if forget == "sigmoid" else F.logsigmoid(rate)

    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Run the convolution and the cell; see `Mixer.mix`."""
        after: State = {}
        seen = x
        if self.conv is not None:
            seen, after["conv"] = self.conv(x, p, pick(state, "conv"))
        gates = torch.cat([self.gate_proj(seen), self.in_proj(x)], -1)
        h, after["hidden"] = self._run(gates, p, pick(state, "hidden"))
        return self.out_proj(self.norm(h)), after

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Zeros, with which nothing is remembered; see `Mixer.init_state`."""
        state = super().init_state(batch, device, dtype)
        if self.conv is not None:
            width = self.conv.weight.shape[1]
            state["conv"] = self._zeros(batch, self.dim, width - 1, device=device, dtype=dtype)
        return state
