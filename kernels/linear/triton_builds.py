"""The builds of the Triton kernels of `linear_recurrence`, for compilation ahead of time."""

import torch
import triton.language as tl

from ..ahead_of_time import Build
from .triton_channel import channel_scores
from .triton_gradient import chunk_gradient, chunk_outputs
from .triton_tiles import precision_of, tiles_of
from .triton_walk import join_segments, walk_outputs, walk_states

SIZES = (16, 32, 60, 64, 96, 128, 256)


def builds(compute: int, everything: bool = False) -> list[Build]:
    """List the specialisations that `forward` and `backward` launch on compute capability ``compute``."""
    if everything:
        cases = [(size, decay, torch.bfloat16) for size in SIZES for decay in ("token", "channel")]
        cases += [
            (size, decay, torch.float32) for size in (16, 64, 128, 256) for decay in ("token", "channel")
        ]
        cases += [(64, "none", torch.bfloat16), (64, "head", torch.bfloat16)]
        return [build for case in cases for build in builds_of(compute, *case)]
    gradients = ("chunk_gradient", "channel_scores")
    return [
        *builds_of(compute, 64, "token", torch.bfloat16),
        *builds_of(compute, 128, "token", torch.bfloat16, ("walk_outputs",)),
        *builds_of(compute, 128, "channel", torch.bfloat16, gradients),
        *builds_of(compute, 256, "token", torch.bfloat16, ("chunk_outputs",)),
        *builds_of(compute, 64, "token", torch.float32, ("chunk_outputs", "chunk_gradient")),
    ]


def builds_of(
    compute: int, size: int, decay: str, dtype: torch.dtype, only: tuple[str, ...] = ()
) -> list[Build]:
    """The kernels of a call with K = V = ``size`` and an initial state, ``only`` those of these names."""
    narrow = dtype == torch.bfloat16
    kind = "*bf16" if narrow else "*fp32"
    tiles = tiles_of(compute, size, size, narrow, decay == "channel")
    decayed = ("queries", "keys", "scores", "dscores", "states", "dstates")
    pointers = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", *decayed), kind)
    states = ("initial", "final", "dfinal", "dinitial", "total", "parts", "dparts")
    pointers |= dict.fromkeys(("g", "dg", "whole", *states), "*fp32")
    pointers |= dict.fromkeys(("sequences", "segments", "chunks"), "*i32")
    numbers = {"length": "i32", "H": "i32", "K_end": "i32", "V_end": "i32", "scale": "fp32"}
    constants = {
        "K": size,
        "V": size,
        "DECAY": decay,
        "STEP": 1,
        "SPLIT": False,
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": precision_of(compute, not narrow),
    }
    absent = {"segments", "total"} | (set() if decay == "channel" else {"whole", "scores", "dscores"})
    absent |= {"g", "dg"} if decay == "none" else set()
    plans = [
        (walk_states, tiles.states, absent | {"final"}),
        (chunk_gradient, tiles.gradient, absent),
        (join_segments, tiles.states, absent - ({"total"} if decay != "none" else set())),
    ]
    if tiles.fused is None or tiles.few is None:
        plans.append((chunk_outputs, tiles.outputs, absent))
    else:
        plans += [(walk_outputs, tiles.fused, absent), (walk_outputs, tiles.few, absent)]
    if decay == "channel":
        plans.append((channel_scores, tiles.channel, set()))
    found = []
    for kernel, tile, without in dict.fromkeys((kernel, tile, frozenset(w)) for kernel, tile, w in plans):
        if only and kernel.__name__ not in only:
            continue
        known = {**constants, "BK": tile.BK, "BV": tile.BV}
        names = kernel.arg_names
        types = {n: k for n, k in (pointers | numbers).items() if n in names and n not in without}
        fixed = {n: known.get(n) for n in names if n not in types}
        label = f"{kernel.__name__}-{size}-{decay}-{str(dtype)[6:]}-{tile.BK}x{tile.BV}"
        found.append(Build(label, kernel, types, fixed, tile.warps, tile.stages))
    return found
