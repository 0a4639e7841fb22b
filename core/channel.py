"""Channel mixers: what happens to a token by itself."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """``W_o (silu(W_g x) ⊙ W_u x)`` (Shazeer 2020, arXiv:2002.05202); ``(…, D)`` to ``(…, D)``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (…, D) to ``(…, D)``."""
        gate, up = self.in_proj(x).chunk(2, -1)
        y: Tensor = self.out_proj(F.silu(gate) * up)
        return y


def default_hidden(dim: int) -> int:
    """8/3·dim, rounded to a multiple of 8: SwiGLU then has the parameters of a 4·dim two-layer network."""
    return max(8, round(dim * 8 / 3 / 8) * 8)
