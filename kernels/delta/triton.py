"""Delta rule on a GPU, in Triton: two launches forwards and three backwards (four with a decay a channel).

Forwards, `chunk_systems` makes what does not depend on the state, for all chunks at once, and `scan_forward`
carries the state from chunk to chunk and reads it on the way, so that no state is written. Backwards, after
`chunk_systems` once more, `scan_backward` runs the states forwards and their gradients backwards side by
side, and `chunk_gradients` does the rest for all chunks at once.
"""
# Triton ships no types.
# mypy: allow-untyped-calls

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..ahead_of_time import Build
from ..chunk_table import ChunkTable, chunk_table
from ..gpu import capability, dot_precision, multiprocessors, padded, too_large
from ..matrix_state import new_state
from .triton_channel import channel_gradients, score_gradients
from .triton_gradient import chunk_gradients
from .triton_scan import scan_backward, scan_forward
from .triton_systems import CHANNEL, HEAD, NONE, chunk_systems

unable = too_large


class Scan(NamedTuple):
    """Value channels a program, warps, pipeline stages and most registers a thread of one scan."""

    value: int
    warps: int
    stages: int
    maxnreg: int | None = None


class Tiles(NamedTuple):
    """Sizes of tiles, warps and pipeline stages of the launches for one head size.

    Attributes:
        chunk: tokens a chunk.
        key: key size, rounded up to a power of two.
        systems: key channels at a time and warps in `chunk_systems`.
        forward: `scan_forward` where programs are many, and where they are few.
        backward: `scan_backward`, likewise.
        gradients: key channels and value channels at a time, warps and stages of the last launch.
        scores: value channels at a time and warps in `score_gradients`.
        separate: whether the gradients of the scores are a launch of their own, for want of registers.
    """

    chunk: int
    key: int
    systems: tuple[int, int]
    forward: tuple[Scan, Scan]
    backward: tuple[Scan, Scan]
    gradients: tuple[int, int, int, int]
    scores: tuple[int, int]
    separate: bool


def _tiles(capability: int, K: int, V: int, wide: bool, channel: bool) -> Tiles:
    """Tiles for key and value sizes K and V; ``wide`` for float32, ``channel`` for a decay a channel.

    Every line was chosen by what the compiler reports: the largest tile whose registers do not spill.
    """
    key, value = padded(K), padded(V)
    old = capability < 90
    if wide:
        forward = Scan(min(value, 16), 8, 1)
        many = few = forward if old else Scan(min(value, 16), 4, 2)
    elif key > 128:
        forward = Scan(min(value, 32), 8, 1 if old or channel else 2)
        many = few = Scan(min(value, 16), 8, 1) if channel else forward
    else:
        few = Scan(min(value, 32), 8 if old and key > 64 else 4, 2)
        many = few if old else Scan(min(value, 64), 8, 2, 255 if capability == 100 and key == 64 else None)
        forward = few if channel else many
    if channel:
        gradients = (min(key, 16), min(value, 16 if wide else 32), 8, 1)
    elif wide:
        gradients = (min(key, 16), 16, 4, 2) if old else (min(key, 16), min(value, 32), 8, 1)
    else:
        gradients = (
            64 if K == 128 and capability == 90 else min(key, 16 if K % 16 and old else 32),
            min(value, 32 if old else 64),
            8,
            2,
        )
    return Tiles(
        chunk=(32 if key > 32 and channel else 16) if wide else 64,
        key=key,
        systems=(min(key, 32 if channel or wide else 64), 8 if channel else 4),
        forward=(forward, forward if wide or key > 128 else few),
        backward=(many, few),
        gradients=gradients,
        scores=(min(value, 16 if wide else 64), 4),
        separate=wide or channel,
    )


class _Call(NamedTuple):
    """One call's tensors in one type and contiguous, and what all its launches share."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None
    initial: Tensor | None
    table: ChunkTable
    tiles: Tiles
    mode: int
    step: int
    precision: str

    @property
    def constants(self) -> dict[str, Any]:
        return {"DECAY": self.mode, "PRECISION": self.precision, "C": self.tiles.chunk, "K": self.q.shape[-1]}

    def scan(self, choices: tuple[Scan, Scan]) -> tuple[Scan, int]:
        """Choose narrow programs where wide ones would leave multiprocessors idle; count the programs."""
        heads = len(self.table.sequences) * self.q.shape[2]
        many, few = choices
        programs = heads * triton.cdiv(self.v.shape[-1], many.value)
        if programs >= multiprocessors(self.q.device):
            return many, programs
        return few, heads * triton.cdiv(self.v.shape[-1], few.value)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(o, final_state, error)``; error ``(B, T, H, V)`` is what a token did not yet predict."""
    call = _prepare(q, k, v, beta, decay, cu_seqlens, initial_state, reverse)
    o, error = v.new_empty(v.shape), v.new_empty(v.shape, dtype=torch.float32)
    final = new_state(v, len(call.table.sequences), q.shape[-1])
    with torch.cuda.device_of(q):
        systems = _systems(call, scale)
        scan, programs = call.scan(call.tiles.forward)
        if programs:
            scan_forward[(programs,)](
                **systems,
                v=call.v,
                beta=call.beta,
                initial=call.initial,
                o=o,
                error=error,
                final=final,
                sequences=call.table.sequences,
                scale=scale,
                step=call.step,
                H=q.shape[2],
                **call.constants,
                V=v.shape[-1],
                BK=call.tiles.key,
                BV=scan.value,
                num_warps=scan.warps,
                num_stages=scan.stages,
                maxnreg=scan.maxnreg,
            )
    return o, final, error


