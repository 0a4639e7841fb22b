"""TTT-Linear against gradient descent by autograd, and how its inner model learns."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem.core.mixers import build_mixer
from mainstem.core.mixers.ttt import TTTMixer
from mainstem.core.positions import rotate
from mainstem.kernels import ttt_linear

DOUBLE = torch.float64
DIM, HEADS, SIZE = 8, 2, 4


def mixer(**options: Any) -> TTTMixer:
    torch.manual_seed(0)
    made = cast(TTTMixer, build_mixer("ttt", dim=DIM, heads=HEADS, **options)).to(DOUBLE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def inner(net: TTTMixer, h: int, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return x + F.layer_norm(x @ W + b, (SIZE,), net.inner_gain[h], net.inner_offset[h], eps=1e-6)


def by_the_paper(net: TTTMixer, x: Tensor) -> Tensor:
    """One sequence (T, D): every inner gradient by autograd, one token after the other."""
    C = net.mini_batch
    heads = []
    for h in range(HEADS):
        W, b = net.weight[h], net.bias[h]
        outputs = []
        for t, token in enumerate(x):
            place = t % C
            if place == 0:
                W0, b0 = (p.detach().requires_grad_() for p in (W, b))
                sum_W, sum_b = torch.zeros_like(W), torch.zeros_like(b)
            q, k, v = (z.view(HEADS, SIZE)[h] for z in (net.in_proj.weight @ token).chunk(3))
            q, k = (
                rotate(z.view(1, 1, 1, SIZE), torch.tensor([[place]])).flatten() if net.rotary else z
                for z in (q, k)
            )
            loss = (inner(net, h, k, W0, b0) - v).square().sum() / 2
            by_W, by_b = torch.autograd.grad(loss, (W0, b0))
            rate = torch.sigmoid(net.rate(token)[h]) * net.base_rate / SIZE
            sum_W, sum_b = sum_W + rate * by_W, sum_b + rate * by_b
            factor = (1 / (place + 1) + net.place[place]).clamp_min(0)
            W, b = W0 - factor * sum_W, b0 - factor * sum_b
            outputs.append(inner(net, h, q, W, b))
        heads.append(torch.stack(outputs))
    y: Tensor = net.out_proj(net.norm(torch.cat(heads, -1)))
    return y


@pytest.mark.parametrize("options", [{}, {"mini_batch": 3, "rotary": False, "base_rate": 0.3}])
def test_it_is_gradient_descent_in_mini_batches(options: dict[str, Any]) -> None:
    net, x = mixer(**options), torch.randn(1, 37, DIM, dtype=DOUBLE)
    torch.testing.assert_close(net(x)[0], by_the_paper(net, x[0]))


def test_the_factor_is_one_over_the_place_and_never_negative() -> None:
    net = mixer(mini_batch=4)
    with torch.no_grad():
        net.place.copy_(torch.tensor([0.0, 0.0, -1.0, 0.5]))
    torch.testing.assert_close(net._schedule(), torch.tensor([1.0, 0.5, 0.0, 0.75], dtype=DOUBLE))


def test_the_inner_model_learns_what_it_reads() -> None:
    torch.manual_seed(0)
    T, D = 2048, 8
    k, W = torch.randn(1, T, 1, D, dtype=DOUBLE), torch.randn(D, D, dtype=DOUBLE)
    v = k + F.layer_norm(k @ W, (D,))
    one, zero = torch.ones(1, D, dtype=DOUBLE), torch.zeros(1, D, dtype=DOUBLE)
    schedule = 1 / torch.arange(1, 17, dtype=DOUBLE)
    rate = torch.full((1, T, 1), 1.0, dtype=DOUBLE)
    start = torch.zeros(1, 1, 2 * D + 3, D, dtype=DOUBLE)
    start[:, :, :D] = 0.1 * torch.randn(D, D, dtype=DOUBLE)
    recalled = ttt_linear(k, k, v, rate, schedule, one, zero, initial_state=start)
    assert isinstance(recalled, Tensor)
    error = (recalled - v).square().mean((0, 2, 3))
    assert error[-32:].mean() < 0.1 * error[:32].mean()


def test_the_state_holds_the_unfinished_mini_batch() -> None:
    net, x = mixer(mini_batch=4), torch.randn(1, 11, DIM, dtype=DOUBLE)
    _, state = net(x, return_state=True)
    memory = state["memory"]
    assert memory.shape == (1, HEADS, 2 * SIZE + 3, SIZE)
    assert torch.equal(memory[0, :, -1], torch.full((HEADS, SIZE), 3.0, dtype=DOUBLE))
    _, whole = net(x[:, :8], return_state=True)
    assert torch.equal(whole["memory"][:, :, SIZE + 1 :], torch.zeros(1, HEADS, SIZE + 2, SIZE, dtype=DOUBLE))
    torch.testing.assert_close(memory[:, :, : SIZE + 1], whole["memory"][:, :, : SIZE + 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch": 0}, "mini_batch=0 must be at least 1 token"),
        ({"gate": "silu"}, "gate = 'silu': choose one of none, gelu"),
        ({"conv": 1}, "conv=1 must be 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("ttt", dim=8, heads=2, **options)


def test_odd_heads_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="even head size, got 3"):
        build_mixer("ttt", dim=6, heads=2)
    assert build_mixer("ttt", dim=6, heads=2, rotary=False)(torch.zeros(1, 2, 6)).shape == (1, 2, 6)


@pytest.mark.parametrize(("name", "shape"), [("k", (1, 3, 2, 5)), ("rate", (1, 3, 1)), ("gain", (3, 4))])
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    inputs: dict[str, Any] = {n: torch.zeros(1, 3, 2, 4) for n in "qkv"}
    inputs |= {"rate": torch.zeros(1, 3, 2), "schedule": torch.ones(4)}
    inputs |= {"gain": torch.ones(2, 4), "offset": torch.zeros(2, 4), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} must be .* to go with q"):
        ttt_linear(**inputs)
