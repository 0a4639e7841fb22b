"""Linear recurrence on a GPU: Triton kernels, their launches and tiles.

Forward is one launch that walks along every sequence with its state in registers. Backward is two: the state
before every chunk and its gradient behind it, side by side; then dq, dk, dv and dg of all chunks at once. A
decay of every key channel adds a launch before each, which puts the decays into queries, keys and scores.
Where sequences · heads are too few for the chip, sequences are cut into segments, and two more launches find
the state before each. No sum is left to atomics, so results repeat bit for bit.

Products take bfloat16 operands where q, k and v are bfloat16, and accumulate in float32; so do states, which
are rounded only as operands: the states of the chunks, kept for the gradient, are stored as what a product
takes. Other types are multiplied as tf32, which has float16's digits and float32's range, or as three tf32
products where an input is float32.
"""

# mypy: allow-untyped-calls

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..chunk_table import ChunkTable, chunk_table
from ..gpu import capability, multiprocessors, too_large
from ..matrix_state import new_state
from .triton_builds import builds as builds
from .triton_channel import channel_scores
from .triton_gradient import chunk_gradient, chunk_outputs
from .triton_tiles import Tile, precision_of, tiles_of
from .triton_walk import join_segments, walk_outputs, walk_states

unable = too_large

CHUNK = 64
SHORTEST_SEGMENT = 16
"""Chunks: a shorter segment would not repay the two launches that find the state before it."""