def backward(
    do: Tensor,
    dstate: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, beta, decay and initial_state."""
    call = _prepare(q, k, v, beta, decay, cu_seqlens, initial_state, reverse)
    H, K, V, tiles = q.shape[2], q.shape[-1], v.shape[-1], call.tiles
    do, dstate, error = do.to(call.q.dtype).contiguous(), dstate.contiguous(), error.contiguous()
    dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, v, beta))
    ddecay = None if decay is None else decay.new_empty(decay.shape)
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    states, dstates = (call.k.new_empty((len(call.table.chunks), H, K, V)) for _ in range(2))
    with torch.cuda.device_of(q):
        systems = _systems(call, scale)
        shared = {"scale": scale, "step": call.step, "H": H, "V": V, **call.constants}
        kept = {"error": error, "do": do, "dv": dv, "beta": call.beta, "states": states, "dstates": dstates}
        scan, programs = call.scan(tiles.backward)
        if programs:
            scan_backward[(2 * programs,)](
                **systems,
                **kept,
                **shared,
                initial=call.initial,
                dstate=dstate,
                dinitial=dinitial,
                sequences=call.table.sequences,
                BK=tiles.key,
                BV=scan.value,
                num_warps=scan.warps,
                num_stages=scan.stages,
                maxnreg=scan.maxnreg,
            )
        if len(states) * H:
            found = {"dq": dq, "dk": dk, "dbeta": dbeta, "ddecay": ddecay}
            _gradients(call, systems, {**kept, **found, "scale": scale})
    return dq, dk, dv, dbeta, ddecay, dinitial


def _gradients(call: _Call, systems: dict[str, Tensor | None], given: dict[str, Any]) -> None:
    """Launch what finds the gradients of q, k, beta and decay."""
    H, V = call.q.shape[2], call.v.shape[-1]
    key, value, warps, stages = call.tiles.gradients
    shape = (len(call.table.chunks), H)
    grid = (shape[0] * shape[1],)
    shared = {"chunks": call.table.chunks, "step": call.step, "H": H, "V": V, "C": call.tiles.chunk}
    given = {**given, **shared, **call.constants, "BV": value, "num_warps": warps, "num_stages": stages}
    given = {**given, "q": call.q, "k": call.k, "decay": call.decay, "BK": key}
    scores: dict[str, Tensor | None] = {"dqk": None, "dkk": None, "itself": None}
    if call.tiles.separate:
        C = call.tiles.chunk
        # float16 does not hold what the factored form multiplies.
        wide = torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32
        scores = {name: call.q.new_empty((*shape, C, C), dtype=wide) for name in ("dqk", "dkk")}
        scores["itself"] = call.q.new_empty((*shape, C), dtype=torch.float32)
        passed = {name: given[name] for name in ("error", "do", "dv", "scale", "PRECISION")}
        value, warps = call.tiles.scores
        score_gradients[grid](**scores, **shared, **passed, BV=value, num_warps=warps, num_stages=2)
    if call.mode == CHANNEL.value:
        given.pop("DECAY")
        channel_gradients[grid](**given, **scores, whole=systems["whole"])
    else:
        chunk_gradients[grid](**given, **scores, start=systems["start"], end=systems["end"])


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> _Call:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    mode = NONE.value if decay is None else HEAD.value if decay.ndim == 3 else CHANNEL.value
    tiles = _tiles(
        capability(q.device), q.shape[-1], v.shape[-1], dtype == torch.float32, mode == CHANNEL.value
    )
    return _Call(
        q.to(dtype).contiguous(),
        k.to(dtype).contiguous(),
        v.to(dtype).contiguous(),
        beta.contiguous(),
        None if decay is None else decay.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        chunk_table(cu_seqlens, q.shape[0], q.shape[1], tiles.chunk, reverse, q.device),
        tiles,
        mode,
        -1 if reverse else 1,
        dot_precision(dtype),
    )


def _systems(call: _Call, scale: float) -> dict[str, Tensor | None]:
    """Launch `chunk_systems`; return what it wrote and what stands in for it, as the scans name it."""
    q, k, C = call.q, call.k, call.tiles.chunk
    shape = (len(call.table.chunks), q.shape[2])
    made: dict[str, Tensor | None] = {name: q.new_empty((*shape, C, C)) for name in ("inverse", "scores")}
    made.update(start=None, end=None, whole=None, q_start=None, k_start=None, k_end=None)
    if call.mode == HEAD.value:
        made.update({name: q.new_empty((*shape, C), dtype=torch.float32) for name in ("start", "end")})
    if call.mode == CHANNEL.value:
        made.update({name: torch.empty_like(q) for name in ("q_start", "k_start", "k_end")})
        made["whole"] = q.new_empty((*shape, q.shape[-1]), dtype=torch.float32)
    if shape[0] * shape[1]:
        key, warps = call.tiles.systems
        chunk_systems[(shape[0] * shape[1],)](
            q=q,
            k=k,
            beta=call.beta,
            decay=call.decay,
            **made,
            chunks=call.table.chunks,
            scale=scale,
            step=call.step,
            H=q.shape[2],
            **call.constants,
            BK=key,
            num_warps=warps,
            num_stages=2,
        )
    if call.mode != CHANNEL.value:
        made.update(q_start=q, k_start=k, k_end=k)
    return made


def builds(capability: int, everything: bool = False) -> list[Build]:
    """List the kernels that the launchers make for a compute capability.

    Not listed, for their scans are right but spill registers: float32 beyond 64 channels, and 256 channels
    that decay each on its own.

    Args:
        capability: 80, 90 or 100.
        everything: every head size and decay, and not only the usual ones.
    """
    modes = (NONE.value, HEAD.value, CHANNEL.value)
    calls = [(128, "bf16", HEAD.value), (64, "fp32", CHANNEL.value), (256, "bf16", NONE.value)]
    if everything:
        sizes = {"bf16": (16, 32, 60, 64, 96, 128, 256), "fp32": (16, 32, 60, 64)}
        calls = [(size, kind, mode) for kind in sizes for size in sizes[kind] for mode in modes]
        calls.remove((256, "bf16", CHANNEL.value))
    return [build for call in calls for build in _builds(capability, *call)]


def _builds(capability: int, size: int, kind: str, mode: int) -> list[Build]:
    tiles = _tiles(capability, size, size, kind == "fp32", mode == CHANNEL.value)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    x, wide = f"*{kind}", "*fp32"
    common = {"step": "i32", "H": "i32", "scale": "fp32", "beta": x}
    made = {"inverse": x, "scores": x}
    head = {"start": wide, "end": wide} if mode == HEAD.value else {}
    channel = {"q_start": x, "k_start": x, "k_end": x, "whole": wide} if mode == CHANNEL.value else {}
    decays = {} if mode == NONE.value else {"decay": wide}
    absent = (
        "dqk",
        "dkk",
        "itself",
        "start",
        "end",
        "whole",
        "decay",
        "ddecay",
        "q_start",
        "k_start",
        "k_end",
    )
    fixed = {"K": size, "C": tiles.chunk, "DECAY": mode, "PRECISION": dot_precision(dtype)}

    def build(
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        warps: int,
        stages: int,
        maxnreg: int | None = None,
    ) -> Build:
        names = kernel.arg_names
        missing = dict.fromkeys(name for name in absent if name in names and name not in types)
        constants = {name: value for name, value in {**fixed, **constants}.items() if name in names}
        tile = "".join(f" {name}{constants[name]}" for name in ("BK", "BV") if name in constants)
        name = f"{kernel.__name__} {kind} {size} {('none', 'head', 'channel')[mode]}{tile}"
        return Build(name, kernel, types, {**constants, **missing}, warps, stages, maxnreg)

    key, warps = tiles.systems
    types = {**common, **made, **head, **channel, **decays, "q": x, "k": x, "chunks": "*i32"}
    found = [build(chunk_systems, types, {"BK": key}, warps, 2)]
    state = {"initial": wide, "sequences": "*i32"}
    reads = {"q_start": x, "k_start": x, "k_end": x}
    for scan in sorted(set(tiles.forward)):
        types = {**common, **made, **head, **channel, **reads, **state, "error": wide}
        types |= {"v": x, "o": x, "final": wide}
        found.append(build(scan_forward, types, {"V": size, "BK": tiles.key, "BV": scan.value}, *scan[1:]))
    for scan in sorted(set(tiles.backward)):
        types = {**common, **made, **head, **channel, **reads, **state, "do": x, "error": wide, "dv": x}
        types |= {"states": x, "dstates": x, "dstate": wide, "dinitial": wide}
        found.append(build(scan_backward, types, {"V": size, "BK": tiles.key, "BV": scan.value}, *scan[1:]))
    key, value, warps, stages = tiles.gradients
    types = {**common, **head, **decays, "q": x, "k": x, "chunks": "*i32", "dq": x, "dk": x, "dbeta": x}
    types |= {"error": wide, "do": x, "dv": x, "states": x, "dstates": x}
    types |= {} if mode == NONE.value else {"ddecay": wide}
    constants = {"V": size, "BK": key, "BV": value}
    scores = {"dqk": x, "dkk": x, "itself": wide}
    if mode == CHANNEL.value:
        types |= {**scores, "whole": wide}
        found.append(build(channel_gradients, types, constants, warps, stages))
    else:
        types |= scores if tiles.separate else {}
        found.append(build(chunk_gradients, types, constants, warps, stages))
    if tiles.separate:
        constants["BV"], warps = tiles.scores
        types = {name: types[name] for name in ("error", "do", "dv", "chunks", "scale", "step", "H", *scores)}
        found.append(build(score_gradients, types, constants, warps, 2))
    return found
