"""What every token mixer is: ``(B, T, D)`` to ``(B, T, D)``, in parallel, in chunks, or by the token."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ...kernels import dispatch, short_convolution, short_convolution_step
from ..state import State, num_bytes, state_dtype
from ..system import System

OPERATIONS = ("attention", "conv", "delta", "dplr", "linear", "long_conv", "rnn", "scan", "selective", "ttt")


@dataclass(frozen=True)
class Pass:
    """How one pass over the tokens runs.

    Attributes:
        cu_seqlens: bounds of packed sequences.
        reverse: from the last token to the first.
        keep_state: whether the caller wants the final state.
        one_token: T is 1, and the one-token kernels serve.
        backends: of the kernels, by folder.
    """

    cu_seqlens: Tensor | None = None
    reverse: bool = False
    keep_state: bool = False
    one_token: bool = False
    backends: Mapping[str, str] = field(default_factory=dict)

    def keywords(self, operation: str) -> dict[str, Any]:
        """Keywords of a kernel in the folder ``operation``."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "reverse": self.reverse,
            "return_final_state": True,
            "backend": self.backends.get(operation, "auto"),
        }


class Mixer(nn.Module, ABC):
    """Base of all token mixers.

    A subclass writes `mix`, `init_state` and, if it is a linear system, `system` and `read_out`.

    Args:
        dim: D, width of the tokens.
        heads: H.
        backend: of the kernels; an operation without a file for it takes its own default.
    """

    operation: ClassVar[str]
    """The kernel folder of the main recurrence."""
    recurrent: ClassVar[bool] = True
    """Whether bidirectional means a second instance that runs in reverse."""

    def __init__(self, dim: int, heads: int, backend: str = "auto") -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.dim, self.heads = dim, heads
        self.backends = {name: backend for name in OPERATIONS if dispatch.offers(name, backend)}

    @abstractmethod
    def mix(self, x: Tensor, p: Pass, state: State | None) -> tuple[Tensor, State]:
        """Map ``x`` (B, T, D) to ``(B, T, D)`` and the state after the last token."""

    @abstractmethod
    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """State before the first token of ``batch`` sequences."""

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        reverse: bool = False,
        return_state: bool = False,
    ) -> Any:
        """Mix ``x`` (B, T, D), or packed ``(1, T, D)`` with ``cu_seqlens``.

        Returns:
            ``y`` like ``x``; with ``return_state`` the pair ``(y, state)``.
        """
        y, after = self.mix(x, Pass(cu_seqlens, reverse, return_state, backends=self.backends), state)
        return (y, after) if return_state else y

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one token ``x`` (B, D) of each sequence: ``y`` (B, D) and the state after it."""
        p = Pass(keep_state=True, one_token=True, backends=self.backends)
        y, after = self.mix(x.unsqueeze(1), p, state)
        return y.squeeze(1), after

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of ``batch`` sequences after ``length`` tokens."""
        del length
        return num_bytes(self.init_state(batch, "meta"))

    def system(self, x: Tensor) -> System:
        """Give the time-varying linear system that this mixer is for the input ``x`` (B, T, D).

        ``mixer(x) = mixer.read_out(mixer.system(x).run(), x)``.

        Raises:
            NotImplementedError: the mixer is not a linear recurrence.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a linear recurrence, so it has no system()")

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Map the outputs ``o`` (B, T, H, V) of `system` to the mixer's output ``(B, T, D)``."""
        raise NotImplementedError(f"{type(self).__name__} is not a linear recurrence, so it has no read-out")

    def _zeros(
        self, *shape: int, device: torch.device | str | None, dtype: torch.dtype | None, fill: float = 0.0
    ) -> Tensor:
        dtype = state_dtype(dtype or next(self.parameters()).dtype)
        return torch.full(shape, fill, device=self._device(device), dtype=dtype)

    def _device(self, device: torch.device | str | None) -> torch.device | str:
        return device or next(self.parameters()).device


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then SiLU.

    Args:
        channels: D.
        width: W, how many tokens each output sees.
        bias: whether to add one.
    """

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"conv={width} must be 0 (none) or at least 2 tokens wide")
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-1, 1) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, p: Pass, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve ``x`` (B, T, D); the state is the last W-1 inputs ``(B|S, D, W-1)``."""
        if p.one_token and state is not None:
            y, after = short_convolution_step(x[:, 0], self.weight, self.bias, state, activation="silu")
            return y.unsqueeze(1), after
        y, after = short_convolution(
            x, self.weight, self.bias, activation="silu", initial_state=state, **p.keywords("conv")
        )
        return y, after


def pick(state: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    """Entry ``name`` of a state that may be absent."""
    return None if state is None else state.get(name)


def upcast(x: Tensor) -> Tensor:
    """Float32 at least: gates and decays are never computed in half precision."""
    return x.to(state_dtype(x.dtype))


def check_choices(row: object) -> None:
    """Raise ``ValueError`` where a field of the dataclass ``row`` is not one of the literals of its type."""
    for name, hint in get_type_hints(type(row)).items():
        if get_origin(hint) is Literal and getattr(row, name) not in get_args(hint):
            accepted = ", ".join(get_args(hint))
            raise ValueError(f"backbone.options: {name} = {getattr(row, name)!r}: choose one of {accepted}")


def head_size(dim: int, heads: int, expand: float, what: str) -> int:
    """Width of one head of ``expand · dim`` channels."""
    size = round(expand * dim / heads)
    if size < 1:
        raise ValueError(f"{what}={expand} leaves no channel a head with dim={dim}, heads={heads}")
    return size
