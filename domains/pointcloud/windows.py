"""Voxels in order of windows, cut into groups of equal size: the sequences that a group RNN reads."""

# PyTorch leaves the calls of its autograd functions untyped.
# mypy: allow-untyped-calls

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .voxels import Voxels

Window = tuple[int, int, int]


@dataclass(frozen=True)
class GroupOrder:
    """N voxels of B samples laid into G groups of S slots; a group holds voxels of one sample only.

    The voxels of a sample fill its slots in order. What is left of its last group is filled with copies: of
    the voxel S slots before or, where a sample has fewer than S voxels, of all of them in turn.

    Attributes:
        rows: int64 ``(G, S)``: the voxel of each slot.
        slots: int64 ``(N,)``: the slot of each voxel that is not a copy, counted over all groups.
        copies: int64 ``(G·S − N,)``: the slots that hold copies.
    """

    rows: Tensor
    slots: Tensor
    copies: Tensor

    def gather(self, features: Tensor) -> Tensor:
        """Features ``(N, C)`` of the voxels as groups ``(G, S, C)``."""
        flat: Tensor = _Gather.apply(features, self.rows.flatten(), self.slots, self.copies)
        return flat.view(*self.rows.shape, features.shape[1])

    def scatter(self, groups: Tensor) -> Tensor:
        """Groups ``(G, S, C)`` as features ``(N, C)`` of the voxels; what copies hold is dropped."""
        features: Tensor = _Scatter.apply(groups.flatten(0, 1), self.rows.flatten(), self.slots, self.copies)
        return features


class _Gather(torch.autograd.Function):
    """``features[rows]``, whose gradient is gathered too: scattering it would be several times slower."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor, slots: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots, copies)
        return features.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, slots, copies = ctx.saved_tensors
        total = grad.index_select(0, slots)
        total.index_add_(0, rows[copies], grad.index_select(0, copies))
        return total, None, None, None


class _Scatter(torch.autograd.Function):
    """``flat[slots]``, with the gradient of `_Gather`'s kind."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, rows: Tensor, slots: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(rows, copies)
        return flat.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, copies = ctx.saved_tensors
        return grad.index_select(0, rows).index_fill_(0, copies, 0), None, None, None


def group_order(
    voxels: Voxels, window: Window, group: int, shift: bool = False
) -> tuple[GroupOrder, GroupOrder]:
    """Order voxels window by window and cut them into groups, once along x and once along y.

    Along x, windows follow one another by their place in x, then y, then z, and so do the voxels of a
    window; along y, the first two change places. A window only sets the order: groups cross its borders.
    Published as the 3D window partition and equal-size groups of LION (Liu et al., NeurIPS 2024).

    Args:
        voxels: N of them; the orders are kept in their plans.
        window: voxels of a window along x, y and z.
        group: S, the slots of a group.
        shift: move the windows by half their size.

    Raises:
        ValueError: ``window`` or ``group`` is not positive.
    """
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window must be three positive numbers of voxels (x, y, z), got {window}")
    if group < 1:
        raise ValueError(f"group must be a positive number of voxels, got {group}")
    plan = ("groups", tuple(window), group, shift)
    if plan not in voxels.plans:
        slots = _slots(voxels, group)
        voxels.plans[plan] = tuple(_lay(key.argsort(), *slots) for key in window_keys(voxels, window, shift))
    orders: tuple[GroupOrder, GroupOrder] = voxels.plans[plan]
    return orders


def window_keys(voxels: Voxels, window: Window, shift: bool) -> tuple[Tensor, Tensor]:
    """Numbers ``(N,)`` by which voxels are sorted along x and along y; no two are equal."""
    sample, z, y, x = voxels.index.unbind(1)
    moved = [place + edge // 2 if shift else place for place, edge in zip((x, y, z), window)]
    X, Y, Z = (place // edge for place, edge in zip(moved, window))
    x, y, z = (place - corner * edge for place, corner, edge in zip(moved, (X, Y, Z), window))
    # One window more than fit, for the shift.
    nx, ny, nz = (-(-cells // edge) + 1 for cells, edge in zip(reversed(voxels.size), window))
    wx, wy, wz = window
    along_x = (((((sample * nx + X) * ny + Y) * nz + Z) * wx + x) * wy + y) * wz + z
    along_y = (((((sample * ny + Y) * nx + X) * nz + Z) * wy + y) * wx + x) * wz + z
    return along_x, along_y


def _slots(voxels: Voxels, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """For any order: its place in each slot (G, S), the slots of its places (N,), the slots of copies."""
    device = voxels.index.device
    counts = voxels.counts
    groups = (counts + group - 1) // group
    sample = torch.arange(voxels.batch, device=device).repeat_interleave(groups * group)
    slot = torch.arange(len(sample), device=device)
    j = slot - ((groups.cumsum(0) - groups) * group)[sample]
    n = counts[sample]
    # Only the last group has copies, so one step back by a group always reaches a voxel.
    place = torch.where(j < n, j, torch.where(n >= group, j - group, j % n))
    real = j < n
    place = place + (counts.cumsum(0) - counts)[sample]
    return place.view(-1, group), slot[real], slot[~real]


def _lay(order: Tensor, places: Tensor, slots: Tensor, copies: Tensor) -> GroupOrder:
    """Lay voxels in ``order`` (N,) into the slots that `_slots` found."""
    back = torch.empty_like(slots)
    back[order] = slots
    return GroupOrder(order[places], back, copies)
