"""Selective scan on a GPU, in Triton: three launches each way, one where no sequence is longer than a chunk.

All chunks run at once, whatever the batch: a chunk's exponentials are taken a second time to find what it
adds to the state, which costs less than walking along the sequence does on a chip that this would not fill.
The backward pass keeps nothing of the forward pass; the states at the borders of chunks are found again.
"""
# Triton ships no types.
# mypy: allow-untyped-calls

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..ahead_of_time import Build
from ..chunk_table import ChunkTable, chunk_table
from ..gpu import interpreted
from .triton_chunks import carry, chunk_ends, chunk_gradients, chunk_outputs


class Tiles(NamedTuple):
    """Sizes of tiles.

    Attributes:
        run: tokens in a thread.
        warps: of a program, each with a run of its own; together they have a chunk.
        channels: of a program.
        elements: of the state in a program of `carry`.
    """

    run: int
    warps: int
    channels: int
    elements: int

    @property
    def chunk(self) -> int:
        """Tokens a chunk."""
        return self.run * self.warps


def _tiles() -> Tiles:
    """Give the tiles, the same for every capability; small ones where numbers are interpreted one by one."""
    return Tiles(8, 4, 8, 64) if interpreted() else Tiles(8, 8, 32, 256)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        batch, length, self.channels = x.shape
        self.tiles = _tiles()
        self.table: ChunkTable = chunk_table(cu_seqlens, batch, length, self.tiles.chunk, reverse, x.device)
        self.chunks = self.table.chunks.shape[0]
        self.blocks = -(-self.channels // self.tiles.channels)
        self.states = A.shape[1]
        self.tokens = batch * length
        self.single = length <= self.tiles.chunk
        self.A = A.contiguous()
        self.inputs: dict[str, Any] = {
            "x": x.contiguous(),
            "dt": dt.contiguous(),
            "A": self.A,
            "B": B.contiguous(),
            "C": C.contiguous(),
            "z": None if z is None else z.contiguous(),
        }
        self.skip = D.contiguous()
        self.step = -1 if reverse else 1

    def on_chunks(self, kernel: Any, **arguments: Any) -> None:
        """Launch ``kernel`` on every block of channels of every chunk."""
        if self.chunks and self.blocks:
            kernel[(self.chunks, self.blocks)](
                **self.inputs,
                **arguments,
                chunks=self.table.chunks,
                D=self.channels,
                N=self.states,
                step=self.step,
                R=self.tiles.run,
                W=self.tiles.warps,
                CHANNELS=self.tiles.channels,
                num_warps=self.tiles.warps,
            )

    def borders(
        self, dy: Tensor | None, initial: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states before each chunk, the final state, and, with ``dy``, the initial one's gradient.

        With ``dy`` the gradients behind each chunk come along with the states before it.
        """
        directions = 1 if dy is None else 2
        ends = initial.new_empty(directions, self.chunks, self.states, self.channels)
        steps = initial.new_empty(self.chunks, self.channels)
        self.on_chunks(chunk_ends, dy=dy, steps=steps, ends=ends, BACKWARD=dy is not None)
        final = torch.empty_like(initial)
        dinitial = final if dfinal is None else torch.empty_like(initial)
        elements = self.channels * self.states
        if initial.numel():
            carry[(initial.shape[0], triton.cdiv(elements, self.tiles.elements), directions)](
                A=self.A,
                steps=steps,
                ends=ends,
                initial=initial,
                final=final,
                dfinal=initial if dfinal is None else dfinal,
                dinitial=dinitial,
                sequences=self.table.sequences,
                chunks=self.chunks,
                D=self.channels,
                N=self.states,
                ELEMENTS=self.tiles.elements,
                num_warps=self.tiles.warps,
            )
        return ends, final, dinitial


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""
    with torch.cuda.device_of(x):
        call = _Call(x, dt, A, B, C, D, z, cu_seqlens, reverse)
        y, state = x.new_empty(x.shape), state.contiguous()
        if call.single:
            states, final = state, state.clone()
        else:
            states, final, _ = call.borders(None, state, None)
        call.on_chunks(chunk_outputs, skip=call.skip, states=states, y=y, final=final, SINGLE=call.single)
        return y, final


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, dt, A, B, C, D, z and the state."""
    with torch.cuda.device_of(x):
        call = _Call(x, dt, A, B, C, D, z, cu_seqlens, reverse)
        dy, dstate, state = dy.contiguous(), dstate.to(A.dtype).contiguous(), state.contiguous()
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        dz = None if z is None else z.new_empty(z.shape)
        if call.single:
            states, dinitial = state, dstate.clone()
        else:
            states, _, dinitial = call.borders(dy, state, dstate)
        dparameters = A.new_empty(call.chunks, call.states + 1, call.channels)
        dselect = A.new_empty(2, call.blocks, call.tokens, call.states)
        call.on_chunks(
            chunk_gradients,
            skip=call.skip,
            dy=dy,
            states=states,
            dfinal=dstate,
            dx=dx,
            ddt=ddt,
            dz=dz,
            dparameters=dparameters,
            dselect=dselect,
            dinitial=dinitial,
            tokens=call.tokens,
            SINGLE=call.single,
        )
        # One part a chunk or a block of channels, added up in a fixed order.
        total = dparameters.sum(0)
        dB, dC = dselect.sum(1)
        return (
            dx,
            ddt,
            total[:-1].T.contiguous(),
            dB.view(B.shape).to(B.dtype, copy=True),
            dC.view(C.shape).to(C.dtype, copy=True),
            total[-1].clone(),
            dz,
            dinitial,
        )


def builds(capability: int, everything: bool = False) -> list[Build]:
    """List the kernels that the launchers make for a compute capability.

    Args:
        capability: 80, 90 or 100, for all of which they are the same.
        everything: with and without a gate, for float16 too, and the forms of a single chunk.
    """
    del capability
    kinds = ("bf16", "fp32", "fp16") if everything else ("bf16", "fp32")
    found = [_carry()]
    for kind in kinds:
        for gated in (True, False) if everything else (True,):
            for single in (False, True) if everything or kind == "bf16" else (False,):
                found += _on_chunks(kind, gated, single)
    return found


_LENGTHS = {"D": "i32", "N": "i32"}


def _carry() -> Build:
    tiles = _tiles()
    floats = ("A", "steps", "ends", "initial", "final", "dfinal", "dinitial")
    types = dict.fromkeys(floats, "*fp32") | {"sequences": "*i32", "chunks": "i32"} | _LENGTHS
    return Build("carry", carry, types, {"ELEMENTS": tiles.elements}, tiles.warps, 3)


def _on_chunks(kind: str, gated: bool, single: bool) -> list[Build]:
    tiles, x, wide = _tiles(), f"*{kind}", "*fp32"
    # The mixer gives dt in float32, as it does every decay.
    common = {"x": x, "dt": wide, "A": wide, "B": x, "C": x, "chunks": "*i32", "step": "i32"} | _LENGTHS
    common |= {"z": x} if gated else {}
    fixed: dict[str, Any] = {"R": tiles.run, "W": tiles.warps, "CHANNELS": tiles.channels}
    fixed |= {} if gated else {"z": None}
    label = f"{kind}{' gated' if gated else ''}{' single' if single else ''}"

    def build(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Build:
        name = f"{kernel.__name__} {label}{' backward' if constants.get('BACKWARD') else ''}"
        return Build(name, kernel, common | types, fixed | constants, tiles.warps, 3)

    outputs = {"skip": wide, "states": wide, "y": x, "final": wide}
    floats = ("skip", "states", "dfinal", "ddt", "dparameters", "dselect", "dinitial")
    gradients = dict.fromkeys(floats, wide)
    gradients |= {"dy": x, "dx": x, "tokens": "i32"} | ({"dz": x} if gated else {})
    no_dz = {} if gated else {"dz": None}
    found = [
        build(chunk_outputs, outputs, {"SINGLE": single}),
        build(chunk_gradients, gradients, {"SINGLE": single} | no_dz),
    ]
    if not single:
        ends = {"steps": wide, "ends": wide}
        found.append(build(chunk_ends, ends, {"dy": None, "BACKWARD": False}))
        found.append(build(chunk_ends, ends | {"dy": x}, {"BACKWARD": True}))
    return found
