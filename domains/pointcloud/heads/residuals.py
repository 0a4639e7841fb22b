"""Boxes as residuals of anchors: SECOND, Yan et al. 2018, equation 1."""

from math import log

import torch
from torch import Tensor

# Corrections beyond a factor of 100 are those of an untrained network; keeps its sizes finite.
_MAX_LOG_RATIO = log(100)


def encode_residuals(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets along x and y by the anchor's diagonal, z by its height; logs of size ratios; turn.

    Args:
        boxes: ``(P, 7)``, of positive sizes.
        anchors: ``(P, 7)``.

    Returns:
        ``(P, 7)``; the turn is a difference of angles, not wrapped.
    """
    offset = (boxes[:, :2] - anchors[:, :2]) / _diagonal(anchors)
    height = (boxes[:, 2:3] - anchors[:, 2:3]) / anchors[:, 5:6]
    size = (boxes[:, 3:6] / anchors[:, 3:6]).log()
    return torch.cat([offset, height, size, boxes[:, 6:] - anchors[:, 6:]], 1)


def decode_residuals(residuals: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of `encode_residuals`: ``(P, 7)``."""
    centre = residuals[:, :2] * _diagonal(anchors) + anchors[:, :2]
    height = residuals[:, 2:3] * anchors[:, 5:6] + anchors[:, 2:3]
    size = residuals[:, 3:6].clamp_max(_MAX_LOG_RATIO).exp() * anchors[:, 3:6]
    return torch.cat([centre, height, size, residuals[:, 6:] + anchors[:, 6:]], 1)


def _diagonal(anchors: Tensor) -> Tensor:
    return anchors[:, 3:5].square().sum(1, keepdim=True).sqrt()
