"""Normalisation of what a mixer's heads give, with an output gate."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

NormName = Literal["none", "rms", "layer", "rms_all"]
GateName = Literal["none", "swish", "sigmoid"]
EPS = 1e-5


class GatedNorm(nn.Module):
    """Normalise heads and gate them: ``norm(o) ⊙ σ(z)``, or ``norm(o ⊙ σ(z))`` with ``gate_first``.

    Args:
        heads: H.
        size: V, the width of one head.
        norm: ``rms`` and ``layer`` normalise every head alone, ``rms_all`` all heads together.
        gate: ``swish`` is ``z·sigmoid(z)``.
        gate_first: gate before the norm, as Mamba-2 does.
    """

    def __init__(
        self, heads: int, size: int, norm: NormName, gate: GateName, gate_first: bool = False
    ) -> None:
        super().__init__()
        self.gate, self.gate_first, self.all_heads = gate, gate_first, norm == "rms_all"
        self.norm: nn.Module = nn.Identity()
        if norm == "layer":
            self.norm = nn.LayerNorm(size, eps=EPS)
        elif norm != "none":
            self.norm = nn.RMSNorm(heads * size if self.all_heads else size, eps=EPS)

    def forward(self, o: Tensor, z: Tensor | None = None) -> Tensor:
        """Map ``o`` (B, T, H, V) and the gate's ``z`` (B, T, H·V) to ``(B, T, H·V)``."""
        if z is None:
            return self._normalise(o).flatten(-2)
        opening = F.silu(z) if self.gate == "swish" else z.sigmoid()
        if self.gate_first:
            return self._normalise(o * opening.view_as(o)).flatten(-2)
        return self._normalise(o).flatten(-2) * opening

    def _normalise(self, o: Tensor) -> Tensor:
        weight = getattr(self.norm, "weight", o)  # wider than o under autocast
        normed: Tensor = self.norm((o.flatten(-2) if self.all_heads else o).to(weight.dtype))
        return normed.to(o.dtype).view_as(o)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension of ``x`` to length one.

    ``eps`` is inside the root, so that the gradient at zero (silence, padding) is at most ``eps^-1/2``.
    """
    wide = x if x.element_size() >= 4 else x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
