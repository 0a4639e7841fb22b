"""What the scans are measured beside: the public implementations that are installed here.

A peer takes the inputs of `operations.Operation` as they are and returns its output in the same layout, so
that it is compared with the same reference and timed on the same numbers. Where it computes something else
(attention instead of a recurrence) it says so, and only its time counts.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .operations import Call, Inputs

Calls = Mapping[str, Callable[[str], Call | None]]
"""By operation: the call for a variant, or ``None`` where the peer has none."""
CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation of some of the operations.

    Attributes:
        name: as it stands in the table.
        calls: what it computes.
        package: the module that has to be importable.
        distribution: whose version is reported, where it is not called like the module.
        devices: where it runs.
        same: whether its output is the operation's, up to rounding.
        shared: whether all its calls are one and the same, so that it is measured once for a shape.
    """

    name: str
    calls: Calls
    package: str = "torch"
    distribution: str = ""
    devices: tuple[str, ...] = (CPU, CUDA)
    same: bool = True
    shared: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be measured on ``device``, or ``None`` if it can."""
        if device.type not in self.devices:
            return f"measured on {self.devices[0]} only"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution or self.package} is not installed"
        return None

    def find(self, operation: str, variant: str) -> Call | None:
        """Return the peer's function of the operation's inputs, or ``None``."""
        make = self.calls.get(operation)
        return None if make is None else make(variant)


@cache
def _function(module: str, name: str) -> Callable[..., Any]:
    """Import what a peer offers.

    Raises:
        RuntimeError: this version of it does not, or it cannot be imported.
    """
    package = module.partition(".")[0]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise RuntimeError(f"{package} gives no {name}: {first}") from problem
    return found


def _always(call: Call) -> Callable[[str], Call]:
    return lambda variant: call


def sdpa_causal(inputs: Inputs) -> Tensor:
    """Call ``scaled_dot_product_attention(is_causal=True)`` on q, k, v ``(B, T, H, D)``."""
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _sdpa_by(backend: SDPBackend) -> Call:
    def call(inputs: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa_causal(inputs)

    return call


_MATRIX_STATE = ("attention", "linear_recurrence", "delta_rule", "generalized_delta_rule")


def _sdpa(call: Call) -> Calls:
    return {operation: _always(call) for operation in _MATRIX_STATE}


def _conv1d(inputs: Inputs) -> Tensor:
    x, weight = inputs["x"], inputs["weight"]
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    y: Tensor = F.conv1d(padded, weight[:, None], inputs["bias"], groups=x.shape[2])
    return F.silu(y).transpose(1, 2)


def _fft(inputs: Inputs) -> Tensor:
    x, kernel = inputs["x"], inputs["kernel"]
    size = x.shape[1] + kernel.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft(x.to(wide), size, dim=1) * torch.fft.rfft(kernel.to(wide).T, size, dim=0)
    y: Tensor = torch.fft.irfft(spectrum, size, dim=1)[:, : x.shape[1]]
    if "skip" in inputs:
        y = y + inputs["skip"] * x
    return y.to(x.dtype)


def _torch_rnn(variant: str) -> Call | None:
    """One ``torch.lstm``, ``torch.gru`` or ``torch.rnn_tanh`` a head.

    It has one input channel, so that its projection of the input, which `gated_rnn` leaves to the caller,
    costs nothing. The input is therefore another one.
    """
    runs: dict[str, Callable[..., Any]] = {"lstm": torch.lstm, "gru": torch.gru, "elman": torch.rnn_tanh}
    run = runs.get(variant)
    if run is None:
        return None

    def call(inputs: Inputs) -> Tensor:
        x, R, b = inputs["x"], inputs["R"], inputs["b"]
        B, _, _, H, D = x.shape
        outputs = []
        for h in range(H):
            recurrent, bias = R[:, h].flatten(0, 1), b[:, h].flatten()
            zero = x.new_zeros(1, B, D)
            start = (zero, zero) if variant == "lstm" else zero
            parameters = [bias[:, None], recurrent, bias, bias]
            # has_biases, layers, dropout, train, bidirectional, batch_first
            outputs.append(run(x[:, :, 0, h, :1], start, parameters, True, 1, 0.0, True, False, True)[0])
        return torch.stack(outputs, 2)

    return call


def _mamba_scan(module: str, name: str) -> Call:
    def call(inputs: Inputs) -> Tensor:
        wanted = {"x", "dt", "A", "B", "C"}
        timed = {key: inputs[key].transpose(1, 2) for key in (*(wanted - {"A"}), *({"z"} & set(inputs)))}
        x, dt, B, C = (timed[key] for key in ("x", "dt", "B", "C"))
        y = _function(module, name)(x, dt, inputs["A"], B, C, inputs.get("D"), timed.get("z"))
        result: Tensor = y.transpose(1, 2)
        return result

    return call


_HF_CHUNK = 256
"""What the configuration of the Mamba-2 model of transformers has unless told otherwise."""


def _hf_mamba2(variant: str) -> Call | None:
    if variant != "token":
        return None
    module = "transformers.models.mamba2.modeling_mamba2"

    def call(inputs: Inputs) -> Tensor:
        q, k, v, dt = inputs["q"] * inputs["q"].shape[-1] ** -0.5, inputs["k"], inputs["v"], -inputs["decay"]
        A = -torch.ones_like(dt[0, 0])
        y: Tensor = _function(module, "mamba2_chunk_scan")(v / dt[..., None], dt, A, k, q, _HF_CHUNK)
        return y

    return call


def _fla(name: str, *positional: str, module: str = "fla.ops", **fixed: Any) -> Call:
    """Call ``fla.ops.<name>`` by keywords, the inputs renamed: ``"g=decay"`` passes the decay as g."""

    def call(inputs: Inputs) -> Tensor:
        named = (entry.partition("=") for entry in positional)
        keywords = {target: inputs[source or target] for target, _, source in named}
        y: Tensor = _function(module, name)(**keywords, **fixed)[0]
        return y

    return call


def _fla_linear(variant: str) -> Call | None:
    qkv = ("q", "k", "v")
    return {
        "none": _fla("chunk_simple_gla", *qkv),
        "head": _fla("chunk_simple_gla", *qkv, "g_gamma=decay"),
        "token": _fla("chunk_simple_gla", *qkv, "g=decay"),
        "key": _fla("chunk_gla", *qkv, "g=decay"),
    }.get(variant)


def _fla_delta(variant: str) -> Call | None:
    inputs = ("q", "k", "v", "beta")
    return {
        "none": _fla("chunk_delta_rule", *inputs),
        "token": _fla("chunk_gated_delta_rule", *inputs, "g=decay"),
        "key": _fla("chunk_kda", *inputs, "g=decay"),
    }.get(variant)


def _fla_dplr(variant: str) -> Call | None:
    if variant != "key":
        return None
    return _fla("chunk_dplr_delta_rule", "q", "k", "v", "a", "b", "gk=decay")


def _fla_product(variant: str) -> Call | None:
    def call(inputs: Inputs) -> Tensor:
        factors = inputs["k"].shape[2]
        flat = {name: inputs[name].flatten(1, 2) for name in ("k", "v", "beta")}
        run = _function("fla.ops.gated_delta_product", "chunk_gated_delta_product")
        y: Tensor = run(q=inputs["q"], g=inputs.get("decay"), num_householder=factors, **flat)[0]
        return y

    return call if variant in ("none", "token") else None


def _fla_scan(variant: str) -> Call | None:
    def call(inputs: Inputs) -> Tensor:
        y: Tensor = _function("fla.ops.hgrn", "chunk_hgrn")(inputs["b"], inputs["a"].log())[0]
        return y

    return call if variant == "real" else None


def _fla_conv(inputs: Inputs) -> Tensor:
    run = _function("fla.modules.causal_conv1d.ops", "causal_conv1d")
    result = run(inputs["x"], inputs["weight"], inputs["bias"], activation="silu")
    y: Tensor = result[0] if isinstance(result, tuple) else result
    return y


def _causal_conv1d(inputs: Inputs) -> Tensor:
    run = _function("causal_conv1d", "causal_conv1d_fn")
    y: Tensor = run(inputs["x"].transpose(1, 2), inputs["weight"], inputs["bias"], activation="silu")
    return y.transpose(1, 2)


def _logcumsumexp(inputs: Inputs) -> Tensor:
    return torch.logcumsumexp(inputs["s"], 1)


_FLA: Calls = {
    "linear_recurrence": _fla_linear,
    "delta_rule": _fla_delta,
    "generalized_delta_rule": _fla_dplr,
    "delta_product": _fla_product,
    "elementwise_scan": _fla_scan,
    "short_convolution": _always(_fla_conv),
}
_HF = "transformers.models.mamba.modeling_mamba"
_TRANSFORMERS: Calls = {
    "linear_recurrence": _hf_mamba2,
    "selective_scan": _always(_mamba_scan(_HF, "mamba_selective_scan")),
}
_MAMBA: Calls = {
    "selective_scan": _always(_mamba_scan("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"))
}

PEERS = (
    Peer("torch SDPA", _sdpa(sdpa_causal), same=False, shared=True),
    Peer("SDPA flash", _sdpa(_sdpa_by(SDPBackend.FLASH_ATTENTION)), devices=(CUDA,), same=False, shared=True),
    Peer("SDPA cuDNN", _sdpa(_sdpa_by(SDPBackend.CUDNN_ATTENTION)), devices=(CUDA,), same=False, shared=True),
    Peer("torch RNN", {"gated_rnn": _torch_rnn}, same=False),
    Peer("torch conv1d", {"short_convolution": _always(_conv1d)}),
    Peer("torch fft", {"long_convolution": _always(_fft)}),
    Peer("torch logcumsumexp", {"logcumsumexp": _always(_logcumsumexp)}),
    Peer("transformers", _TRANSFORMERS, "transformers", devices=(CPU,)),
    Peer("fla", _FLA, "fla", "flash-linear-attention", (CUDA,)),
    Peer("mamba_ssm", _MAMBA, "mamba_ssm", "mamba-ssm", (CUDA,)),
    Peer(
        "causal_conv1d",
        {"short_convolution": _always(_causal_conv1d)},
        "causal_conv1d",
        "causal-conv1d",
        (CUDA,),
    ),
)


def versions() -> dict[str, str]:
    """Versions of the peers' packages that are installed, PyTorch aside."""
    found = {}
    for peer in PEERS:
        name = peer.distribution or peer.package
        try:
            if name != "torch":
                found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
