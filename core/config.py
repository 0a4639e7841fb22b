"""What a `Backbone` is made of, as data: for configuration files, the command line and checkpoints."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..kernels.dispatch import check_backend, offers
from .channel import default_hidden
from .mixers import MIXERS, MixerName, check_mixer

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass(kw_only=True)
class BackboneConfig:
    """The fields of a `Backbone`; ``config.build()`` makes one.

    Attributes:
        mixer: a short name of `MIXERS`, or a pattern that repeats over the depth.
        dim: width of the tokens.
        depth: number of blocks.
        heads: heads of every mixer; divides dim.
        bidirectional: whether a token sees later ones too. Attention loses its mask; any other mixer gets a
            second instance that runs in reverse, and the two outputs are added.
        channel_mixer: what follows the token mixer in a block.
        hidden: width of SwiGLU; ``None`` is 8/3·dim rounded to a multiple of 8.
        dropout: after every mixer.
        drop_path: chance that a sequence skips a branch of the last block (Huang et al. 2016,
            arXiv:1603.09382); it rises linearly from 0 over the depth.
        layer_scale: initial value of a learned factor a channel on every branch (arXiv:2103.17239); ``None``:
            no factor.
        checkpointing: recompute the blocks in the backward pass, to save memory.
        backend: of the kernels; an operation without that backend takes its own default.
        options: the mixers' own settings by name. In a pattern a setting goes to every mixer that has it; a
            mixer's name as key holds settings for that mixer alone.
    """

    mixer: MixerName | list[MixerName] = "gla"
    dim: int = 64
    depth: int = 2
    heads: int = 4
    bidirectional: bool = False
    channel_mixer: Literal["swiglu", "none"] = "swiglu"
    hidden: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    checkpointing: bool = False
    backend: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"backbone.{name} = {getattr(self, name)} must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"backbone.heads = {self.heads} must divide backbone.dim = {self.dim}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"backbone.{name} = {getattr(self, name)} must be at least 0 and below 1")
        if self.channel_mixer not in ("swiglu", "none"):
            raise ValueError(f"backbone.channel_mixer = {self.channel_mixer!r}: choose one of swiglu, none")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"backbone.hidden = {self.hidden} must be at least 1, or null for 8/3·dim")
        if not self.pattern:
            raise ValueError("backbone.mixer = []: name at least one mixer")
        for mixer in self.pattern:
            check_mixer(mixer)
        self._check_options()
        self._check_backend()

    @property
    def pattern(self) -> list[str]:
        """The mixers that repeat over the depth."""
        return [self.mixer] if isinstance(self.mixer, str) else list(self.mixer)

    @property
    def layers(self) -> list[str]:
        """The mixer of every block."""
        return [self.pattern[layer % len(self.pattern)] for layer in range(self.depth)]

    @property
    def width(self) -> int:
        """Hidden width of SwiGLU."""
        return self.hidden or default_hidden(self.dim)

    def options_of(self, mixer: str) -> dict[str, Any]:
        """Settings for ``mixer``."""
        accepted = MIXERS[mixer].options()
        shared = {name: value for name, value in self.options.items() if name in accepted}
        own: dict[str, Any] = self.options.get(mixer, {})
        return shared | own

    def build(self) -> "Backbone":
        """Make the `Backbone`."""
        from .backbone import Backbone

        return Backbone.from_config(self)

    def _check_options(self) -> None:
        accepted = {name for mixer in self.pattern for name in MIXERS[mixer].options()}
        for name in self.options:
            if name not in accepted and name not in self.pattern:
                raise ValueError(
                    f"backbone.options: mixer {self.mixer!r} has no option {name!r}; "
                    f"it accepts {', '.join(sorted(accepted)) or 'none'}"
                )

    def _check_backend(self) -> None:
        check_backend(self.backend)
        if self.backend == "auto":
            return
        operations = {MIXERS[mixer].mixer.operation for mixer in self.pattern}
        if not any(offers(operation, self.backend) for operation in operations):
            raise ValueError(
                f"backbone.backend = {self.backend!r}: mixer {self.mixer!r} has no such kernel; choose auto"
            )
