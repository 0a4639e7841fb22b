"""The operations that `mainstem bench` times: their inputs, their variants and how much work they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]


class Shape(NamedTuple):
    """Batch, length, heads and head size; elementwise operations have ``heads * dim`` channels."""

    batch: int
    length: int
    heads: int
    dim: int

    @property
    def tokens(self) -> int:
        """Tokens in the whole batch."""
        return self.batch * self.length

    @property
    def channels(self) -> int:
        """Width of a token."""
        return self.heads * self.dim


@dataclass(frozen=True)
class Operation:
    """A public function of ``kernels`` and how to call it."""

    name: str
    folder: str
    variants: tuple[str, ...]
    inputs: Callable[[str, Shape], Inputs]
    work: Callable[[str, Shape], float]
    """Floating-point operations of a forward call, or bytes read and written where ``unit`` is GB/s."""
    unit: str = "GFLOP/s"
    keywords: Callable[[str], dict[str, Any]] = lambda variant: {}
    differentiable: bool = True

    def bind(self, variant: str, backend: str) -> Call:
        """Return a function of the inputs alone."""
        function = getattr(kernels, self.name)
        keywords = self.keywords(variant)

        def call(inputs: Inputs) -> Tensor:
            result: Tensor = function(**inputs, **keywords, backend=backend)
            return result

        return call


def _normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def _unit(*size: int) -> Tensor:
    return F.normalize(_normal(*size), dim=-1)


def _decay(variant: str, shape: Shape) -> Inputs:
    B, T, H, K = shape
    sizes = {"none": None, "head": (H,), "token": (B, T, H), "key": (B, T, H, K)}
    size = sizes[variant]
    return {} if size is None else {"decay": F.logsigmoid(_normal(*size))}


def _linear(variant: str, shape: Shape) -> Inputs:
    B, T, H, K = shape
    q, k, v = (_normal(B, T, H, K) for _ in range(3))
    return {"q": q, "k": k, "v": v} | _decay(variant, shape)


def _delta(variant: str, shape: Shape) -> Inputs:
    B, T, H, K = shape
    inputs = {"q": _unit(B, T, H, K), "k": _unit(B, T, H, K), "v": _normal(B, T, H, K)}
    return inputs | {"beta": torch.sigmoid(_normal(B, T, H))} | _decay(variant, shape)


def _generalized_delta(variant: str, shape: Shape) -> Inputs:
    B, T, H, K = shape
    q, k, a = (_unit(B, T, H, K) for _ in range(3))
    erased = -a * torch.sigmoid(_normal(B, T, H, K))
    return {"q": q, "k": k, "v": _normal(B, T, H, K), "a": a, "b": erased} | _decay(variant, shape)


_FACTORS = 2


def _delta_product(variant: str, shape: Shape) -> Inputs:
    B, T, H, K = shape
    inputs = {"q": _unit(B, T, H, K), "k": _unit(B, T, _FACTORS, H, K), "v": _normal(B, T, _FACTORS, H, K)}
    return inputs | {"beta": torch.sigmoid(_normal(B, T, _FACTORS, H))} | _decay(variant, shape)


_STATES = 16


def _selective(variant: str, shape: Shape) -> Inputs:
    B, T, D = shape.batch, shape.length, shape.channels
    inputs = {
        name: _normal(B, T, size) for name, size in (("x", D), ("z", D), ("B", _STATES), ("C", _STATES))
    }
    inputs["dt"] = F.softplus(_normal(B, T, D) - 3)
    # As Mamba starts: A = −1 … −N in every channel.
    inputs["A"] = -torch.arange(1, _STATES + 1, dtype=torch.float64).repeat(D, 1)
    return inputs | {"D": _normal(D)}


_MINI_BATCH = 16


def _ttt(variant: str, shape: Shape) -> Inputs:
    B, T, H, D = shape
    inputs = {name: _normal(B, T, H, D) for name in "qkv"} | {"rate": torch.sigmoid(_normal(B, T, H)) / D}
    inputs["schedule"] = 1 / torch.arange(1, _MINI_BATCH + 1, dtype=torch.float64)
    # A model to begin with: the LayerNorm of nothing has no useful gradient.
    state = F.pad(_normal(B, H, D, D) / D**0.5, (0, 0, 0, D + 3))
    return inputs | {"gain": 1 + 0.1 * _normal(H, D), "offset": 0.1 * _normal(H, D), "initial_state": state}


def _elementwise(variant: str, shape: Shape) -> Inputs:
    size = (shape.batch, shape.length, shape.channels)
    a, b = torch.sigmoid(_normal(*size)), _normal(*size)
    if variant == "complex":
        return {"a": torch.polar(a, _normal(*size)), "b": torch.complex(b, _normal(*size))}
    return {"a": a, "b": b}


def _logsumexp(variant: str, shape: Shape) -> Inputs:
    B, T, H, V = shape
    return {"s": _normal(B, T, H), "v": _normal(B, T, H, V)}


def _logcumsumexp(variant: str, shape: Shape) -> Inputs:
    return {"s": _normal(shape.batch, shape.length, shape.channels)}


def _max_plus(variant: str, shape: Shape) -> Inputs:
    size = (shape.batch, shape.length, shape.channels)
    return {"g": F.logsigmoid(_normal(*size)), "i": _normal(*size)}


_CONVOLUTION_WIDTH = 4


def _convolution(variant: str, shape: Shape) -> Inputs:
    D = shape.channels
    weight = _normal(D, _CONVOLUTION_WIDTH) / _CONVOLUTION_WIDTH**0.5
    return {"x": _normal(shape.batch, shape.length, D), "weight": weight, "bias": _normal(D)}


def _long_convolution(variant: str, shape: Shape) -> Inputs:
    D, T = shape.channels, shape.length
    kernel = _normal(D, T) * torch.exp(-torch.arange(T, dtype=torch.float64) / 64)
    return {"x": _normal(shape.batch, T, D), "kernel": kernel, "skip": _normal(D)}


def _attention(variant: str, shape: Shape) -> Inputs:
    B, T, H, K = shape
    return {name: _normal(B, T, H, K) for name in "qkv"}


_GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}


def _rnn(variant: str, shape: Shape) -> Inputs:
    B, T, H, D = shape
    G = _GATES[variant]
    return {"x": _normal(B, T, G, H, D), "R": _normal(G, H, D, D) / D**0.5, "b": _normal(G, H, D)}


def _matrix_state_flops(products: int) -> Callable[[str, Shape], float]:
    """Two FLOP per product with the ``K×V`` state, and one per entry where it decays."""

    def flops(variant: str, shape: Shape) -> float:
        return (2 * products + (variant != "none")) * shape.dim**2 * shape.heads * shape.tokens

    return flops


def _channel_bytes(tensors: int) -> Callable[[str, Shape], float]:
    def count(variant: str, shape: Shape) -> float:
        return tensors * (8 if variant == "complex" else 4) * shape.channels * shape.tokens

    return count


DECAYS = ("none", "head", "token", "key")

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("linear_recurrence", "linear", DECAYS, _linear, _matrix_state_flops(2)),
        Operation("delta_rule", "delta", ("none", "token", "key"), _delta, _matrix_state_flops(3)),
        Operation(
            "generalized_delta_rule",
            "dplr",
            ("none", "token", "key"),
            _generalized_delta,
            _matrix_state_flops(4),
        ),
        Operation(
            "delta_product",
            "delta",
            ("none", "token", "key"),
            _delta_product,
            _matrix_state_flops(1 + 2 * _FACTORS),
        ),
        Operation(
            "selective_scan",
            "selective",
            (f"state {_STATES}",),
            _selective,
            lambda variant, shape: 7.0 * _STATES * shape.channels * shape.tokens,
        ),
        Operation(
            "ttt_linear",
            "ttt",
            (f"mini-batch {_MINI_BATCH}",),
            _ttt,
            lambda variant, shape: (8.0 * shape.dim + 6.0 * _MINI_BATCH) * shape.channels * shape.tokens,
        ),
        Operation("elementwise_scan", "scan", ("real", "complex"), _elementwise, _channel_bytes(3), "GB/s"),
        Operation("logsumexp_scan", "scan", ("real",), _logsumexp, _channel_bytes(2), "GB/s"),
        Operation("logcumsumexp", "scan", ("real",), _logcumsumexp, _channel_bytes(2), "GB/s"),
        Operation(
            "max_plus_scan", "scan", ("real",), _max_plus, _channel_bytes(3), "GB/s", differentiable=False
        ),
        Operation(
            "short_convolution",
            "conv",
            (f"width {_CONVOLUTION_WIDTH}",),
            _convolution,
            _channel_bytes(2),
            "GB/s",
            keywords=lambda variant: {"activation": "silu"},
        ),
        Operation(
            "long_convolution",
            "long_conv",
            ("filter of T",),
            _long_convolution,
            _channel_bytes(2),
            "GB/s",
        ),
        Operation(
            "attention",
            "attention",
            ("causal",),
            _attention,
            lambda variant, shape: 2.0 * shape.length * shape.tokens * shape.channels,
            keywords=lambda variant: {"causal": True},
        ),
        Operation(
            "gated_rnn",
            "rnn",
            ("lstm", "gru", "slstm", "elman"),
            _rnn,
            lambda variant, shape: 2.0 * _GATES[variant] * shape.dim * shape.channels * shape.tokens,
            keywords=lambda variant: {"cell": variant},
        ),
    )
}


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Give the inputs their type; what makes a decay never has less than float32, as in the mixers."""
    complex_dtype = {torch.float64: torch.complex128}.get(dtype, torch.complex64)

    def one(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, complex_dtype)
        wide = name in ("decay", "A") and dtype in (torch.bfloat16, torch.float16)
        return tensor.to(device, torch.float32 if wide else dtype)

    return {name: one(name, tensor) for name, tensor in inputs.items()}
