"""Generalised delta rule on a GPU, in Triton: two launches forwards, four backwards, whatever the decay.

Forwards, `chunk_systems` makes what does not depend on the state, for all chunks at once, and `scan_forward`
carries the state from chunk to chunk and reads it on the way, so that no state is written. Backwards,
`scan_backward` runs the states forwards and their gradients backwards side by side, and `chunk_products` and
`chunk_gradients` do the rest for all chunks at once.
"""
# Triton ships no types.
# mypy: allow-untyped-calls

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..ahead_of_time import Build
from ..chunk_table import ChunkTable, chunk_table
from ..gpu import capability, dot_precision, padded, too_large
from ..matrix_state import fold_decay_grad, new_state, token_decay
from .triton_gradient import chunk_gradients, chunk_products
from .triton_scan import scan_backward, scan_forward
from .triton_systems import chunk_systems

unable = too_large


class Tiles(NamedTuple):
    """Sizes of tiles, warps and pipeline stages of the launches for one head size.

    Attributes:
        chunk: tokens a chunk.
        key: key size, rounded up to a power of two: the height of the state.
        systems: key channels at a time and warps in `chunk_systems`.
        scans: key channels a product and warps in `scan_forward` and `scan_backward`.
        gradients: key channels and value channels at a time, and warps, in `chunk_products` and
        `chunk_gradients`. values: value channels a program of the scans.
    """

    chunk: int
    key: int
    systems: tuple[int, int]
    scans: tuple[int, int]
    gradients: tuple[int, int, int]
    values: int


def _tiles(capability: int, K: int, V: int, wide: bool) -> Tiles:
    """Tiles for key and value sizes K and V; ``wide`` for float32."""
    key, value = padded(K), padded(V)
    if wide:
        gradients = (16, 32, 8) if value > 32 else (16, 16 if capability == 100 else value, 4)
    else:
        gradients = (16, min(value, 32 if key > 128 else 64), 4)
    return Tiles(
        # Longer chunks run out of registers here.
        chunk=16 if wide or key > 128 or key == 16 or K % 16 or V % 16 else 32,
        key=key,
        systems=(16, 4),
        scans=(min(key, 32), 8 if key > 128 else 4),
        gradients=gradients,
        values=16 if wide else min(value, 32),
    )


class _Call(NamedTuple):
    """One call's tensors in one type and contiguous, and what all its launches share."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    decay: Tensor
    initial: Tensor | None
    table: ChunkTable
    tiles: Tiles
    step: int
    precision: str

    @property
    def scan(self) -> dict[str, Any]:
        """What both scans take of the call."""
        part, warps = self.tiles.scans
        return {
            "v": self.v,
            "initial": self.initial,
            "sequences": self.table.sequences,
            "V": self.v.shape[-1],
            "BK": self.tiles.key,
            "D": part,
            "BV": self.tiles.values,
            "num_warps": warps,
            "num_stages": 2,
        }

    def shared(self, scale: float) -> dict[str, Any]:
        """What every launch takes of the call."""
        return {
            "scale": scale,
            "step": self.step,
            "H": self.q.shape[2],
            "K": self.q.shape[-1],
            "C": self.tiles.chunk,
            "PRECISION": self.precision,
        }

    @property
    def programs(self) -> int:
        """Number of scans: sequences × heads × tiles of value channels."""
        tiles: int = triton.cdiv(self.v.shape[-1], self.tiles.values)
        return len(self.table.sequences) * self.q.shape[2] * tiles


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(o, final_state, retrieved)``; retrieved ``(B, T, H, V)`` is ``r_t = S_{t-1}ᵀ a_t``."""
    call = _prepare(q, k, v, a, b, decay, cu_seqlens, initial_state, reverse)
    o, retrieved = v.new_empty(v.shape), v.new_empty(v.shape, dtype=torch.float32)
    final = new_state(v, len(call.table.sequences), q.shape[-1])
    with torch.cuda.device_of(q):
        systems = _systems(call, scale)
        if call.programs:
            scan_forward[(call.programs,)](
                **systems, **call.scan, **call.shared(scale), o=o, retrieved=retrieved, final=final
            )
    return o, final, retrieved


