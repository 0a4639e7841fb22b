"""One residual block: token mixer, then channel mixer, each after a norm."""

import torch
from torch import Tensor, nn

from .channel import SwiGLU
from .config import BackboneConfig
from .mixers import Mixer, build_mixer
from .norms import EPS
from .packed import sequence_ids
from .state import State


def drop_path(x: Tensor, rate: float, cu_seqlens: Tensor | None) -> Tensor:
    """Zero ``x`` (B, T, D) for a random share ``rate`` of the sequences, and scale up the others."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keep = x.new_empty(sequences, 1).bernoulli_(1 - rate) / (1 - rate)
    return x * (keep[:, None] if cu_seqlens is None else keep[sequence_ids(cu_seqlens, x.shape[1])])


class Branch(nn.Module):
    """What happens to a branch before it is added: dropout, layer scale, drop path."""

    def __init__(self, config: BackboneConfig, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.dropout = nn.Dropout(config.dropout)
        scale = config.layer_scale
        self.scale = None if scale is None else nn.Parameter(torch.full((config.dim,), scale))

    def forward(self, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Map ``y`` (B, T, D) to ``(B, T, D)``."""
        y = self.dropout(y)
        if self.scale is not None:
            y = y * self.scale
        return drop_path(y, self.rate, cu_seqlens) if self.training and self.rate else y


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + channel(norm(x))``; ``(B, T, D)`` to ``(B, T, D)``.

    Args:
        config: of the backbone.
        layer: place in the stack, from 0.
    """

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        name = config.layers[layer]
        rate = config.drop_path * layer / max(1, config.depth - 1)
        self.norm = nn.RMSNorm(config.dim, eps=EPS)

        def mixer() -> Mixer:
            return build_mixer(
                name,
                config.dim,
                config.heads,
                backend=config.backend,
                causal=not config.bidirectional,
                layer=layer,
                depth=config.depth,
                **config.options_of(name),
            )

        self.mixer = mixer()
        self.reverse_mixer = mixer() if config.bidirectional and self.mixer.recurrent else None
        self.branch = Branch(config, rate)
        self.channel_norm: nn.Module | None = None
        if config.channel_mixer == "swiglu":
            self.channel_norm = nn.RMSNorm(config.dim, eps=EPS)
            self.channel = SwiGLU(config.dim, config.width)
            self.channel_branch = Branch(config, rate)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State]:
        """Map ``x`` (B, T, D) to ``(B, T, D)`` and the mixer's state, empty without ``return_state``."""
        normed = self.norm(x)
        after: State = {}
        if return_state:
            y, after = self.mixer(normed, cu_seqlens=cu_seqlens, state=state, return_state=True)
        else:
            y = self.mixer(normed, cu_seqlens=cu_seqlens, state=state)
        if self.reverse_mixer is not None:
            y = y + self.reverse_mixer(normed, cu_seqlens=cu_seqlens, reverse=True)
        return self._mix_channels(x + self.branch(y, cu_seqlens), cu_seqlens), after

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one token ``x`` (B, D) of each sequence."""
        y, after = self.mixer.step(self.norm(x), state)
        x = x + self.branch(y.unsqueeze(1), None).squeeze(1)
        return self._mix_channels(x.unsqueeze(1), None).squeeze(1), after

    def _mix_channels(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if self.channel_norm is None:
            return x
        y: Tensor = self.channel_branch(self.channel(self.channel_norm(x)), cu_seqlens)
        return x + y
