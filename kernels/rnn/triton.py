"""Gated recurrent cells on a GPU: the launches of the Triton kernels, one each way, in one of two forms.

Where the matrices of a head fit into shared memory, they stay there for all steps (`triton_fused`); where
they do not, every step streams them from the second-level cache (`triton_streamed`). `triton_tiles` finds out
which. The gradient of the matrices is one product over all tokens, left to PyTorch; no sum is left to
atomics, so results repeat bit for bit.

Products take operands of the type of x and accumulate in float32, as do the states; float32 is multiplied as
three tf32 products, and a gradient of float16 as one, which has float16's digits and float32's range.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import torch
from torch import Tensor

from ..ahead_of_time import Build
from ..chunk_table import chunk_table
from ..gpu import capability, dot_precision, padded
from .cells import CELLS
from .triton_fused import fused_backward, fused_forward
from .triton_streamed import streamed_backward, streamed_forward
from .triton_tiles import Tiles, tiles

_KIND = {name: kind for kind, name in enumerate(CELLS)}
_AIMED = {
    (80, torch.float16, True): {("slstm", 128), ("slstm_exp", 128)},
    (90, torch.bfloat16, True): {("slstm", 32), ("slstm_exp", 32)},
    (90, torch.float16, False): {("slstm", 16)},
    (90, torch.float32, False): {("slstm_exp", 128)},
    (100, torch.bfloat16, False): {("slstm", 32)},
    (100, torch.bfloat16, True): {("gru", 128)},
    (100, torch.float16, False): {("slstm", 32)},
    (100, torch.float16, True): {("slstm", 16), ("slstm_exp", 16)},
    (100, torch.float32, False): {("gru", 16)},
}
"""Where the compiler aims at an occupancy, and spills a few words, unless it is told to take all registers:
by compute capability, type and whether backward, cells and `padded` sizes."""
_CHUNK = 64  # of the table, which other operations of the same batch have made already


def forward(
    x: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(h, final_state, gates)``; the gates ``(H, B·T, kept·D)``, for `backward`, need ``keep``."""
    B, T, _, H, D = x.shape
    out = x.new_empty(B, T, H, D)
    gates = state.new_empty((H, B * T, CELLS[cell].kept * D) if keep else (0,))
    final = state.contiguous().clone()
    tile, launch = _prepare(x, cell, H, D, B, T, cu_seqlens, reverse, gradient=False)
    x, R, b = x.contiguous(), R.to(_operand(x.dtype, gradient=False)).contiguous(), b.contiguous()
    pointers = {"x": x, "R": R, "b": b, "out": out, "final": final, "gates": gates}
    if tile.fused:
        launch(fused_forward, **pointers, KEEP=keep, state=state.contiguous())
    else:
        launch(streamed_forward, **pointers, KEEP=keep, carry=torch.stack((final[:, 0],) * 2))
    return out, final, gates


def backward(
    dh: Tensor,
    dstate: Tensor,
    gates: Tensor,
    R: Tensor,
    b: Tensor,
    cell: str,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dR, db, dinitial)``."""
    (B, T, H, D), G = dh.shape, R.shape[0]
    dtype = _operand(dh.dtype, gradient=True)
    dgates = dh.new_empty(B * T, _planes(cell), H, D, dtype=dtype)
    before = dh.new_empty(B * T, H, D, dtype=dtype)
    dinitial = dstate.contiguous().clone()
    tile, launch = _prepare(dh, cell, H, D, B, T, cu_seqlens, reverse, gradient=True)
    pointers = {
        "dy": dh.contiguous(),
        "R": R.to(dtype).contiguous(),
        "state": state.contiguous(),
        "gates": gates,
    }
    pointers |= {"dgates": dgates, "before": before, "dinitial": dinitial}
    if tile.fused:
        launch(fused_backward, dstate=dstate.contiguous(), **pointers)
    else:
        dpre = dinitial.new_empty(len(dinitial), _planes(cell), H, D)
        launch(streamed_backward, dpre=dpre, **pointers)
    recurrent = dgates[:, :G]
    dR = torch.stack([g.permute(1, 2, 0) @ before.transpose(0, 1) for g in recurrent.unbind(1)])
    dx = (dgates[:, [0, 1, 3]] if cell == "gru" else dgates).view(B, T, G, H, D)
    db = recurrent.sum(0, dtype=torch.float32)
    return dx.to(dh.dtype), dR.to(R.dtype), db.to(b.dtype), dinitial


def _planes(cell: str) -> int:
    """Gradients a token: the GRU's candidate has one before its reset gate and one behind it."""
    return 1 if cell == "elman" else 4


