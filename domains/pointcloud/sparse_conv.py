"""Submanifold sparse convolution in plain PyTorch, for any device and any number of threads."""

# PyTorch leaves the calls of its autograd functions untyped.
# mypy: allow-untyped-calls

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import product
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...kernels.dispatch import say_once
from .voxels import Voxels, voxel_key

Backend = Literal["auto", "spconv", "torch"]
Kernel = tuple[int, int, int]


@dataclass(frozen=True)
class Neighbours:
    """The rulebook of a submanifold convolution with K offsets: the pairs of voxels of its first half.

    The other half is the same pairs seen from the other end, and the middle offset is the voxel itself.

    Attributes:
        pairs: for each of the first K//2 offsets two int64 lists: voxels p, and their neighbours q at it.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]


def neighbours(voxels: Voxels, kernel: Kernel) -> Neighbours:
    """Pairs of voxels whose distance is an offset of ``kernel`` (z, y, x; odd); kept in the plans."""
    plan = ("neighbours", kernel)
    if plan not in voxels.plans:
        voxels.plans[plan] = _neighbours(voxels, kernel)
    found: Neighbours = voxels.plans[plan]
    return found


def _neighbours(voxels: Voxels, kernel: Kernel) -> Neighbours:
    # A margin as wide as the kernel's arm keeps neighbours from wrapping round the grid's borders.
    rz, ry, rx = arms = tuple(edge // 2 for edge in kernel)
    depth, height, width = (cells + 2 * arm for cells, arm in zip(voxels.size, arms))
    margin = voxels.index.new_tensor([0, *arms])
    key = voxel_key(voxels.index + margin, (depth, height, width))
    if not len(key):
        empty = key.new_zeros(0)
        return Neighbours(((empty, empty),) * (prod(kernel) // 2))

    # Voxels are sorted with x fastest: one search finds the start of a run of neighbours along x.
    rows = [(z, y) for z, y in product(range(-rz, 1), range(-ry, ry + 1)) if (z, y) <= (0, 0)]
    starts = key.new_tensor([(z * height + y) * width - rx for z, y in rows])
    wanted = key + starts[:, None]
    place = torch.searchsorted(key, wanted)
    ended = nn.functional.pad(key, (0, 1), value=-1)  # a run may go on past the last voxel
    hits, places = [ended[place] == wanted], [place]
    for step in range(1, kernel[2]):
        places.append(places[-1] + hits[-1])
        hits.append(ended[places[-1]] == wanted + step)
    # (rows, kernel x, N) in the order of the kernel; the last row holds the voxel itself and what follows it.
    half = prod(kernel) // 2
    found = torch.stack(hits, 1).flatten(0, 1)[:half]
    offset, p = found.nonzero(as_tuple=True)
    q = torch.stack(places, 1).flatten(0, 1)[:half][found]
    counts = torch.bincount(offset, minlength=half).tolist()
    return Neighbours(tuple(zip(p.split(counts), q.split(counts))))


class _Convolution(torch.autograd.Function):
    """``y[p] = Σ_k x[p + k] W_k``: gather, multiply, add, by offset; deterministic, as no row repeats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pairs: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pairs = pairs
        y = torch.mm(x, weight[len(pairs)]).to(_accumulator(x))
        for k, (p, q) in enumerate(pairs):
            if len(p):
                y.index_add_(0, p, torch.mm(x.index_select(0, q), weight[k]).to(y.dtype))
                y.index_add_(0, q, torch.mm(x.index_select(0, p), weight[-1 - k]).to(y.dtype))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        middle = len(ctx.pairs)
        gx = torch.mm(grad, weight[middle].T).to(_accumulator(x))
        gw = torch.zeros_like(weight)
        torch.mm(x.T, grad, out=gw[middle])
        for k, (p, q) in enumerate(ctx.pairs):
            if len(p):
                grad_p, grad_q = grad.index_select(0, p), grad.index_select(0, q)
                torch.mm(x.index_select(0, q).T, grad_p, out=gw[k])
                torch.mm(x.index_select(0, p).T, grad_q, out=gw[-1 - k])
                gx.index_add_(0, q, torch.mm(grad_p, weight[k].T).to(gx.dtype))
                gx.index_add_(0, p, torch.mm(grad_q, weight[-1 - k].T).to(gx.dtype))
        return gx.to(x.dtype), gw, None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 else x.dtype