def backward(
    do: Tensor,
    dstate: Tensor,
    retrieved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, a, b, decay and initial_state."""
    call = _prepare(q, k, v, a, b, decay, cu_seqlens, initial_state, reverse)
    H, K, V, tiles = q.shape[2], q.shape[-1], v.shape[-1], call.tiles
    C, dtype = tiles.chunk, call.q.dtype
    do, retrieved = do.to(dtype).contiguous(), retrieved.contiguous()
    # Factors of decays are as large as exp(30), which float16 does not hold.
    wide = torch.float32 if dtype == torch.float16 else dtype
    dq, dk, dv, da, db = (x.new_empty(x.shape) for x in (q, k, v, a, b))
    dg = None if decay is None else q.new_empty(q.shape, dtype=torch.float32)
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    dretrieved = torch.empty_like(retrieved)
    states, dstates = (call.k.new_empty((len(call.table.chunks), H, K, V)) for _ in range(2))
    with torch.cuda.device_of(q):
        systems = _systems(call, scale)
        kept: dict[str, Any] = {
            "retrieved": retrieved,
            "do": do,
            "dretrieved": dretrieved,
            "states": states,
            "dstates": dstates,
            **call.shared(scale),
        }
        if call.programs:
            scan_backward[(2 * call.programs,)](
                **systems, **call.scan, **kept, dstate=dstate.contiguous(), dv=dv, dinitial=dinitial
            )
        if len(states) * H:
            key, value, warps = tiles.gradients
            products = {
                name: q.new_empty((len(states), H, C, C), dtype=wide) for name in ("fb", "gb", "fk", "gk")
            }
            kept |= {
                "v": call.v,
                "chunks": call.table.chunks,
                "V": V,
                "BV": value,
                "num_warps": warps,
                "num_stages": 2,
            }
            chunk_products[(len(states) * H,)](
                **{name: x for name, x in kept.items() if name not in ("states", "dstates", "K")}, **products
            )
            chunk_gradients[(len(states) * H * triton.cdiv(K, key),)](
                **kept,
                **products,
                q=call.q,
                k=call.k,
                a=call.a,
                b=call.b,
                decay=call.decay,
                whole=systems["whole"],
                dq=dq,
                dk=dk,
                da=da,
                db=db,
                dg=dg,
                BK=key,
            )
    ddecay = None if decay is None or dg is None else fold_decay_grad(dg, decay)
    return dq, dk, dv, da, db, ddecay, dinitial


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> _Call:
    inputs = (q, k, v, a, b)
    dtype = inputs[0].dtype
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    g = token_decay(decay, q)
    tiles = _tiles(capability(q.device), q.shape[-1], v.shape[-1], dtype == torch.float32)
    q, k, v, a, b = (x.to(dtype).contiguous() for x in inputs)
    return _Call(
        q,
        k,
        v,
        a,
        b,
        q.new_zeros(q.shape, dtype=torch.float32) if g is None else g.expand(q.shape).contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        chunk_table(cu_seqlens, q.shape[0], q.shape[1], tiles.chunk, reverse, q.device),
        tiles,
        -1 if reverse else 1,
        dot_precision(dtype),
    )


def _systems(call: _Call, scale: float) -> dict[str, Tensor]:
    """Launch `chunk_systems`; return what it wrote, as the scans name it."""
    q, C = call.q, call.tiles.chunk
    shape = (len(call.table.chunks), q.shape[2])
    made = {name: q.new_empty((*shape, C, C)) for name in ("inverse", "taken", "scores_b", "scores_k")}
    made |= {name: torch.empty_like(q) for name in ("q_start", "a_start", "b_end", "k_end")}
    made["whole"] = q.new_empty((*shape, q.shape[-1]), dtype=torch.float32)
    if shape[0] * shape[1]:
        key, warps = call.tiles.systems
        chunk_systems[(shape[0] * shape[1],)](
            q=q,
            k=call.k,
            a=call.a,
            b=call.b,
            decay=call.decay,
            **made,
            chunks=call.table.chunks,
            **call.shared(scale),
            BK=key,
            num_warps=warps,
            num_stages=2,
        )
    return made


def builds(capability: int, everything: bool = False) -> list[Build]:
    """List the kernels that the launchers make for a compute capability.

    Args:
        capability: 80, 90 or 100.
        everything: every head size and type, and not only the usual ones.
    """
    if everything:
        sizes = (16, 32, 60, 64, 96, 128, 256)
        calls = [(size, kind) for size in sizes for kind in ("bf16", "fp32")]
    else:
        calls = [(128, "bf16"), (64, "fp32")]
    return [build for call in calls for build in _builds(capability, *call)]


def _builds(capability: int, size: int, kind: str) -> list[Build]:
    tiles = _tiles(capability, size, size, kind == "fp32")
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    x, wide = f"*{kind}", "*fp32"
    common = {"step": "i32", "H": "i32", "scale": "fp32"}
    inputs = dict.fromkeys(("q", "k", "a", "b"), x) | {"decay": wide, "chunks": "*i32"}
    squares = dict.fromkeys(("inverse", "taken", "scores_b", "scores_k"), x)
    made = squares | dict.fromkeys(("q_start", "a_start", "b_end", "k_end"), x) | {"whole": wide}
    scans = made | {"initial": wide, "sequences": "*i32", "v": x, "retrieved": wide}
    values = {"retrieved": wide, "dretrieved": wide, "do": x, "v": x}
    states = values | {"states": x, "dstates": x}
    products = dict.fromkeys(("fb", "gb", "fk", "gk"), x)
    part, scan_warps = tiles.scans
    key, value, warps = tiles.gradients
    scan = {"V": size, "BK": tiles.key, "D": part, "BV": tiles.values}
    written = dict.fromkeys(("dq", "dk", "da", "db"), x) | {"whole": wide, "dg": wide}
    launches: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
        (chunk_systems, inputs | made, {"BK": tiles.systems[0]}, tiles.systems[1]),
        (scan_forward, scans | {"o": x, "final": wide}, scan, scan_warps),
        (scan_backward, scans | states | {"dv": x, "dstate": wide, "dinitial": wide}, scan, scan_warps),
        (chunk_products, values | products | {"chunks": "*i32"}, {"V": size, "BV": value}, warps),
        (chunk_gradients, inputs | states | products | written, {"V": size, "BK": key, "BV": value}, warps),
    ]
    fixed = {"K": size, "C": tiles.chunk, "PRECISION": dot_precision(dtype)}
    found = []
    for kernel, types, constants, warps in launches:
        # `chunk_products` knows nothing of the keys.
        all_constants = {name: y for name, y in (fixed | constants).items() if name in kernel.arg_names}
        tile = "".join(f" {name}{constants[name]}" for name in ("BK", "BV") if name in constants)
        name = f"{kernel.__name__} {kind} {size}{tile}"
        found.append(Build(name, kernel, common | types, all_constants, warps, 2))
    return found
