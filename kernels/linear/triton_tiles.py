"""Tiles of the Triton kernels of `linear_recurrence`, chosen so that no thread spills a register.

One table by architecture and head size and no tuning at run time; what each build takes of the machine is
printed by `mainstem.kernels.ahead_of_time`.
"""

from typing import NamedTuple

from ..gpu import padded


class Tile(NamedTuple):
    """Tile of the head sizes, warps a program and stages of its pipeline."""

    BK: int
    BV: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of every kernel.

    Attributes:
        fused: of `walk_outputs`, or ``None`` where a state of K rows is too much for the registers.
        few: the same where programs are fewer than multiprocessors.
        outputs: of `chunk_outputs`, where there is no ``fused``.
        states: of `walk_states` and `join_segments`.
        gradient: of `chunk_gradient`.
        channel: of `channel_scores`.
    """

    fused: Tile | None
    few: Tile | None
    outputs: Tile
    states: Tile
    gradient: Tile
    channel: Tile


def tiles_of(compute: int, K: int, V: int, narrow: bool, by_channel: bool) -> Tiles:
    """Tiles for these head sizes; ``narrow`` where operands are bfloat16."""
    PK, PV = padded(K), padded(V)

    def tile(rows: int, columns: int, warps: int, stages: int) -> Tile:
        return Tile(min(rows, PK), min(columns, PV), warps, stages)

    if not narrow:
        walk = tile(32, 16, 8, 1) if PK <= 32 else None
        return Tiles(
            fused=walk,
            few=walk,
            outputs=tile(32, 32, 8, 1),
            states=tile(32, 32, 8, 1) if compute < 90 else tile(64, 64, 4, 1),
            gradient=tile(16, 16, 8, 1),
            channel=tile(16, 32, 8, 1),
        )
    if by_channel:
        gradient = tile(16 if compute < 90 else 32, 64, 8, 2)
    elif compute < 90:  # without wgmma operands pass through registers
        gradient = tile(32, 32, 8, 2)
    else:  # masks of the columns take registers too
        gradient = tile(64, 64, 4 if compute == 90 and (PK, PV) == (K, V) else 8, 2)
    columns = 32 if compute < 90 or (compute > 90 and by_channel and PK <= 64) else 64
    return Tiles(
        fused=tile(128, columns, 4, 2) if PK <= 128 else None,
        few=tile(128, 32, 4, 2) if PK <= 128 else None,
        outputs=tile(64, 64, 4, 2),
        states=tile(64, 64, 4, 2),
        gradient=gradient,
        channel=tile(32, 64, 8, 1),
    )


def precision_of(compute: int, wide: bool) -> str:
    """``input_precision`` of the products; an A100 lacks the registers for float32 in three tf32 products."""
    return "tf32" if not wide else "tf32x3" if compute >= 90 else "ieee"
