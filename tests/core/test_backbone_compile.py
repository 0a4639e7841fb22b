"""The backbone as one graph: ``torch.compile(fullgraph=True)`` and ``torch.export``."""

from typing import Any

import pytest
import torch

from mainstem import Backbone
from mainstem.core.mixers import MIXERS
from mainstem.kernels.dispatch import offers

CU = torch.tensor([0, 4, 4, 18], dtype=torch.int32)


# Each mixer on its fastest backend, and one mixer of each matrix-state kernel on the chunked one too.
CASES = [(name, "cpu" if offers(MIXERS[name].mixer.operation, "cpu") else "chunked") for name in MIXERS]
CASES += [("gla", "chunked"), ("gated_deltanet", "chunked")]


@pytest.mark.parametrize(("mixer", "backend"), CASES)
def test_compiles_as_one_graph(mixer: Any, backend: str) -> None:
    torch.compiler.reset()
    net = Backbone(dim=8, heads=2, depth=1, mixer=mixer, backend=backend)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    flat = torch.randn(1, 18, 8)
    expected = torch.autograd.grad(net(flat, cu_seqlens=CU).square().sum(), list(net.parameters()))
    got = torch.autograd.grad(compiled(flat, cu_seqlens=CU).square().sum(), list(net.parameters()))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("mixer", "backend"), CASES)
def test_exports(mixer: Any, backend: str) -> None:
    net = Backbone(dim=8, heads=2, depth=1, mixer=mixer, backend=backend).eval()
    x = torch.randn(2, 9, 8)
    flat = x.view(1, 18, 8)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: auto, 1: auto}})
    longer = torch.randn(3, 30, 8)
    torch.testing.assert_close(program.module()(longer), net(longer))
    packed = torch.export.export(net, (flat,), {"cu_seqlens": CU})
    torch.testing.assert_close(packed.module()(flat, cu_seqlens=CU), net(flat, cu_seqlens=CU))


def test_compile_in_place_serves_chunks_with_state() -> None:
    torch.compiler.reset()
    net = Backbone(dim=8, heads=2, mixer=["gla", "attention"], bidirectional=False)
    x = torch.randn(2, 9, 8)
    expected = net(x)
    net.compile(backend="aot_eager", fullgraph=True)
    first, state = net(x[:, :5], return_state=True)
    second, _ = net(x[:, 5:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)


def test_a_bidirectional_backbone_compiles() -> None:
    torch.compiler.reset()
    net = Backbone(dim=8, heads=2, mixer=["mamba2", "attention"], bidirectional=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(compiled(x), net(x))