def submanifold_convolution(voxels: Voxels, weight: Tensor) -> Tensor:
    """Convolve the features of voxels, at the voxels only; empty cells count as zeros.

    Args:
        voxels: N voxels with C_in channels.
        weight: ``(C_out, kz, ky, kx, C_in)``, of odd edges: as in `torch.nn.functional.conv3d`, with the
            channels last.

    Returns:
        ``(N, C_out)``; under autocast in its type, summed in float32.
    """
    outputs, *kernel, inputs = weight.shape
    x = voxels.features
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(device)
        x, weight = x.to(narrow), weight.to(narrow)
    found = neighbours(voxels, (kernel[0], kernel[1], kernel[2]))
    by_offset = weight.reshape(outputs, -1, inputs).permute(1, 2, 0).contiguous()
    with torch.autocast(device, enabled=False):
        y: Tensor = _Convolution.apply(x, by_offset, found.pairs)
    return y


@cache
def why_not_spconv() -> str | None:
    """Why spconv cannot be used here, or ``None`` where its CUDA build can be imported."""
    try:
        # About a second; a CPU build is refused, as its scatter races with two threads or more.
        cpu: bool = import_module("spconv.cppconstants").CPU_ONLY_BUILD
    except Exception as error:  # its libraries also fail with other errors than ImportError
        return f"it cannot be imported ({error})"
    return "this is its CPU build" if cpu else None


class SubMConv3d(nn.Module):
    """Submanifold sparse convolution: the voxels stay the same (Graham et al. 2018).

    The weight is laid out as spconv's, ``(C_out, kz, ky, kx, C_in)``, so that checkpoints fit both.

    Args:
        inputs: C_in.
        outputs: C_out.
        kernel_size: odd; one number, or three along z, y and x.
        bias: add one.
        backend: ``torch`` runs anywhere; ``spconv`` is for CUDA tensors and needs its CUDA build; ``auto`` is
            ``spconv`` where that can run and ``torch`` elsewhere.

    Raises:
        ValueError: an even kernel, an unknown backend, or ``spconv`` where it cannot run.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | Kernel = 3,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != 3 or any(edge < 1 or edge % 2 == 0 for edge in kernel):
            raise ValueError(f"kernel_size must be odd, one number or three (z, y, x), got {kernel_size}")
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
        if backend == "spconv" and (reason := why_not_spconv()):
            raise ValueError(f"backend='spconv' cannot run: {reason}; give 'torch' or 'auto'")
        self.inputs, self.outputs, self.kernel, self.backend = inputs, outputs, kernel, backend
        self.weight = nn.Parameter(torch.empty(outputs, *kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as `torch.nn.Conv3d` does: uniformly within 1/√(fan-in)."""
        bound = (self.inputs * prod(self.kernel)) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, voxels: Voxels) -> Voxels:
        """Map features ``(N, C_in)`` to ``(N, C_out)``.

        Raises:
            ValueError: another number of channels, or voxels that ``backend="spconv"`` cannot take.
        """
        if voxels.features.shape[1] != self.inputs:
            raise ValueError(f"voxels must have {self.inputs} channels, got {voxels.features.shape[1]}")
        x = voxels.features
        fits = x.is_cuda and x.dtype != torch.float64
        if self.backend == "spconv" and not fits:
            raise ValueError(
                f"backend='spconv' needs CUDA tensors of at most 32 bits, got {x.dtype} on {x.device}"
            )
        # Without a voxel there is nothing that it could launch.
        wanted = fits and len(x) > 0 and self.backend != "torch"
        reason = why_not_spconv() if wanted else None
        if reason is not None:
            say_once(f"sparse convolution runs in plain PyTorch and not by spconv: {reason}")
        if wanted and reason is None:
            y = self._spconv(voxels)
        else:
            y = submanifold_convolution(voxels, self.weight)
        return voxels.with_features(y if self.bias is None else y + self.bias)

    def _spconv(self, voxels: Voxels) -> Tensor:
        """The same by spconv, which knows no bfloat16 and would cast to float16 under any autocast."""
        spconv = import_module("spconv.pytorch")
        x = voxels.features
        x = x if x.dtype == torch.float16 else x.float()
        with torch.device("meta"):
            module = spconv.SubMConv3d(
                self.inputs, self.outputs, list(self.kernel), bias=False, indice_key="submanifold"
            )
        module.train(self.training)
        # It reads memory row by row, whatever the strides say.
        index = voxels.index.int().contiguous()
        sparse = spconv.SparseConvTensor(x.contiguous(), index, list(voxels.size), voxels.batch)
        sparse.indice_dict = voxels.plans.setdefault(("spconv", self.kernel), {})
        with torch.autocast("cuda", enabled=False):
            y = torch.func.functional_call(module, {"weight": self.weight.to(x.dtype)}, (sparse,))
        features: Tensor = y.features
        return features

    def extra_repr(self) -> str:
        """Channels, kernel and backend."""
        return f"{self.inputs}, {self.outputs}, kernel_size={self.kernel}, backend={self.backend!r}"
