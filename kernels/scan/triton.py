"""The vector scans on a GPU: launches of the Triton kernels.

A scan is one launch, or three where its sequences are too few and too long to fill the chip; a gradient is
the scan, whose results it needs, and a scan the other way. Nothing is divided by a decay, no exponent is
above 0, and no sum is left to atomics, so results repeat bit for bit.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from typing import Any

import torch
from torch import Tensor

from ..ahead_of_time import Build
from ..chunk_table import ChunkTable, chunk_table
from ..gpu import interpreted, multiprocessors
from .triton_channels import join_channels, walk_channels
from .triton_softmax import join_heads, walk_heads

SEGMENT = 512
"""Tokens of a segment."""
TOKENS = 32
CHANNELS = {"real": 32, "max_plus": 32, "complex": 16, "logsumexp": 16}
"""Of a tile, so many that no registers are spilled."""
LARGEST = 256


def unable(*tensors: Tensor) -> str | None:
    """Say why these tensors cannot be served, or ``None`` if they can."""
    x = tensors[0]
    if x.ndim == 4 and x.shape[-1] > LARGEST:
        return f"the triton backend serves up to {LARGEST} value channels a head, and there are {x.shape[-1]}"
    return None


class _Walk:
    """Tables of a scan along ``(B, T, …)``, and whether its sequences are cut into segments."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, reverse: bool, programs: int) -> None:
        self.cu_seqlens, self.reverse, self.x = cu_seqlens, reverse, x
        self.step = -1 if reverse else 1
        self.sequences = self._cut(SEGMENT).sequences
        count = max(1, self.sequences.shape[0])
        busy = count * programs >= multiprocessors(x.device)
        # Three launches are worth it where they divide the time by more than they add.
        self.split = not busy and x.shape[0] * x.shape[1] >= 4 * SEGMENT * count

    def _cut(self, tokens: int) -> ChunkTable:
        return chunk_table(
            self.cu_seqlens, self.x.shape[0], self.x.shape[1], tokens, self.reverse, self.x.device
        )

    def segments(self) -> tuple[Tensor, Tensor, int]:
        """Return the tables of sequences and segments, and the tokens of a segment."""
        length = SEGMENT
        # The pass over the segments of one sequence is sequential too.
        while length < 8 * SEGMENT and self.x.shape[1] > length * 512:
            length *= 2
        table = self._cut(length)
        return table.sequences, table.chunks, length


def _warps(kind: str) -> int:
    return 2 if kind == "complex" else 4


def _tile(kind: str, size: int) -> dict[str, int]:
    """Tokens and channels of a tile; the interpreter spends its time on every number, used or not."""
    channels = min(CHANNELS[kind], 1 << (size - 1).bit_length())
    return {"C": 16 if interpreted() else TOKENS, "BD": channels}


