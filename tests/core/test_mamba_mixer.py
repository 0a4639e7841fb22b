"""The block of Mamba against its equations, written out a token at a time, and its initial values."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem.core.mixers import build_mixer

DOUBLE = torch.float64


def mamba(**options: Any) -> Any:
    mixer: Any = build_mixer("mamba", dim=6, heads=1, **options).to(DOUBLE)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer


def by_the_paper(m: Any, x: Tensor) -> Tensor:
    """Figure 3 and algorithm 2 of arXiv:2312.00752, one sequence, token by token and channel by channel."""
    E, N, width = m.channels, m.states, m.conv.weight.shape[1]
    u, z = (m.in_proj.weight @ x.T).T.split([E, E], 1)
    padded = torch.cat([u.new_zeros(width - 1, E), u])
    h, outputs = u.new_zeros(E, N), []
    for t in range(x.shape[0]):
        window = padded[t : t + width]
        v = F.silu((window.T * m.conv.weight).sum(1) + m.conv.bias)
        low, B, C = (m.select_proj.weight @ v).split([m.rank, N, N])
        step = F.softplus(m.step_size.weight @ low + m.step_bias)
        A = -m.log_rate.exp()
        h = torch.stack([(step[c] * A[c]).exp() * h[c] + step[c] * B * v[c] for c in range(E)])
        outputs.append((h @ C + m.skip * v) * F.silu(z[t]))
    y: Tensor = torch.stack(outputs) @ m.out_proj.weight.T
    return y


@pytest.mark.parametrize(
    "options", [{}, {"expand": 1.5, "state_size": 3, "conv": 2, "rank": 4}, {"state_size": 1}]
)
def test_it_is_the_paper_s_block(options: dict[str, Any]) -> None:
    mixer, x = mamba(**options), torch.randn(2, 7, 6, dtype=DOUBLE)
    expected = torch.stack([by_the_paper(mixer, sequence) for sequence in x])
    torch.testing.assert_close(mixer(x), expected)


def test_initial_values_are_the_published_ones() -> None:
    mixer: Any = build_mixer("mamba", dim=100, heads=1)
    assert (mixer.channels, mixer.states, mixer.rank, mixer.conv.weight.shape[1]) == (200, 16, 7, 4)
    torch.testing.assert_close(mixer.log_rate.exp(), torch.arange(1.0, 17).expand(200, 16))
    assert torch.equal(mixer.skip, torch.ones(200))
    steps = F.softplus(mixer.step_bias)
    assert steps.min() >= 1e-3 * (1 - 1e-3)
    assert steps.max() <= 1e-1 * (1 + 1e-3)
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.4)
    assert mixer.step_size.weight.abs().max() <= 7**-0.5


def test_it_selects_what_enters_its_state() -> None:
    """With steps of zero for some tokens, these are as if they were not there, but for their own output."""
    mixer = mamba(conv=2)
    with torch.no_grad():
        mixer.conv.weight[:, 0] = 0  # the convolution sees the token itself only
        mixer.step_bias.fill_(0.5)
    x = torch.randn(1, 6, 6, dtype=DOUBLE)
    _, after = mixer(x, return_state=True)
    with torch.no_grad():
        mixer.step_bias.fill_(-math.inf)
    _, ignored = mixer(x, state=after, return_state=True)
    torch.testing.assert_close(ignored["hidden"], after["hidden"])


def test_heads_change_nothing() -> None:
    torch.manual_seed(1)
    one = build_mixer("mamba", dim=6, heads=1)
    torch.manual_seed(1)
    three = build_mixer("mamba", dim=6, heads=3)
    x = torch.randn(1, 5, 6)
    assert torch.equal(one(x), three(x))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"state_size": 0}, "state_size=0"),
        ({"rank": 0}, "rank=0"),
        ({"conv": 1}, "conv=1"),
        ({"expand": 0.01}, "expand=0.01"),
    ],
)
def test_sizes_that_leave_nothing_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("mamba", dim=6, heads=1, **option)
