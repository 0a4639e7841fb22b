"""What a stack of mixers carries from one call to the next.

The state of a mixer is a dictionary of tensors whose first dimension counts sequences; that of a `Backbone`
is a list of them, one a block. Both are pytrees, and keep their structure, types and (but for a growing
attention cache) shapes.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

State = dict[str, Tensor]
BackboneState = list[State]


def detach(state: BackboneState) -> BackboneState:
    """Cut the gradient, for truncated back-propagation through time."""
    cut: BackboneState = tree_map_only(Tensor, Tensor.detach, state)
    return cut


def select(state: BackboneState, index: Tensor) -> BackboneState:
    """Take the sequences ``index`` (…,) out of a state: to reorder a beam, or to drop finished sequences."""
    taken: BackboneState = tree_map_only(Tensor, lambda t: t.index_select(0, index), state)
    return taken


def num_bytes(state: BackboneState | State) -> int:
    """Count the bytes that a state occupies."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(state))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of a recurrent state: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
