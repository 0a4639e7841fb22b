"""What only the Triton backend of `linear_recurrence` has: segments of a sequence, and sizes it refuses."""

import importlib.util
from typing import Any

import pytest
import torch
from cases.linear import make
from torch import Tensor

from mainstem import kernels

# Calls by keyword dictionaries say nothing to a type checker.
linear_recurrence: Any = kernels.linear_recurrence

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there: nothing is interpreted"),
]


def _gradients(inputs: dict[str, Tensor], backend: str, dtype: torch.dtype, **how: Any) -> list[Tensor]:
    x = {name: y.to(dtype).requires_grad_() for name, y in inputs.items()}
    outputs = linear_recurrence(**x, **how, backend=backend, return_final_state=True)
    loss = sum((y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, list(x.values()))]


@pytest.mark.parametrize(
    "K", [9, 40]
)  # a walk that writes the outputs, and one that leaves them to the chunks
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_segments_equal_the_whole(decay: str, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("mainstem.kernels.linear.triton")
    monkeypatch.setattr(triton, "SHORTEST_SEGMENT", 1)
    joined, join = [], triton._join

    def joining(*args: Any) -> Any:
        joined.append(args)
        return join(*args)

    monkeypatch.setattr(triton, "_join", joining)
    inputs = make(1, 300, 2, decay, H=1, K=K, V=5)
    how = {"cu_seqlens": torch.tensor([0, 20, 300]), "reverse": decay == "token"}
    got = _gradients(inputs, "triton", torch.float32, **how)
    assert len(joined) == 2  # forwards and backwards
    for x, wanted in zip(got, _gradients(inputs, "reference", torch.float64, **how), strict=True):
        assert (x - wanted).abs().max() < 2e-5 * wanted.abs().max().clamp(min=1)


def test_head_sizes_beyond_256_are_refused() -> None:
    inputs = {name: y.float() for name, y in make(1, 3, None, "none", H=1, K=9, V=257).items()}
    with pytest.raises(ValueError, match="serves heads of at most 256 channels, and these have 257"):
        linear_recurrence(**inputs, backend="triton")
