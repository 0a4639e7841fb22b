"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor

from . import packed


def token_positions(
    length: int, offset: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of each token in its sequence, after ``offset`` (B|S,) others: ``(T,)`` or ``(B, T)``."""
    if cu_seqlens is None:
        places = torch.arange(length, device=device)
        return places if offset is None else offset[:, None] + places
    places = packed.positions(cu_seqlens, length)
    return places if offset is None else places + offset[packed.sequence_ids(cu_seqlens, length)]


def positions_after(x: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Count the tokens of each sequence up to the end of ``x`` (B, T, …): int64 ``(B|S,)``."""
    if cu_seqlens is None:
        seen = torch.full((x.shape[0],), x.shape[1], device=x.device)
    else:
        seen = packed.lengths_of(cu_seqlens).long()
    return seen if offset is None else seen + offset


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn the pair ``(x_i, x_{i+D/2})`` of ``x`` (B, T, H, D) by ``position · base^(-2i/D)``.

    Products of two rotated vectors depend on the difference of their positions only. ``positions`` is
    ``(T,)`` or ``(B, T)``; angles are float32 at least.
    """
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angles = (positions.to(exact)[..., None] * frequencies).unsqueeze(-2)  # (…, T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(exact).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def check_rotary(size: int) -> None:
    """Raise ``ValueError`` unless heads of ``size`` channels can be rotated in pairs."""
    if size % 2:
        raise ValueError(f"rotary positions need an even head size, got {size}: change dim or heads")
