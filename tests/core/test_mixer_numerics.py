"""Gradients are right, half precision stays finite, hostile inputs do too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mainstem import Backbone
from mainstem.core.mixers import Mixer, build_mixer

Build = Callable[..., Mixer]
Tokens = Callable[..., Tensor]


def test_gradients_through_time_and_state(variant: str, build: Build, tokens: Tokens) -> None:
    mixer = build(variant)
    names = [name for name, _ in mixer.named_parameters()]

    def two_chunks(x: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters))
        first, state = functional_call(mixer, values, (x[:, :3],), {"return_state": True})
        second = functional_call(mixer, values, (x[:, 3:],), {"state": state})
        return torch.cat([first, second], 1)

    inputs = [tokens(1, 5), *(p.detach().clone() for p in mixer.parameters())]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(two_chunks, inputs, fast_mode=True)


def test_gradients_of_packed_and_reversed_tokens(
    recurrent_variant: str, build: Build, tokens: Tokens
) -> None:
    mixer, cu = build(recurrent_variant), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x = tokens(1, 5).requires_grad_()
    for reverse in (False, True):
        run = lambda x: mixer(x, cu_seqlens=cu, reverse=reverse)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, x, fast_mode=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_and_huge_inputs_stay_finite(dtype: torch.dtype, scale: float, mixer_name: str) -> None:
    mixer = build_mixer(mixer_name, dim=8, heads=2).to(dtype)
    x = torch.full((1, 70, 8), scale, dtype=dtype, requires_grad=True)
    y = mixer(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    gradients = [x.grad, *(p.grad for p in mixer.parameters())]
    assert y.isfinite().all()
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_half_precision_is_near_single(mixer_name: str) -> None:
    net = Backbone(dim=32, heads=2, mixer=mixer_name)  # type: ignore[arg-type]
    x = torch.randn(2, 64, 32)
    exact = net(x)
    state = net.init_state(2, dtype=torch.bfloat16)
    half = net.bfloat16()
    y, state = half(x.bfloat16(), state=state, return_state=True)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).square().mean().sqrt() < 0.04 * exact.square().mean().sqrt()
    stepped, _ = half.step(x[:, 0].bfloat16(), state)
    assert stepped.dtype == torch.bfloat16


def test_autocast_runs_and_is_near_single(mixer_name: str) -> None:
    net = Backbone(dim=32, heads=2, mixer=mixer_name)  # type: ignore[arg-type]
    x = torch.randn(2, 33, 32)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.float().sum().backward()
    assert (y.float() - exact).square().mean().sqrt() < 0.04 * exact.square().mean().sqrt()


def test_long_memory_of_a_growing_score_does_not_overflow() -> None:
    for name in ("mlstm", "lightnet", "aaren"):
        mixer = build_mixer(name, dim=8, heads=2)
        x = torch.linspace(0, 1e3, 300)[None, :, None].expand(1, 300, 8)
        assert mixer(x).isfinite().all()
        assert mixer(-x).isfinite().all()
