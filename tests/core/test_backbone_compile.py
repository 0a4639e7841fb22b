"""The backbone as one graph: ``torch.compile(fullgraph=True)`` and ``torch.export``."""

from typing import Any

import pytest
import torch

from mainstem import Backbone
from mainstem.core.mixers import MIXERS
from mainstem.kernels.dispatch import offers

CU = torch.tensor([0, 4, 4, 18], dtype=torch.int32)


def backbone(mixer: Any, backend: str, **keywords: Any) -> Backbone:
    if not offers(MIXERS[mixer].mixer.operation, backend):
        pytest.skip(f"the kernel of {mixer} has no {backend} backend")
    return Backbone(dim=8, heads=2, depth=1, mixer=mixer, backend=backend, **keywords)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_compiles_as_one_graph(backend: str, mixer_name: str) -> None:
    torch.compiler.reset()
    net = backbone(mixer_name, backend)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 8)
    flat = x.view(1, 18, 8)
    torch.testing.assert_close(compiled(flat, cu_seqlens=CU), net(flat, cu_seqlens=CU))
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_exports(backend: str, mixer_name: str) -> None:
    net = backbone(mixer_name, backend).eval()
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
