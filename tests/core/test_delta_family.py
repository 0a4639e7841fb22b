"""The rows of the delta rule against loops written from their papers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem.core.mixers import build_mixer

DOUBLE = torch.float64


def plain(name: str, **options: Any) -> Any:
    """A mixer of 8 channels and 2 heads in double precision, with an identity for its output projection."""
    mixer: Any = build_mixer(name, dim=8, heads=2, conv=0, **options).to(DOUBLE)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(8))
        for parameter in mixer.parameters():
            if parameter is not mixer.out_proj.weight:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return mixer


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@torch.no_grad()
def test_kda_is_the_gated_delta_rule_with_a_decay_a_channel() -> None:
    """Kimi Team 2025, arXiv:2510.26692."""
    mixer, x = plain("kda"), torch.randn(6, 8, dtype=DOUBLE)
    S, outputs = torch.zeros(2, 4, 4, dtype=DOUBLE), []
    for x_t in x:
        q, k, v = (t.view(2, 4) for t in F.silu(mixer.in_proj.weight @ x_t).chunk(3))
        q, k, beta = unit(q), unit(k), (mixer.beta.weight @ x_t).sigmoid()
        step = F.softplus(mixer.decay.up.weight @ mixer.decay.down.weight @ x_t + mixer.decay.step_bias)
        alpha = torch.exp(-mixer.decay.log_rate.exp()[:, None] * step.view(2, 4))
        o = torch.empty(2, 4, dtype=DOUBLE)
        for h in range(2):
            erase = torch.eye(4, dtype=DOUBLE) - beta[h] * torch.outer(k[h], k[h])
            S[h] = erase @ alpha[h].diag() @ S[h] + beta[h] * torch.outer(k[h], v[h])
            o[h] = S[h].T @ q[h] / 2
        gate = (mixer.gate[1].weight @ (mixer.gate[0].weight @ x_t) + mixer.gate[1].bias).sigmoid()
        outputs.append(rms(o, mixer.norm.norm.weight).flatten() * gate)
    torch.testing.assert_close(mixer(x[None])[0], torch.stack(outputs))


@pytest.mark.parametrize("gated", [False, True], ids=["deltaproduct", "gated"])
@pytest.mark.parametrize("factors", [1, 2, 3])
@torch.no_grad()
def test_deltaproduct_takes_several_steps_a_token(factors: int, gated: bool) -> None:
    """Siems et al. 2025, arXiv:2502.10297."""
    options = {"decay": "head", "gate": "swish"} if gated else {}
    mixer, x = plain("deltaproduct", householder=factors, **options), torch.randn(6, 8, dtype=DOUBLE)
    S, outputs = torch.zeros(2, 4, 4, dtype=DOUBLE), []
    for x_t in x:
        projected: Any = mixer.in_proj.weight @ x_t
        q, k, v = torch.split(F.silu(projected[: 8 + 16 * factors]), [8, 8 * factors, 8 * factors])
        q, k, v = unit(q.view(2, 4)), unit(k.view(factors, 2, 4)), v.view(factors, 2, 4)
        beta = 2 * (mixer.beta.weight @ x_t).sigmoid().view(factors, 2)
        if gated:
            step = F.softplus(mixer.decay.step_size.weight @ x_t + mixer.decay.step_bias)
            S = S * torch.exp(-step * mixer.decay.log_rate.exp())[:, None, None]
        for i in range(factors):
            for h in range(2):
                error = v[i, h] - S[h].T @ k[i, h]
                S[h] = S[h] + beta[i, h] * torch.outer(k[i, h], error)
        o = rms(torch.einsum("hkv,hk->hv", S, q) / 2, mixer.norm.norm.weight).flatten()
        outputs.append(o * F.silu(projected[8 + 16 * factors :]) if gated else o)
    torch.testing.assert_close(mixer(x[None])[0], torch.stack(outputs))


@torch.no_grad()
def test_two_reflections_have_complex_eigenvalues_and_never_expand() -> None:
    """Ibid.: rotations, which one factor with real eigenvalues cannot make."""
    x = 10 * torch.randn(1, 100, 8, dtype=DOUBLE)
    one, two = (
        build_mixer("deltaproduct", dim=8, heads=2, householder=n).to(DOUBLE).system(x).A for n in (1, 2)
    )
    assert torch.linalg.eigvals(one).imag.abs().max() < 1e-6
    assert torch.linalg.eigvals(two).imag.abs().max() > 0.5
    assert torch.linalg.svdvals(two).max() <= 1 + 1e-6


def test_kda_starts_as_mamba2_does() -> None:
    mixer: Any = build_mixer("kda", dim=64, heads=4)
    decay = mixer.decay(torch.zeros(1, 1, 64))
    assert decay.shape == (1, 1, 4, 16)
    assert (decay <= -1e-3).all()
    assert (decay >= -1.6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"householder": 0}, "householder=0 must be at least 1"),
        ({"decay": "token"}, "decay = 'token': choose one of none, head, channel"),
        ({"low_rank_gate": True}, "low_rank_gate=True needs a gate"),
        ({"eigenvalue_range": (0, 2)}, r"eigenvalue_range=\(0, 2\) must be \(0, 1\) or \(-1, 1\)"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("deltaproduct", dim=8, heads=2, **options)
