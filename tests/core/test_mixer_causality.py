"""A causal mixer never sees the future, not even by a bit; a bidirectional backbone sees both sides."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mainstem import Backbone
from mainstem.core.mixers import Mixer

Build = Callable[..., Mixer]
Tokens = Callable[..., Tensor]


def gradient_by_token(net: Callable[[Tensor], Tensor], x: Tensor, t: int) -> Tensor:
    """Largest absolute derivative of output ``t`` by each input token: (T,)."""
    x = x.clone().requires_grad_()
    weights = torch.randn(x.shape[-1], dtype=x.dtype)
    (gradient,) = torch.autograd.grad((net(x)[0, t] * weights).sum(), x)
    return gradient[0].abs().amax(-1)


@pytest.mark.parametrize("t", [0, 4])
def test_outputs_have_no_gradient_from_the_future(t: int, variant: str, build: Build, tokens: Tokens) -> None:
    mixer = build(variant)
    gradient = gradient_by_token(mixer, tokens(1, 7), t)
    assert torch.equal(gradient[t + 1 :], torch.zeros(6 - t, dtype=gradient.dtype))
    assert gradient[t] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_future_gives_the_same_past(
    dtype: torch.dtype, variant: str, build: Build, tokens: Tokens
) -> None:
    mixer, x = build(variant, dtype=dtype), tokens(1, 40, dtype)
    other = torch.cat([x[:, :33], 100 * tokens(1, 7, dtype)], 1)
    assert torch.equal(mixer(x)[:, :33], mixer(other)[:, :33])


def test_reverse_sees_no_past(recurrent_variant: str, build: Build, tokens: Tokens) -> None:
    mixer = build(recurrent_variant)
    gradient = gradient_by_token(lambda x: mixer(x, reverse=True), tokens(1, 7), 3)
    assert torch.equal(gradient[:3], torch.zeros(3, dtype=gradient.dtype))
    assert (gradient[3:] > 0).all()


def test_packed_sequences_do_not_see_each_other(variant: str, build: Build, tokens: Tokens) -> None:
    mixer, cu = build(variant), torch.tensor([0, 3, 7], dtype=torch.int32)
    gradient = gradient_by_token(lambda x: mixer(x, cu_seqlens=cu), tokens(1, 7), 5)
    assert torch.equal(gradient[:3], torch.zeros(3, dtype=gradient.dtype))
    assert gradient[5] > 0


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_backbone_sees_what_it_says(bidirectional: bool, mixer_name: str, tokens: Tokens) -> None:
    net = Backbone(dim=8, heads=2, depth=2, mixer=mixer_name, bidirectional=bidirectional).double()  # type: ignore[arg-type]
    gradient = gradient_by_token(net, tokens(1, 7), 3)
    assert (gradient[:4] > 0).all()
    assert ((gradient[4:] > 0) == bidirectional).all()
