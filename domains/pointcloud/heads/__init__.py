"""Detection heads: from the bird's-eye view to boxes."""

from .anchor import Anchor, AnchorHead
from .base import Head
from .center import CenterHead
from .sparse_center import SparseCenterHead
from .transfusion import TransFusionHead

__all__ = ["Anchor", "AnchorHead", "CenterHead", "Head", "SparseCenterHead", "TransFusionHead"]
