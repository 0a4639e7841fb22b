"""Coarser voxels and back: the spatial descriptor, voxel generation, merging and expanding."""

# PyTorch leaves the calls of its autograd functions untyped.
# mypy: allow-untyped-calls

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .sparse_conv import Backend, SubMConv3d
from .voxels import Voxels, voxel_index, voxel_key

Scale = tuple[int, int, int]


@dataclass(frozen=True)
class Merging:
    """How N fine voxels fall into M coarse ones.

    Attributes:
        index: int64 ``(M, 4)``: the coarse voxels, in ascending order.
        size: coarse cells along z, y and x.
        inverse: int64 ``(N,)``: the coarse voxel of each fine one.
        plans: of the coarse voxels.
    """

    index: Tensor
    size: tuple[int, int, int]
    inverse: Tensor
    plans: dict[Any, Any]


class _Sum(torch.autograd.Function):
    """Sum the rows of each coarse voxel; ``members`` are those rows and where each voxel's begin.

    `index_add` would be slower, and on a GPU adds in another order each time.
    """

    @staticmethod
    def forward(ctx: Any, fine: Tensor, inverse: Tensor, members: tuple[Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(inverse)
        return F.embedding_bag(members[0], fine, members[1], mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Spread(torch.autograd.Function):
    """Give each fine voxel the row of its coarse one: what `_Sum` is the gradient of."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, inverse: Tensor, members: tuple[Tensor, Tensor]) -> Tensor:
        ctx.members = members
        return coarse.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, starts = ctx.members
        return F.embedding_bag(rows, grad.contiguous(), starts, mode="sum"), None, None


def merge(voxels: Voxels, scale: Scale, generated: Tensor | None = None) -> tuple[Voxels, Tensor]:
    """Sum the features of the fine voxels of each coarse one.

    A grid that ``scale`` does not divide keeps its incomplete coarse voxels.

    Args:
        voxels: N fine voxels.
        scale: fine voxels of a coarse one along x, y and z.
        generated: fine voxels ``(K, 4)`` without features, which may repeat others; their coarse voxels
            exist too.

    Returns:
        The coarse voxels, and the coarse voxel of each fine one, int64 ``(N,)``.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if len(scale) != 3 or min(scale) < 1:
        raise ValueError(f"scale must be three positive numbers of voxels (x, y, z), got {scale}")
    plan = ("merge", tuple(scale))
    if generated is not None:
        merging = _merging(torch.cat([voxels.index, generated]), voxels.size, scale)
    elif plan in voxels.plans:
        merging = voxels.plans[plan]
    else:
        merging = voxels.plans[plan] = _merging(voxels.index, voxels.size, scale)
    inverse = merging.inverse[: len(voxels.index)]
    coarse = Voxels(voxels.features, merging.index, merging.size, voxels.batch, merging.plans)
    summed: Tensor = _Sum.apply(voxels.features, inverse, _members(coarse, inverse))
    return coarse.with_features(summed), inverse


def expand(coarse: Voxels, skip: Voxels, inverse: Tensor) -> Voxels:
    """Add to each fine voxel of ``skip`` the features of its coarse one; `merge` gave ``inverse`` (N,)."""
    spread: Tensor = _Spread.apply(coarse.features, inverse, _members(coarse, inverse))
    return skip.with_features(skip.features + spread)


def _merging(index: Tensor, size: tuple[int, int, int], scale: Scale) -> Merging:
    depth, height, width = (-(-cells // step) for cells, step in zip(size, reversed(scale)))
    coarse = (depth, height, width)
    steps = index.new_tensor([1, *reversed(scale)])
    key, inverse = torch.unique(voxel_key(index // steps, coarse), return_inverse=True)
    return Merging(voxel_index(key, coarse), coarse, inverse, {})


def _members(coarse: Voxels, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the fine voxels, coarse voxel by coarse voxel, and where those of each begin; in the plans."""
    if "members" not in coarse.plans:
        counts = torch.bincount(inverse, minlength=len(coarse.index))
        coarse.plans["members"] = inverse.argsort(stable=True), counts.cumsum(0) - counts
    members: tuple[Tensor, Tensor] = coarse.plans["members"]
    return members


class SpatialDescriptor(nn.Module):
    """LION's 3D spatial feature descriptor: GELU(LayerNorm(SubMConv3d(f))), on the same voxels.

    Args:
        channels: C.
        backend: of the convolution.
    """

    def __init__(self, channels: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.conv = SubMConv3d(channels, channels, 3, backend=backend)
        self.norm = nn.LayerNorm(channels)

    def forward(self, voxels: Voxels) -> Voxels:
        """Map features ``(N, C)`` to ``(N, C)``."""
        return voxels.with_features(F.gelu(self.norm(self.conv(voxels).features)))


class VoxelGeneration(nn.Module):
    """Where LION diffuses the foreground: the diagonal neighbours of the most active voxels.

    Of the n voxels of each sample the int(ratio·n) with the highest mean feature are chosen; each gives the
    four cells diagonal to it in the plane. Beyond the grid's border the cell is the nearest inside.
    Published as voxel generation of LION (Liu et al., NeurIPS 2024).

    Args:
        ratio: share of the voxels that are chosen, 0 to 1.

    Raises:
        ValueError: ``ratio`` is not from 0 to 1.
    """

    diagonals: Tensor

    def __init__(self, ratio: float = 0.2) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio of generated voxels must be from 0 to 1, got {ratio}")
        self.ratio = ratio
        steps = [[0, 0, y, x] for y, x in ((1, -1), (1, 1), (-1, -1), (-1, 1))]
        self.register_buffer("diagonals", torch.tensor(steps), persistent=False)

    def forward(self, voxels: Voxels) -> Tensor:
        """Cells to generate: int64 ``(K, 4)``, which may repeat one another and the voxels themselves."""
        score = voxels.features.detach().float().mean(1)
        counts = voxels.counts.tolist()
        start, chosen = 0, []
        for count in counts:
            best = score[start : start + count].topk(int(self.ratio * count)).indices
            chosen.append(best + start)
            start += count
        cells = (voxels.index[torch.cat(chosen)][:, None] + self.diagonals).flatten(0, 1)
        last = cells.new_tensor([voxels.batch, *voxels.size]) - 1
        return torch.minimum(cells.clamp_min(0), last)

    def extra_repr(self) -> str:
        """The ratio."""
        return f"ratio={self.ratio}"


class VoxelMerge(nn.Module):
    """Descriptor, voxel generation where asked for, merging by sum, LayerNorm.

    Args:
        channels: C.
        scale: fine voxels of a coarse one along x, y and z.
        generation: share of the voxels around which others are generated; 0 generates none.
        backend: of the convolution.
    """

    def __init__(
        self, channels: int, scale: Scale, generation: float = 0.0, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.scale = scale
        self.descriptor = SpatialDescriptor(channels, backend)
        self.generation = VoxelGeneration(generation) if generation else None
        self.norm = nn.LayerNorm(channels)

    def forward(self, voxels: Voxels) -> tuple[Voxels, Tensor]:
        """Coarse voxels, and the coarse voxel of each fine one, int64 ``(N,)``."""
        voxels = self.descriptor(voxels)
        generated = None if self.generation is None else self.generation(voxels)
        coarse, inverse = merge(voxels, self.scale, generated)
        return coarse.with_features(self.norm(coarse.features)), inverse

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale}"
