"""What the backends must agree on about each cell."""

from typing import Literal, NamedTuple

Cell = Literal["lstm", "gru", "slstm", "slstm_exp", "elman"]


class Plan(NamedTuple):
    """Sizes of a cell, in vectors of one head.

    Attributes:
        gates: that the input and the recurrent matrices add up to.
        states: carried from token to token; the first is h.
        kept: a token's vectors that the backward reads.
    """

    gates: int
    states: int
    kept: int


CELLS: dict[str, Plan] = {
    "lstm": Plan(4, 2, 5),  # gates i, f, g, o; states h, c; kept σ(i), σ(f), tanh(g), σ(o), c
    "gru": Plan(3, 1, 5),  # gates r, z, n; state h; kept σ(r), σ(z), tanh(n), R_n h + b_n, h
    "slstm": Plan(
        4, 4, 7
    ),  # gates i, f, z, o; states h, c, n, m; kept i', f', tanh(z), σ(o), c, n, d log f/df
    "slstm_exp": Plan(4, 4, 7),
    "elman": Plan(1, 1, 1),  # state and kept h
}
