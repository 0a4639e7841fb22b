"""What the Triton backends ask about the machine."""

import os
from functools import cache

import torch
from torch import Tensor

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may have, by compute capability (A100, H100, B200)."""


LARGEST_HEAD = 256
"""Channels of a head that the kernels with a matrix state serve."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU: ``TRITON_INTERPRET=1`` when it was first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _properties(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return found.major * 10, found.multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def capability(device: torch.device) -> int:
    """Compute capability whose tile table serves ``device``: 80, 90 or 100; an H100's where interpreted."""
    if device.type != "cuda":
        return 90
    major, _ = _properties(_index(device))
    return min(max(major, 80), 100)


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of ``device``; an H100's where interpreted."""
    return 132 if device.type != "cuda" else _properties(_index(device))[1]


def padded(size: int) -> int:
    """Round ``size`` up to a power of two from 16, which a product of tiles takes."""
    return max(16, 1 << (size - 1).bit_length())


def too_large(*tensors: Tensor) -> str | None:
    """Say why heads ``(…, size)`` are too large for a matrix state, or ``None`` if they fit."""
    largest = max(x.shape[-1] for x in tensors)
    if largest > LARGEST_HEAD:
        return f"the triton backend serves heads of at most {LARGEST_HEAD} channels, and these have {largest}"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product of matrices that arrive as ``dtype``: float32 keeps all its digits."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