def _scan_channels(
    kind: str,
    x: Tensor | None,
    y: Tensor | None,
    state: Tensor,
    out: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    back: bool = False,
    earlier: bool = False,
    level: Tensor | None = None,
    before: Tensor | None = None,
    origin: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Run `walk_channels` and return the final state."""
    D, tile = out.shape[2], _tile(kind, out.shape[2])
    blocks = -(-D // tile["BD"])
    with torch.cuda.device_of(out):
        walk = _Walk(out, cu_seqlens, reverse, blocks)
        final = torch.empty_like(state, memory_format=torch.contiguous_format)
        if final.numel() == 0:
            return final
        real: dict[str, Any] = {"x": x, "level": level, "state": state, "origin": origin, "final": final}
        real = {name: _parts(t) for name, t in real.items()}
        how: dict[str, Any] = {"KIND": kind, "BACK": back, "STEP": walk.step, "D": D}
        tensors = {"y": _parts(y), "before": _parts(before), "out": _parts(out), "other": _parts(other)}
        grid = (len(walk.sequences), blocks)
        flags = {"EARLIER": earlier, "SPLIT": False, "TOTALS": False, "num_warps": _warps(kind)}
        if not walk.split:
            whole = {"totals": None, "table": walk.sequences, "length": 0}
            walk_channels[grid](**real, **tensors, **whole, **how, **tile, **flags)
            return final
        sequences, segments, length = walk.segments()
        parts = state.new_empty((len(segments), 4, D), dtype=torch.float32)
        wide = (len(segments), blocks)
        cut = {"table": segments, "length": length}
        flags |= {"SPLIT": True}
        first = flags | {"TOTALS": True, "EARLIER": False}
        ending = real | {"state": None, "final": None}
        walk_channels[wide](**ending, **tensors, totals=parts, **cut, **how, **tile, **first)
        join_channels[grid](parts=parts, **real, table=sequences, **how, BD=tile["BD"], num_warps=1)
        walk_channels[wide](
            **(ending | {"state": parts}), **tensors, totals=None, **cut, **how, **tile, **flags
        )
    return final


def _parts(x: Tensor | None) -> Tensor | None:
    """See complex numbers as pairs."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Lay ``x`` out without gaps or a pending conjugation, complex where ``like`` is."""
    x = x.resolve_conj()
    if like is not None and like.is_complex():
        x = x.to(like.dtype)
    return x.contiguous()


def _kind(state: Tensor) -> str:
    return "complex" if state.is_complex() else "real"


def elementwise_forward(
    a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(h, final_state)``."""
    a, b, state = _dense(a, state), _dense(b, state), _dense(state)
    h = torch.empty_like(b)
    return h, _scan_channels(_kind(state), a, b, state, h, cu_seqlens, reverse)


def elementwise_backward(
    dh: Tensor,
    dstate: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(da, db, dinitial)``."""
    kind, like = _kind(state), state
    dh, dstate, a, b, state = (_dense(x, like) for x in (dh, dstate, a, b, state))
    before = torch.empty_like(b, dtype=state.dtype)
    _scan_channels(kind, a, b, state, before, cu_seqlens, reverse, earlier=True)
    da, db = torch.empty_like(a), torch.empty_like(b)
    dinitial = _scan_channels(
        kind, a, dh, dstate, db, cu_seqlens, not reverse, back=True, before=before, other=da
    )
    return da, db, dinitial


def max_plus_forward(
    g: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(m, final_state)``."""
    g, i, state = _dense(g), _dense(i), _dense(state)
    m = torch.empty_like(i)
    return m, _scan_channels("max_plus", g, i, state, m, cu_seqlens, reverse)


def logcumsumexp_forward(
    s: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(z, final_state)``."""
    s, state = _dense(s), _dense(state)
    z = torch.empty_like(s)
    return z, _scan_channels("logsumexp", s, None, state, z, cu_seqlens, reverse)


def logcumsumexp_backward(
    dz: Tensor,
    dstate: Tensor,
    s: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(ds, dinitial)``."""
    dz, dstate, s, state = (_dense(x) for x in (dz, dstate, s, state))
    level, total = (torch.empty_like(s, dtype=torch.float32) for _ in range(2))
    _scan_channels("logsumexp", s, None, state, level, cu_seqlens, reverse, other=total)
    ds = torch.empty_like(s)
    dinitial = _scan_channels(
        "logsumexp",
        s,
        dz,
        dstate,
        ds,
        cu_seqlens,
        not reverse,
        back=True,
        level=level,
        before=total,
        origin=state,
    )
    return ds, dinitial


def _head_tile(V: int) -> dict[str, int]:
    BV = 1 << max(V - 1, 0).bit_length()
    tokens, warps = {64: (64, 8), 128: (16, 4), 256: (8, 8)}.get(BV, (64, 4))
    tile = {"BV": BV, "C": 16 if interpreted() else tokens, "num_warps": warps}
    # Here the compiler aims at an occupancy, and spills, unless it is told to take all registers.
    return tile | ({"maxnreg": 255} if V == 64 else {})


def _scan_heads(
    s: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    final: Tensor,
    **tensors: Tensor | None,
) -> None:
    """Run `walk_heads`; ``tensors`` are what it reads and writes further, and say which pass it is."""
    H, V = v.shape[2:]
    back = tensors.get("ds") is not None
    names = ("o", "do", "level", "share", "inner", "ds", "dv", "origin")
    given = {name: tensors.get(name) for name in names}
    tile = _head_tile(V)
    with torch.cuda.device_of(v):
        walk = _Walk(v, cu_seqlens, reverse, H)
        if final.numel() == 0:
            return
        how: dict[str, Any] = {"H": H, "V": V, "BACK": back, "STEP": walk.step}
        grid = (len(walk.sequences), H)
        if not walk.split:
            walk_heads[grid](
                s=s, v=v, state=state, final=final, totals=None, table=walk.sequences, length=0,
                **given, **how, **tile, SPLIT=False, TOTALS=False,
            )  # fmt: skip
            return
        sequences, segments, length = walk.segments()
        parts = state.new_empty((len(segments), H, V + 2))
        wide = (len(segments), H)
        common = {**given, **how, **tile, "length": length, "SPLIT": True}
        walk_heads[wide](
            s=s, v=v, state=None, final=None, totals=parts, table=segments, TOTALS=True, **common
        )
        join_heads[grid](
            parts=parts, level=given["level"], state=state, origin=given["origin"], final=final,
            table=sequences, BV=tile["BV"], **how, num_warps=1,
        )  # fmt: skip
        walk_heads[wide](
            s=s, v=v, state=parts, final=None, totals=None, table=segments, TOTALS=False, **common
        )


def logsumexp_forward(
    s: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(o, final_state)``."""
    s, v, state = _dense(s), _dense(v), _dense(state)
    o, final = torch.empty_like(v), torch.empty_like(state)
    _scan_heads(s, v, state, cu_seqlens, reverse, final, o=o)
    return o, final


def logsumexp_backward(
    do: Tensor,
    dstate: Tensor,
    s: Tensor,
    v: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(ds, dv, dinitial)``."""
    do, dstate, s, v, state = (_dense(x) for x in (do, dstate, s, v, state))
    kept = {name: torch.empty_like(s, dtype=torch.float32) for name in ("level", "share", "inner")}
    _scan_heads(s, v, state, cu_seqlens, reverse, torch.empty_like(state), do=do, **kept)
    ds, dv, dinitial = torch.empty_like(s), torch.empty_like(v), torch.empty_like(state)
    _scan_heads(s, v, dstate, cu_seqlens, not reverse, dinitial, do=do, ds=ds, dv=dv, origin=state, **kept)
    return ds, dv, dinitial


def builds(capability: int, everything: bool = False) -> list[Build]:
    """List the kernels as they are launched on a GPU: two of each operation, or all types and passes."""
    del capability  # the tiles are the same on all
    passes = ["scan", "gradient"] + (["before", "totals", "segments", "join"] if everything else ["join"])
    found = []
    for kind in ("real", "complex", "max_plus", "logsumexp"):
        for way in passes:
            if kind != "max_plus" or way not in ("gradient", "before"):
                types = ("fp32",) if kind == "complex" else ("bf16", "fp32") if everything else ("bf16",)
                found += [_channel_build(kind, way, number) for number in types]
    for V in (16, 60, 64, 96, 128, 256) if everything else (64, 256):
        for way in ("scan", "gradient", "levels", "join") if everything else ("scan", "gradient"):
            found.append(_head_build(V, way))
    return found


def _channel_build(kind: str, way: str, number: str) -> Build:
    back = way == "gradient"
    constants: dict[str, Any] = {"KIND": kind, "BACK": back, "STEP": 1, "BD": CHANNELS[kind]}
    wide = {"state": "*fp32", "table": "*i32", "D": "i32"}
    name = f"{kind} {way} {number}"
    optional = {"level", "before", "origin", "other", "y", "x", "final", "totals"}
    if way == "join":
        types = wide | {"parts": "*fp32", "final": "*fp32"}
        constants |= {"x": None, "level": None, "origin": None}
        return Build(name, join_channels, types, constants, warps=1, stages=3)
    split = way in ("totals", "segments")
    types = wide | {"x": f"*{number}", "out": f"*{number}", "length": "i32"}
    if kind != "logsumexp" or back:
        types["y"] = f"*{number}"
    if back:
        types |= {"before": "*fp32"}
        types |= {"level": "*fp32", "origin": "*fp32"} if kind == "logsumexp" else {"other": f"*{number}"}
    if kind == "logsumexp" and way == "before":
        types |= {"out": "*fp32", "other": "*fp32"}
    types["totals" if way == "totals" else "final"] = "*fp32"
    if split:
        types.pop("final", None)
    constants |= {
        "EARLIER": way == "before" and kind != "logsumexp",
        "SPLIT": split,
        "TOTALS": way == "totals",
    }
    constants |= dict.fromkeys(optional - set(types)) | {"C": TOKENS}
    return Build(name, walk_channels, types, constants, _warps(kind), stages=3)


def _head_build(V: int, way: str) -> Build:
    tile = _head_tile(V)
    warps, maxnreg = tile.pop("num_warps"), tile.pop("maxnreg", None)
    back = way == "gradient"
    constants: dict[str, Any] = {"V": V, "BV": tile["BV"], "BACK": back, "STEP": 1}
    types = {"state": "*fp32", "table": "*i32", "H": "i32", "final": "*fp32"}
    name = f"logsumexp_scan V={V} {way}"
    if way == "join":
        constants |= {"level": None, "origin": None}
        return Build(name, join_heads, types | {"parts": "*fp32"}, constants, warps=1, stages=3)
    types |= {"s": "*bf16", "v": "*bf16", "length": "i32"}
    if way == "scan":
        types["o"] = "*bf16"
    else:
        types |= {"do": "*bf16", "level": "*fp32", "share": "*fp32", "inner": "*fp32"}
    if back:
        types |= {"ds": "*bf16", "dv": "*bf16", "origin": "*fp32"}
    rest = {"o", "do", "level", "share", "inner", "ds", "dv", "origin", "totals"} - set(types)
    constants |= dict.fromkeys(rest) | {"C": tile["C"], "SPLIT": False, "TOTALS": False}
    return Build(name, walk_heads, types, constants, warps, stages=3, maxnreg=maxnreg)
