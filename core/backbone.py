"""The backbone: a stack of blocks over any token mixer. Shapes: B sequences, T tokens, D = ``dim`` channels.

>>> import torch
>>> net = Backbone(dim=32, depth=2, mixer=["mamba2", "attention"])
>>> x = torch.randn(3, 10, 32)
>>> y = net(x)                                                # (B, T, D), causal
>>> padded = net(x, lengths=torch.tensor([10, 4, 7]))         # no token sees padding
>>> packed = net(x.reshape(1, 30, 32), cu_seqlens=torch.tensor([0, 10, 20, 30], dtype=torch.int32))
>>> torch.allclose(packed.view(3, 10, 32), y, atol=1e-5)
True
>>> first, state = net(x[:, :6], return_state=True)           # chunk by chunk
>>> second, state = net(x[:, 6:9], state=state, return_state=True)
>>> last, state = net.step(x[:, 9], state)                    # one token
>>> torch.allclose(torch.cat([first, second, last[:, None]], 1), y, atol=1e-5)
True
"""

from dataclasses import asdict, fields
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import Block
from .config import BackboneConfig
from .hub import MODEL_CARD, Pretrained
from .mixers import MixerName
from .norms import EPS
from .packed import pack, unpack
from .state import BackboneState, State


class Backbone(nn.Module, Pretrained, library_name="mainstem", model_card_template=MODEL_CARD):
    """Pre-norm stack of token and channel mixers; ``(B, T, D)`` to ``(B, T, D)``.

    Args:
        mixer: a short name, or a pattern that repeats over the depth.
        dim: D.
        depth: number of blocks.
        heads: heads of every mixer.
        bidirectional: whether a token sees later ones too.
        channel_mixer: what follows the token mixer in a block.
        hidden: width of SwiGLU.
        dropout: after every mixer.
        drop_path: stochastic depth of the last block.
        layer_scale: initial factor of every branch.
        checkpointing: recompute the blocks in the backward pass.
        backend: of the kernels.
        options: the mixers' own settings. `BackboneConfig` says more of each.

    Raises:
        ValueError: a field that is unknown or does not fit.
    """

    config: BackboneConfig

    def __init__(
        self,
        *,
        mixer: MixerName | list[MixerName] = "gla",
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        bidirectional: bool = False,
        channel_mixer: Literal["swiglu", "none"] = "swiglu",
        hidden: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
        backend: str = "auto",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = BackboneConfig(
            mixer=mixer,
            dim=dim,
            depth=depth,
            heads=heads,
            bidirectional=bidirectional,
            channel_mixer=channel_mixer,
            hidden=hidden,
            dropout=dropout,
            drop_path=drop_path,
            layer_scale=layer_scale,
            checkpointing=checkpointing,
            backend=backend,
            options=dict(options or {}),
        )
        self.blocks = nn.ModuleList(Block(self.config, layer) for layer in range(depth))
        self.norm = nn.RMSNorm(dim, eps=EPS)

    @classmethod
    def from_config(cls, config: BackboneConfig) -> Self:
        """Make a backbone of ``config``."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(config)})

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        state: BackboneState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Run over ``x`` (B, T, D).

        Args:
            x: ``(B, T, D)``; with ``cu_seqlens`` packed ``(1, T, D)``.
            cu_seqlens: ``(S+1,)`` bounds of sequences that lie end to end.
            lengths: ``(B,)`` tokens of each sequence; the rest is padding, which comes back as zeros.
            state: of an earlier call, to go on from there; causal only.
            return_state: also give the state after the last token.

        Returns:
            ``y`` like ``x``, or ``(y, state)``.

        Raises:
            ValueError: shapes that do not fit, both ``cu_seqlens`` and ``lengths``, or a state of a
            bidirectional net.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.dim:
            raise ValueError(f"x must be (B, T, {self.config.dim}), got {tuple(x.shape)}")
        if self.config.bidirectional and (state is not None or return_state):
            raise ValueError("a bidirectional backbone has no state: every token sees the later ones")
        if lengths is not None:
            if cu_seqlens is not None:
                raise ValueError("give cu_seqlens (packed) or lengths (padded), not both")
            padded_length = x.shape[1]
            x, cu_seqlens = pack(x, lengths)
        states = self._states(state)
        after = []
        for block, before in zip(self._blocks(), states):
            x, state_after = self._run(block, x, cu_seqlens, before, return_state)
            after.append(state_after)
        y: Tensor = self.norm(x)
        if lengths is not None and cu_seqlens is not None:
            y = unpack(y, cu_seqlens, padded_length)
        return (y, after) if return_state else y

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _states(self, state: BackboneState | None) -> list[State] | list[None]:
        if state is None:
            return [None] * len(self.blocks)
        if len(state) != len(self.blocks):
            raise ValueError(f"state is of {len(state)} blocks, and this backbone has {len(self.blocks)}")
        return state

    def _run(
        self, block: Block, x: Tensor, cu_seqlens: Tensor | None, state: State | None, return_state: bool
    ) -> tuple[Tensor, State]:
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            result = checkpoint(block, x, cu_seqlens, state, return_state, use_reentrant=False)
        else:
            result = block(x, cu_seqlens, state, return_state)
        y, after = result
        return y, after

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BackboneState:
        """State before the first token of ``batch`` sequences, where and as the parameters are by default."""
        self._check_causal()
        return [block.mixer.init_state(batch, device, dtype) for block in self._blocks()]

    def step(self, x: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
        """Take one token ``x`` (B, D) of each sequence: ``y`` (B, D) and the state after it.

        Raises:
            ValueError: the backbone is bidirectional, or shapes do not fit.
        """
        self._check_causal()
        if x.ndim != 2 or x.shape[-1] != self.config.dim:
            raise ValueError(f"x must be (B, {self.config.dim}), got {tuple(x.shape)}")
        after = []
        self._states(state)  # checks it
        for block, before in zip(self._blocks(), state):
            x, state_after = block.step(x, before)
            after.append(state_after)
        y: Tensor = self.norm(x)
        return y, after

    def _check_causal(self) -> None:
        if self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no state: every token sees the later ones")

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the decoding state of ``batch`` sequences after ``length`` tokens."""
        self._check_causal()
        return sum(block.mixer.state_bytes(batch, length) for block in self._blocks())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every block in place (arguments of ``torch.compile``); ``state_dict`` keeps its keys."""
        for block in self.blocks:
            block.compile(*args, **kwargs)

    def hub_config(self) -> dict[str, Any]:
        """Give the fields of the configuration."""
        return asdict(self.config)
