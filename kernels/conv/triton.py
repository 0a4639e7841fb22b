"""Short convolution on a GPU: launches of the Triton kernels, one forward and one backward.

The gradients of weight and bias are summed a chunk at a time in the kernel, and over the chunks by PyTorch,
in the same order every time.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs

from typing import Any

import torch
from torch import Tensor

from ..ahead_of_time import Build
from ..chunk_table import chunk_table
from .triton_kernels import convolve, convolve_back

CHUNK = 32
CHANNELS = 32
"""Tokens and channels of a tile."""
LARGEST = 16
"""Taps; the gradient's loads grow with their square."""


def unable(x: Tensor, weight: Tensor) -> str | None:
    """Say why these tensors cannot be served, or ``None`` if they can."""
    del x
    if weight.shape[1] > LARGEST:
        return f"the triton backend serves up to {LARGEST} taps, and there are {weight.shape[1]}"
    return None


def _how(
    x: Tensor, weight: Tensor, activation: str | None, cu_seqlens: Tensor | None, reverse: bool, tokens: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and what both kernels take beside tensors."""
    D, W = weight.shape
    table = chunk_table(cu_seqlens, x.shape[0], x.shape[1], tokens, reverse, x.device)
    channels = min(CHANNELS, 1 << max(D - 1, 0).bit_length())
    count = len(table.chunks)
    how = {
        "chunks": table.chunks,
        "sequences": table.sequences,
        "N": count,
        "D": D,
        "STEP": -1 if reverse else 1,
        **_constants(W, activation == "silu", tokens, channels),
    }
    return (count + len(table.sequences), -(-D // channels)), how


def _constants(W: int, silu: bool, tokens: int, channels: int) -> dict[str, Any]:
    return {"W": W, "SILU": silu, "C": tokens, "BD": channels, "BW": 1 << max(W - 2, 0).bit_length()}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``."""
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    bias = None if bias is None else bias.contiguous()
    y, final = torch.empty_like(x), torch.empty_like(state)
    with torch.cuda.device_of(x):
        grid, how = _how(x, weight, activation, cu_seqlens, reverse, CHUNK)
        if grid[0] and grid[1]:
            convolve[grid](x, weight, bias, state, y, final, **how, num_warps=4)
    return y, final


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dweight, dbias, dinitial)``."""
    dy, dstate, x, weight, state = (t.contiguous() for t in (dy, dstate, x, weight, state))
    bias = None if bias is None else bias.contiguous()
    D, W = weight.shape
    dx, dinitial = torch.empty_like(x), torch.empty_like(state)
    with torch.cuda.device_of(x):
        grid, how = _how(x, weight, activation, cu_seqlens, reverse, CHUNK)
        partial = state.new_empty((how["N"], W + 1, D))
        if grid[0] and grid[1]:
            convolve_back[grid](dy, dstate, x, weight, bias, state, dx, dinitial, partial, **how, num_warps=4)
        sums = partial.sum(0)
    dbias = sums[W].to(weight.dtype if bias is None else bias.dtype)
    return dx, sums[:W].mT.contiguous().to(weight.dtype), dbias.clone(), dinitial


def builds(capability: int, everything: bool = False) -> list[Build]:
    """List the kernels as they are launched on a GPU, at 4 taps; with ``everything`` at 2 to 16."""
    del capability  # the tiles are the same on all
    found = []
    for W in (1, 2, 3, 4, 8, 16) if everything else (4,):
        for silu in (True, False):
            for number in ("bf16", "fp32"):
                given = dict.fromkeys(("x", "weight", "bias"), f"*{number}")
                given |= {"state": "*fp32", "chunks": "*i32", "sequences": "*i32", "N": "i32", "D": "i32"}
                name = f"W={W} {'silu ' * silu}{number}"
                constants = {**_constants(W, silu, CHUNK, CHANNELS), "STEP": 1}
                types = given | {"y": f"*{number}", "final": "*fp32"}
                found.append(Build(f"forward {name}", convolve, types, constants, 4, 3))
                types = given | {"dy": f"*{number}", "dx": f"*{number}"}
                types |= {"dstate": "*fp32", "dinitial": "*fp32", "partial": "*fp32"}
                found.append(Build(f"backward {name}", convolve_back, types, constants, 4, 3))
    return found
