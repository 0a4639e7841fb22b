"""RWKV-7 against a loop written from the paper's equations, and its initial values."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem.core.mixers import build_mixer
from mainstem.core.mixers.base import Pass

DOUBLE = torch.float64


@pytest.fixture
def mixer() -> Any:
    """A mixer of 8 channels and 2 heads in double precision, every parameter moved off its initial value."""
    found = build_mixer("rwkv7", dim=8, heads=2, layer=1, depth=3).to(DOUBLE)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return found


def low_rank(f: Any, part: Any, x: Tensor) -> Tensor:
    """The paper's loramlp."""
    y: Tensor = f(x @ part.down.weight.T) @ part.up.weight.T
    return y if part.up.bias is None else y + part.up.bias


def by_hand(mixer: Any, x: Tensor) -> Tensor:
    """Peng et al. 2025, arXiv:2503.14456, section 4, with the state as the paper lays it, (V, K)."""
    mu_r, mu_k, mu_v, mu_d, mu_a, mu_g = mixer.lerp
    wkv, before, outputs = torch.zeros(2, 4, 4, dtype=DOUBLE), torch.zeros(8, dtype=DOUBLE), []
    for x_t in x:
        mixed = {
            name: x_t + (before - x_t) * mu
            for name, mu in zip("rkvdag", (mu_r, mu_k, mu_v, mu_d, mu_a, mu_g))
        }
        a = low_rank(lambda y: y, mixer.rate, mixed["a"]).sigmoid()
        d = low_rank(torch.tanh, mixer.decay, mixed["d"])
        w = torch.exp(-math.exp(-0.5) * d.sigmoid())
        g = low_rank(torch.sigmoid, mixer.gate, mixed["g"])
        k = mixer.key_proj.weight @ mixed["k"]
        r, v = mixer.query_proj.weight @ mixed["r"], mixer.value_proj.weight @ mixed["v"]
        kappa, replaced = k * mixer.removal, k * (1 + (a - 1) * mixer.replacement)
        p = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            unit = kappa[part] / (kappa[part].square().sum() + 1e-6).sqrt()
            transition = w[part].diag() - torch.outer(unit, a[part] * unit)
            wkv[h] = wkv[h] @ transition + torch.outer(v[part], replaced[part])
            y = wkv[h] @ r[part]
            y = (y - y.mean()) / (y.var(correction=0) + 64e-5).sqrt()
            y = y * mixer.norm.weight[part] + mixer.norm.bias[part]
            p.append(y + (r[part] * mixer.bonus[h] * replaced[part]).sum() * v[part])
        outputs.append(mixer.out_proj.weight @ (g * torch.cat(p)))
        before = x_t
    return torch.stack(outputs)


@torch.no_grad()
def test_is_the_papers_recurrence(mixer: Any) -> None:
    x = torch.randn(1, 9, 8, dtype=DOUBLE)
    torch.testing.assert_close(mixer(x)[0], by_hand(mixer, x[0]))


@torch.no_grad()
def test_the_transition_never_expands(mixer: Any) -> None:
    """With one rate for all channels of a head its eigenvalues lie in [0.545 − 1, 1]; ibid."""
    mixer.rate.up.weight.zero_()
    mixer.rate.up.bias.fill_(20.0)
    A = mixer.system(3 * torch.randn(1, 200, 8, dtype=DOUBLE)).A
    values = torch.linalg.eigvalsh(A)
    assert values.max() <= 1
    assert values.min() >= math.exp(-math.exp(-0.5)) - 1
    assert values.min() < 0


def test_initial_rates() -> None:
    mixer: Any = build_mixer("rwkv7", dim=64, heads=4)
    _, _, _, a, b, decay = mixer._terms(torch.randn(1, 5, 64), Pass(), None)[:6]
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(1, 5, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(b, -a / 2)  # half of what the removal key finds
    rates = decay[0, 0].flatten()
    assert (rates.diff() < 0).all()  # from slow to quick channels
    assert rates.min() >= -math.exp(-0.5)
    assert rates.max() > -1e-3
    deeper: Any = build_mixer("rwkv7", dim=64, heads=4, layer=2, depth=3)
    assert (deeper.decay.up.bias[1:-1] < mixer.decay.up.bias[1:-1]).all()
    assert (deeper.lerp[:, 1:] < mixer.lerp[:, 1:]).all()


@pytest.mark.parametrize("option", ["decay_rank", "rate_rank", "gate_rank"])
def test_a_rank_is_at_least_one(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
        build_mixer("rwkv7", 8, 2, **options)
