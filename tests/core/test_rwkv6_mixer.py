"""RWKV-6 against the equations of its paper, and how it starts."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem.core import packed
from mainstem.core.mixers import build_mixer
from mainstem.core.mixers.base import Pass
from mainstem.core.mixers.rwkv6 import RWKV6Mixer
from mainstem.core.mixers.token_shift import TokenShift

DOUBLE = torch.float64
DIM, HEADS = 8, 2


def mixer(layer: int = 1, depth: int = 3, moved: bool = True) -> RWKV6Mixer:
    torch.manual_seed(0)
    made = cast(RWKV6Mixer, build_mixer("rwkv6", dim=DIM, heads=HEADS, layer=layer, depth=depth)).to(DOUBLE)
    with torch.no_grad():
        for parameter in made.parameters() if moved else ():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def by_the_paper(net: RWKV6Mixer, x: Tensor) -> Tensor:
    """One sequence (T, D), token by token, each line an equation of arXiv:2404.05892."""
    S = torch.zeros(HEADS, DIM // HEADS, DIM // HEADS, dtype=DOUBLE)
    before = torch.zeros(DIM, dtype=DOUBLE)
    downs = net.lerp_down.weight.view(5, -1, DIM)
    outputs = []
    for now in x:
        seen = now + (before - now) * net.first_lerp
        mixed = [
            now + (before - now) * (net.lerp[i] + torch.tanh(downs[i] @ seen) @ net.lerp_up[i])
            for i in range(5)
        ]
        d = net.decay_up.bias + net.decay_up.weight @ torch.tanh(net.decay_down.weight @ mixed[0])
        w = torch.exp(-torch.exp(d)).view(HEADS, -1)
        k = (net.key_proj.weight @ mixed[1]).view(HEADS, -1)
        v = (net.value_proj.weight @ mixed[2]).view(HEADS, -1)
        r = (net.query_proj.weight @ mixed[3]).view(HEADS, -1)
        written = k[:, :, None] * v[:, None, :]
        wkv = S + net.bonus[:, :, None] * written
        S = w[:, :, None] * S + written
        o = torch.einsum("hk,hkv->hv", r, wkv)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, correction=0) + 64e-5).sqrt()
        o = o.flatten() * net.norm.weight + net.norm.bias
        outputs.append(net.out_proj.weight @ (F.silu(net.gate_proj.weight @ mixed[4]) * o))
        before = now
    return torch.stack(outputs)


def test_it_is_the_loop_of_the_paper() -> None:
    net, x = mixer(), torch.randn(1, 9, DIM, dtype=DOUBLE)
    torch.testing.assert_close(net(x)[0], by_the_paper(net, x[0]))


@pytest.mark.parametrize("rate", [8.0, 800.0])
def test_a_decay_of_zero_is_exact(rate: float) -> None:
    net, x = mixer(), torch.randn(1, 9, DIM, dtype=DOUBLE)
    with torch.no_grad():
        net.decay_up.bias[::2] = rate  # exp(−e^8) is 0 in double precision, and −e^800 is −∞
    expected = by_the_paper(net, x[0])
    assert expected.isfinite().all()
    torch.testing.assert_close(net(x)[0], expected)
    torch.testing.assert_close(net.read_out(net.system(x).run(), x)[0], expected)


def test_without_bonus_a_token_does_not_see_its_own_value() -> None:
    net, x = mixer(), torch.randn(1, 5, DIM, dtype=DOUBLE)
    terms = net._terms(x, Pass(), None)
    other = terms._replace(v=torch.cat([terms.v[:, :4], torch.randn_like(terms.v[:, 4:])], 1))
    o, _ = net._scan(terms, Pass(), None)
    assert torch.equal(o, net._scan(other, Pass(), None)[0])
    with torch.no_grad():
        net.bonus.zero_()
    assert torch.equal(net._own_weight(terms), torch.zeros(1, 5, HEADS, 1, dtype=DOUBLE))


def test_deeper_layers_start_with_longer_memories() -> None:
    x = torch.zeros(1, 1, DIM, dtype=DOUBLE)
    first, last = (mixer(layer, 3, moved=False)._terms(x, Pass(), None) for layer in (0, 2))
    channel = torch.arange(DIM, dtype=torch.float32) / (DIM - 1)
    torch.testing.assert_close(
        first.decay.flatten().float(), -torch.exp(-6 + 5 * channel**0.7), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        last.decay.flatten().float(), -torch.exp(-6 + 5 * channel**2), rtol=1e-5, atol=0
    )
    # The mixtures do not depend on the data until the low-rank maps have learned.
    net = mixer(0, 3, moved=False)
    torch.testing.assert_close(net.lerp[1], 1 - torch.arange(DIM, dtype=DOUBLE) / DIM)
    assert torch.equal(net.lerp_down.weight, torch.zeros_like(net.lerp_down.weight))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"lerp_rank={rank} must be at least 1"):
        build_mixer("rwkv6", dim=8, heads=2, lerp_rank=rank)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 1], [0, 0], [4]])
def test_the_shift_gives_the_token_before_and_keeps_the_last(lengths: list[int], reverse: bool) -> None:
    sequences = [torch.randn(n, 2) for n in lengths]
    x, cu = packed.join(sequences)
    state = torch.randn(len(lengths), 2)
    shifted, after = TokenShift()(x, Pass(cu, reverse), state)
    for sequence, got, before, last in zip(sequences, packed.split(shifted, cu), state, after):
        walk = torch.cat([before[None], sequence.flip(0) if reverse else sequence])
        assert torch.equal(got.flip(0) if reverse else got, walk[:-1])
        assert torch.equal(last, walk[-1])
        alone, alone_after = TokenShift()(sequence[None], Pass(reverse=reverse), before[None])
        assert torch.equal(alone[0], got)
        assert torch.equal(alone_after[0], last)