class _Call:
    """One call: its tensors as the kernels take them, the tables of its chunks, its tiles."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
    ) -> None:
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.g = None if decay is None else decay.contiguous()
        B, T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.tokens = B * T
        self.decay = "none" if decay is None else {1: "head", 3: "token", 4: "channel"}[decay.ndim]
        self.layout = (cu_seqlens, B, T)
        self.reverse = reverse
        self.table = self._cut(CHUNK)
        self.sequences, self.chunks = self.table.sequences.shape[0], self.table.chunks.shape[0]
        types = {q.dtype, k.dtype, v.dtype}
        self.narrow = types == {torch.bfloat16}
        compute = capability(q.device)
        self.tiles = tiles_of(compute, self.K, self.V, self.narrow, self.decay == "channel")
        self.known = {
            "H": self.H,
            "K": self.K,
            "V": self.V,
            "K_end": self.K,
            "V_end": self.V,
            "DECAY": self.decay,
            "STEP": -1 if reverse else 1,
            "OPERAND": tl.bfloat16 if self.narrow else tl.float32,
            "PRECISION": precision_of(compute, torch.float32 in types),
        }
        # Queries, keys, scores and decay of a chunk, as the walks take them.
        self.queries, self.keys = self.q, self.k
        self.scores: Tensor | None = None
        self.dscores: Tensor | None = None
        self.whole: Tensor | None = None

    def _cut(self, tokens: int) -> ChunkTable:
        return chunk_table(*self.layout, tokens, self.reverse, self.q.device)

    def operand(self, *shape: int) -> Tensor:
        """Make an uninitialised tensor in the type that products take."""
        return self.q.new_empty(shape, dtype=torch.bfloat16 if self.narrow else torch.float32)

    def matrices(self, count: int) -> Tensor:
        """Make uninitialised float32 states ``(count, H, K, V)``."""
        return self.q.new_empty((count, self.H, self.K, self.V), dtype=torch.float32)

    def launch(self, kernel: Any, count: int, tile: Tile, /, **arguments: Any) -> None:
        """Run ``count · H`` programs of ``kernel``, which also takes what it knows of this call by name."""
        if count == 0 or self.H == 0:
            return
        known = self.known | {"BK": tile.BK, "BV": tile.BV}
        arguments |= {name: value for name, value in known.items() if name in kernel.arg_names}
        kernel[(count * self.H,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)

    def fold_decay(self, scale: float, do: Tensor | None = None) -> None:
        """Put a decay of every key channel into queries, keys and scores; with ``do`` also take theirs."""
        if self.decay != "channel":
            return
        self.queries, self.keys = self.operand(*self.q.shape), self.operand(*self.k.shape)
        self.scores = self.operand(self.tokens, self.H, CHUNK)
        self.dscores = None if do is None else self.operand(self.tokens, self.H, CHUNK)
        self.whole = self.q.new_empty((self.chunks, self.H, self.K), dtype=torch.float32)
        tile = self.tiles.channel
        self.launch(
            channel_scores,
            self.chunks,
            tile,
            q=self.q,
            k=self.k,
            g=self.g,
            v=None if do is None else self.v,
            do=do,
            queries=self.queries,
            keys=self.keys,
            scores=self.scores,
            dscores=self.dscores,
            whole=self.whole,
            chunks=self.table.chunks,
            scale=scale,
        )

    def segments(self, programs: int) -> tuple[ChunkTable | None, int]:
        """Cut sequences into segments, so that ``programs`` a token of each become enough for the chip.

        Returns their table and the tokens of a segment, or ``(None, 0)`` where whole sequences do.
        """
        wanted = 2 * multiprocessors(self.q.device)
        total = self.sequences * self.H * programs
        chunks = max(SHORTEST_SEGMENT, -(-self.chunks * self.H * programs // wanted))
        if 3 * total > wanted or self.chunks <= 2 * chunks * self.sequences:
            return None, 0
        return self._cut(chunks * CHUNK), chunks * CHUNK


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    with torch.cuda.device_of(q):
        call = _Call(q, k, v, decay, cu_seqlens, reverse)
        call.fold_decay(scale)
        o, final = call.v.new_empty(v.shape), new_state(call.v, call.sequences, call.K)
        initial = None if initial_state is None else initial_state.contiguous()
        if call.tiles.fused is None:
            _outputs_of_chunks(call, scale, initial, o, final)
        else:
            _outputs_of_walk(call, scale, initial, o, final)
    return o, final


def _outputs_of_walk(call: _Call, scale: float, initial: Tensor | None, o: Tensor, final: Tensor) -> None:
    """Fill outputs and final states in one launch, or three where sequences are cut into segments."""
    tile, few = call.tiles.fused, call.tiles.few
    assert tile is not None
    assert few is not None
    last: Tensor | None = final
    segments, length = call.segments(-(-call.V // tile.BV))
    count = call.sequences
    if segments is not None:
        initial, _ = _join(call, segments, length, scale, initial, final)
        count, last = segments.chunks.shape[0], None
    elif count * call.H * -(-call.V // tile.BV) < multiprocessors(o.device):
        tile = few
    call.launch(
        walk_outputs,
        count * -(-call.V // tile.BV),
        tile,
        q=call.queries,
        k=call.keys,
        v=call.v,
        g=call.g,
        scores=call.scores,
        whole=call.whole,
        o=o,
        initial=initial,
        final=last,
        sequences=call.table.sequences,
        segments=None if segments is None else segments.chunks,
        length=length,
        scale=scale,
        SPLIT=segments is not None,
    )


def _outputs_of_chunks(call: _Call, scale: float, initial: Tensor | None, o: Tensor, final: Tensor) -> None:
    """Fill final states and the state before every chunk, then the outputs of all chunks at once."""
    states = call.operand(call.chunks, call.H, call.K, call.V)
    _walk(call, scale, initial, final, states)
    tile = call.tiles.outputs
    call.launch(
        chunk_outputs,
        call.chunks * -(-call.V // tile.BV),
        tile,
        q=call.queries,
        k=call.keys,
        v=call.v,
        g=call.g,
        scores=call.scores,
        states=states,
        o=o,
        chunks=call.table.chunks,
        scale=scale,
    )


def backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, decay and initial_state."""
    with torch.cuda.device_of(q):
        call = _Call(q, k, v, decay, cu_seqlens, reverse)
        do, dstate = do.contiguous(), dstate.contiguous()
        call.fold_decay(scale, do)
        dq, dk, dv = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
        initial = None if initial_state is None else initial_state.contiguous()
        dinitial = None if initial is None else torch.empty_like(initial)
        states = call.operand(call.chunks, call.H, call.K, call.V)
        dstates = torch.empty_like(states)
        _walk(call, scale, initial, None, states, do, dstate, dinitial, dstates)
        tile = call.tiles.gradient
        row_tiles = -(-call.K // tile.BK) if call.decay == "channel" else 1
        dg = _new_decay_gradient(call, decay)
        call.launch(
            chunk_gradient,
            call.chunks * (row_tiles + -(-call.V // tile.BV)),
            tile,
            q=call.q,
            k=call.k,
            v=call.v,
            do=do,
            g=call.g,
            keys=call.keys,
            scores=call.scores,
            dscores=call.dscores,
            states=states,
            dstates=dstates,
            dq=dq,
            dk=dk,
            dv=dv,
            dg=dg,
            chunks=call.table.chunks,
            scale=scale,
        )
        if dg is not None and decay is not None and call.decay == "head":
            dg = dg.sum(0).to(decay.dtype)
        return dq, dk, dv, dg, dinitial


def _walk(
    call: _Call,
    scale: float,
    initial: Tensor | None,
    final: Tensor | None,
    states: Tensor,
    do: Tensor | None = None,
    dfinal: Tensor | None = None,
    dinitial: Tensor | None = None,
    dstates: Tensor | None = None,
) -> None:
    """Fill the state before every chunk and, with ``do``, the gradient of the state behind it."""
    tile = call.tiles.states
    tiles = (1 if do is None else 2) * -(-call.K // tile.BK) * -(-call.V // tile.BV)
    segments, length = call.segments(tiles)
    count = call.sequences
    if segments is not None:
        initial, dfinal = _join(call, segments, length, scale, initial, final, do, dfinal, dinitial)
        count, final, dinitial = segments.chunks.shape[0], None, None
    call.launch(
        walk_states,
        count * tiles,
        tile,
        k=call.keys,
        v=call.v,
        q=None if do is None else call.queries,
        do=do,
        g=call.g,
        whole=call.whole,
        initial=initial,
        dfinal=dfinal,
        states=states,
        dstates=dstates,
        final=final,
        dinitial=dinitial,
        total=None,
        sequences=call.table.sequences,
        segments=None if segments is None else segments.chunks,
        length=length,
        scale=scale,
        SPLIT=segments is not None,
    )


def _join(
    call: _Call,
    segments: ChunkTable,
    length: int,
    scale: float,
    initial: Tensor | None,
    final: Tensor | None,
    do: Tensor | None = None,
    dfinal: Tensor | None = None,
    dinitial: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the state before every segment, and with ``do`` also the gradient of the state behind it."""
    tile = call.tiles.states
    both = 1 if do is None else 2
    tiles = both * -(-call.K // tile.BK) * -(-call.V // tile.BV)
    count = segments.chunks.shape[0]
    parts = call.matrices(count)
    dparts = None if do is None else call.matrices(count)
    total = None
    if call.decay != "none":
        channels = (call.K,) if call.decay == "channel" else ()
        total = parts.new_empty((count, call.H, *channels))
    call.launch(
        walk_states,
        count * tiles,
        tile,
        k=call.keys,
        v=call.v,
        q=None if do is None else call.queries,
        do=do,
        g=call.g,
        whole=call.whole,
        initial=None,
        dfinal=None,
        states=None,
        dstates=None,
        final=parts,
        dinitial=dparts,
        total=total,
        sequences=call.table.sequences,
        segments=segments.chunks,
        length=length,
        scale=scale,
        SPLIT=True,
    )
    call.launch(
        join_segments,
        call.sequences * tiles,
        tile,
        parts=parts,
        dparts=dparts,
        total=total,
        initial=initial,
        dfinal=dfinal,
        final=final,
        dinitial=dinitial,
        sequences=segments.sequences,
    )
    return parts, dparts


def _new_decay_gradient(call: _Call, decay: Tensor | None) -> Tensor | None:
    """Make what the kernel writes of the gradient of ``decay``: itself, or a sum a chunk and head."""
    if decay is None:
        return None
    if call.decay == "head":
        return call.q.new_empty((call.chunks, call.H), dtype=torch.float32)
    return call.q.new_empty(decay.shape, dtype=decay.dtype)