def _operand(dtype: torch.dtype, gradient: bool) -> torch.dtype:
    """What products take where x is ``dtype``: a gradient needs more range than float16 has, h does not."""
    return torch.float32 if gradient and dtype == torch.float16 else dtype


def _tiles(compute: int, cell: str, D: int, dtype: torch.dtype, gradient: bool) -> Tiles:
    width = 8 if dtype == torch.float32 else _operand(dtype, gradient).itemsize
    return tiles(compute, CELLS[cell].gates, CELLS[cell].kept, D, width, gradient)


def _maxnreg(compute: int, cell: str, D: int, dtype: torch.dtype, gradient: bool) -> int | None:
    return 255 if (cell, padded(D)) in _AIMED.get((compute, dtype, gradient), ()) else None


def _prepare(
    like: Tensor,
    cell: str,
    H: int,
    D: int,
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    gradient: bool,
) -> tuple[Tiles, Any]:
    """Choose the tiles, and return with them what launches a kernel on the tensors that the caller names."""
    sequences = chunk_table(cu_seqlens, batch, length, _CHUNK, reverse, like.device).sequences
    packed = cu_seqlens is not None
    # Sequences of one program should end together.
    order = sequences[:, 1].argsort(descending=True, stable=True).int() if packed else sequences
    compute = capability(like.device)
    tile = _tiles(compute, cell, D, like.dtype, gradient)
    maxnreg = _maxnreg(compute, cell, D, like.dtype, gradient)
    constants = _constants(cell, H, D, tile)
    constants |= {"STEP": -1 if reverse else 1, "PACKED": packed, "PRECISION": dot_precision(like.dtype)}

    def launch(kernel: Any, **tensors: Any) -> None:
        if not len(sequences):
            return
        numbers = {"sequences": sequences, "order": order, "P": batch * length, "S": len(sequences)}
        given = {n: v for n, v in {**constants, **numbers, **tensors}.items() if n in kernel.arg_names}
        with torch.cuda.device_of(like):
            kernel[(-(-len(sequences) // tile.batch), H)](
                **given, num_warps=tile.warps, num_stages=tile.stages, maxnreg=maxnreg
            )

    return tile, launch


def _constants(cell: str, H: int, D: int, tile: Tiles) -> dict[str, Any]:
    plan = CELLS[cell]
    known = {"KIND": _KIND[cell], "G": plan.gates, "N": plan.states, "KEPT": plan.kept, "H": H, "D": D}
    return known | {"BD": padded(D), "BB": tile.batch, "BN": tile.columns, "BK": tile.depth}


def builds(compute: int, everything: bool = False) -> list[Build]:
    """List the specialisations that `forward` and `backward` launch on compute capability ``compute``."""
    if everything:
        chosen = [
            (cell, D, dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for D in (16, 32, 60, 64, 96, 128, 256)
            for cell in CELLS
        ]
    else:
        chosen = [("lstm", 64, torch.bfloat16), ("lstm", 64, torch.float32), ("lstm", 256, torch.bfloat16)]
        chosen += [("slstm", 128, torch.bfloat16)]
    return [
        build for case in chosen for gradient in (False, True) for build in [_build(compute, *case, gradient)]
    ]


def _build(compute: int, cell: str, D: int, dtype: torch.dtype, gradient: bool) -> Build:
    tile = _tiles(compute, cell, D, dtype, gradient)
    kernel = {
        (True, False): fused_forward,
        (True, True): fused_backward,
        (False, False): streamed_forward,
        (False, True): streamed_backward,
    }[tile.fused, gradient]
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    wide = names[_operand(dtype, gradient)]
    types = dict.fromkeys(("x", "b", "out", "dy"), names[dtype])
    types |= dict.fromkeys(("R", "dgates", "before"), wide)
    types |= dict.fromkeys(("state", "final", "gates", "carry", "dstate", "dinitial", "dpre"), "*fp32")
    types |= {"sequences": "*i32", "order": "*i32", "P": "i32", "S": "i32"}
    constants = _constants(cell, 4, D, tile)
    constants |= {"STEP": 1, "PACKED": True, "KEEP": True, "PRECISION": dot_precision(dtype)}
    return Build(
        f"{kernel.__name__}-{cell}-{D}-{str(dtype)[6:]}",
        kernel,
        {n: k for n, k in types.items() if n in kernel.arg_names},
        {n: v for n, v in constants.items() if n in kernel.arg_names},
        tile.warps,
        tile.stages,
        _maxnreg(compute, cell, D, dtype, gradient),
    )
