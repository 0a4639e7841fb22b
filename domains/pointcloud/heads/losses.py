"""Losses that detection heads share."""

import torch
from torch import Tensor
from torch.nn import functional as F


def heatmap_focal(logits: Tensor, heatmap: Tensor) -> Tensor:
    """Focal loss of a heat map, a sum over its cells divided by the number of peaks, at least 1.

    A peak (1 in ``heatmap``) costs −(1 − p)² log p, another cell −(1 − t)⁴ p² log(1 − p): CornerNet, Law and
    Deng 2018, equation 1.

    Args:
        logits: any shape, before the sigmoid.
        heatmap: same shape, from 0 to 1.
    """
    p = logits.sigmoid()
    peak = heatmap == 1
    at_peak = (1 - p).square() * F.logsigmoid(logits)
    elsewhere = (1 - heatmap).pow(4) * p.square() * F.logsigmoid(-logits)
    return -torch.where(peak, at_peak, elsewhere).sum() / peak.sum().clamp_min(1)


def sigmoid_focal(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of each entry, −α (1 − p)^γ log p for a target of 1: Lin et al. 2017, equation 5.

    Args:
        logits: any shape, before the sigmoid.
        target: same shape, 0 or 1.
        alpha: weight of targets of 1, those of 0 having 1 − α.
        gamma: how much less what is right already counts.
    """
    p = logits.sigmoid()
    wrong = target * (1 - p) + (1 - target) * p
    weight = (target * alpha + (1 - target) * (1 - alpha)) * wrong.pow(gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
