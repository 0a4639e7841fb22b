"""Heat maps of object centres: a Gaussian around each, as in CenterNet and CenterPoint."""

import torch
from torch import Tensor


def gaussian_radius(extent: Tensor, min_overlap: float) -> Tensor:
    """Radius around a centre within which a shifted box still counts as near.

    CornerNet takes the least of three roots, for a box shifted, inside and around. The implementation that
    all centre heads descend from takes upper roots and does not divide by the leading coefficient; of those
    the third, √(m²s² + 4m(1 − m)lw) − ms with s = l + w, is the least. The published results rest on it.

    Args:
        extent: ``(M, 2)`` length l and width w, in cells.
        min_overlap: m.

    Returns:
        ``(M,)`` cells.
    """
    s, area = extent.sum(1), extent.prod(1)
    return (min_overlap**2 * s**2 + 4 * min_overlap * (1 - min_overlap) * area).sqrt() - min_overlap * s


def draw_heatmap(
    shape: tuple[int, int, int, int], sample: Tensor, label: Tensor, cells: Tensor, radius: Tensor
) -> Tensor:
    """Gaussians of σ = (2r + 1)/6 around cells, the greater where two meet, nothing beyond r along x or y.

    Args:
        shape: ``(B, K, H, W)`` of the map.
        sample: int64 ``(M,)``.
        label: int64 ``(M,)``.
        cells: int64 ``(M, 2)``, x and y of each centre.
        radius: int64 ``(M,)``, r.

    Returns:
        float32 ``(B, K, H, W)`` from 0 to 1, 1 at each centre.
    """
    B, K, H, W = shape
    flat = torch.zeros(B * K * H * W, device=cells.device)
    if not len(cells):
        return flat.view(shape)
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=cells.device)
    # (M, 2·reach + 1) along each axis; their product is the Gaussian.
    sigma = (2 * radius[:, None] + 1) / 6
    bell = torch.exp(-(step.square() / (2 * sigma.square()))) * (step.abs() <= radius[:, None])
    x, y = cells[:, :1] + step, cells[:, 1:] + step
    inside = ((y >= 0) & (y < H))[:, :, None] & ((x >= 0) & (x < W))[:, None, :]
    plane = (sample * K + label)[:, None, None]
    place = (plane * H + y.clamp(0, H - 1)[:, :, None]) * W + x.clamp(0, W - 1)[:, None, :]
    value = bell[:, :, None] * bell[:, None, :] * inside
    return flat.scatter_reduce_(0, place.flatten(), value.flatten(), "amax").view(shape)
