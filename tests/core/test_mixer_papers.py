"""Each row against the formula of its paper, and its initial values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainstem.core.mixers import MIXERS, Mixer, build_mixer

DOUBLE = torch.float64


@pytest.fixture
def plain() -> Callable[..., Any]:
    """A mixer of 8 channels and 2 heads in double precision, with an identity for its output projection."""

    def make(name: str, **options: Any) -> Any:
        mixer = build_mixer(name, dim=8, heads=2, **options).to(DOUBLE)
        with torch.no_grad():
            getattr(mixer, "out_proj").weight.copy_(torch.eye(8))  # noqa: B009
        return mixer

    return make


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 2, -1)


def softmax_over_past(scores: Tensor) -> Tensor:
    """(B, H, T, T) scores to weights that see the past only."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def test_linear_attention_is_normalised_kernel_attention(plain: Callable[..., Any]) -> None:
    mixer, x = plain("linear_attention"), torch.randn(1, 6, 8, dtype=DOUBLE)
    q, k, v = (heads(t) for t in mixer.in_proj(x).chunk(3, -1))
    weights = torch.einsum("bthk,bshk->bhts", F.elu(q) + 1, F.elu(k) + 1).tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    torch.testing.assert_close(mixer(x), expected.flatten(-2))


def test_attention_is_softmax_over_the_past(plain: Callable[..., Any]) -> None:
    mixer, x = plain("attention", rotary=False), torch.randn(1, 6, 8, dtype=DOUBLE)
    q, k, v = (heads(t) for t in mixer.in_proj(x).chunk(3, -1))
    weights = softmax_over_past(torch.einsum("bthk,bshk->bhts", q, k) / 2)
    torch.testing.assert_close(mixer(x), torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2))


def test_aaren_is_softmax_with_a_fixed_query(plain: Callable[..., Any]) -> None:
    mixer, x = plain("aaren"), torch.randn(1, 6, 8, dtype=DOUBLE)
    k, v = (heads(t) for t in mixer.in_proj(x).chunk(2, -1))
    scores = torch.einsum("hk,bshk->bhs", mixer.query, k) / 2
    weights = softmax_over_past(scores[:, :, None].expand(-1, -1, 6, -1))
    torch.testing.assert_close(mixer(x), torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2))


def test_lightnet_is_a_running_softmax_of_the_keys(plain: Callable[..., Any]) -> None:
    mixer, x = plain("lightnet", norm="none", gate="none"), torch.randn(1, 6, 8, dtype=DOUBLE)
    q, k, v = (heads(t) for t in mixer.in_proj(x).chunk(3, -1))
    expected = torch.zeros(1, 6, 2, 4, dtype=DOUBLE)
    for t in range(6):
        weights = k[:, : t + 1].softmax(1)
        memory = torch.einsum("bshk,bshv->bhkv", weights, v[:, : t + 1])
        expected[:, t] = torch.einsum("bhk,bhkv->bhv", F.silu(q[:, t]), memory) / 2
    torch.testing.assert_close(mixer(x), expected.flatten(-2))


def test_mlstm_is_its_unstabilised_recurrence(plain: Callable[..., Any]) -> None:
    mixer = plain("mlstm", norm="none", gate="none", conv=0)
    nn.init.normal_(mixer.decay.gates.weight)
    x = torch.randn(1, 9, 8, dtype=DOUBLE)
    q, k, v = (heads(t) for t in mixer.in_proj(x).chunk(3, -1))
    i, f = mixer.decay.gates(x).chunk(2, -1)
    C, n = torch.zeros(1, 2, 4, 4, dtype=DOUBLE), torch.zeros(1, 2, 4, dtype=DOUBLE)
    expected = []
    for t in range(9):
        forget, enter = f[:, t].sigmoid(), i[:, t].exp()
        key = k[:, t] / 2
        C = forget[..., None, None] * C + enter[..., None, None] * key[..., None] * v[:, t, :, None]
        n = forget[..., None] * n + enter[..., None] * key
        below = torch.einsum("bhk,bhk->bh", n, q[:, t]).abs().clamp_min(1)
        expected.append(torch.einsum("bhk,bhkv->bhv", q[:, t], C) / below[..., None])
    torch.testing.assert_close(mixer(x), torch.stack(expected, 1).flatten(-2))


def test_mamba2_is_its_discretised_state_space(plain: Callable[..., Any]) -> None:
    mixer = plain("mamba2", expand_v=1.0, norm="none", gate="none", state_size=3, conv=0)
    x = torch.randn(1, 5, 8, dtype=DOUBLE)
    C, B, u = mixer.in_proj(x).split([3, 3, 8], -1)
    step = F.softplus(mixer.decay.step_size(x) + mixer.decay.step_bias)
    S, expected = torch.zeros(1, 2, 3, 4, dtype=DOUBLE), []
    for t in range(5):
        forget = torch.exp(-step[:, t] * mixer.decay.log_rate.exp())[..., None, None]
        S = forget * S + step[:, t, :, None, None] * B[:, t, None, :, None] * heads(u)[:, t, :, None]
        y = torch.einsum("bn,bhnv->bhv", C[:, t], S) + mixer.skip[:, None] * heads(u)[:, t]
        expected.append(y.flatten(-2))
    torch.testing.assert_close(mixer(x), torch.stack(expected, 1))


@pytest.mark.parametrize(("name", "reference"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_one_head_is_the_textbook_cell(name: str, reference: Any) -> None:
    mixer: Any = build_mixer(name, dim=8, heads=1).to(DOUBLE)
    cell: Any = reference(8, 8, batch_first=True).to(DOUBLE)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(8))
        mixer.in_proj.weight.copy_(cell.weight_ih_l0)
        mixer.recurrent_weight.copy_(cell.weight_hh_l0.view(-1, 1, 8, 8))
        mixer.recurrent_bias.copy_(cell.bias_hh_l0.view(-1, 1, 8))
        if name == "gru":
            mixer.in_proj.bias.copy_(cell.bias_ih_l0)
        else:
            mixer.recurrent_bias += cell.bias_ih_l0.view(-1, 1, 8)
    x = torch.randn(2, 6, 8, dtype=DOUBLE)
    torch.testing.assert_close(mixer(x), cell(x)[0])


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
@pytest.mark.parametrize("span", [(0, 1), (-1, 1)])
def test_eigenvalues_lie_in_their_range(name: str, span: tuple[int, int]) -> None:
    mixer: Any = build_mixer(name, dim=8, heads=2, eigenvalue_range=list(span)).to(DOUBLE)
    A = mixer.system(10 * torch.randn(1, 300, 8, dtype=DOUBLE)).A
    values = torch.linalg.eigvals(A).real
    assert values.min() >= span[0] - 1e-6
    assert values.max() <= 1 + 1e-6
    assert (values.min() < -0.5) == (span[0] == -1)


def test_initial_rates() -> None:
    def decay(name: str, **keywords: Any) -> Tensor:
        mixer: Any = build_mixer(name, dim=64, heads=4, **keywords)
        A: Tensor = mixer.system(torch.zeros(1, 1, 64)).A
        return A[0, 0].float()

    torch.testing.assert_close(decay("retnet")[:, 0], 1 - 2.0 ** -(5 + torch.arange(4.0)))
    torch.testing.assert_close(decay("gla"), torch.full((4, 8), 0.5 ** (1 / 16)))
    torch.testing.assert_close(decay("hgrn2"), torch.full((4, 16), 0.5))
    torch.testing.assert_close(decay("hgrn2", layer=2, depth=4), torch.full((4, 16), 0.75))
    torch.testing.assert_close(decay("mlstm")[:, 0], torch.tensor([3.0, 4, 5, 6]).sigmoid())
    assert (decay("mamba2") <= math.exp(-1e-3)).all()
    assert (decay("mamba2") >= math.exp(-1.6)).all()


def test_lru_starts_on_its_ring_with_unit_gain() -> None:
    mixer: Any = build_mixer("lru", dim=64, heads=1, r_min=0.8, r_max=0.9, max_phase=0.5)
    A = mixer.system(torch.zeros(1, 1, 64)).A
    assert ((A.abs() >= 0.8 - 1e-5) & (A.abs() <= 0.9 + 1e-5)).all()
    assert ((A.angle() >= 0) & (A.angle() <= 0.5 + 1e-5)).all()
    gain = mixer.log_gain.exp()
    torch.testing.assert_close(gain.square() + A.abs().flatten().square(), torch.ones(64), atol=1e-5, rtol=0)


def test_lstm_starts_remembering_with_orthogonal_matrices() -> None:
    mixer: Any = build_mixer("lstm", dim=8, heads=2)
    R, b = mixer.recurrent_weight, mixer.recurrent_bias
    torch.testing.assert_close(R @ R.mT, torch.eye(4).expand_as(R))
    assert torch.equal(b[1], torch.ones(2, 4))
    assert b[[0, 2, 3]].abs().max() == 0


def test_parameter_counts(mixer_name: str) -> None:
    def count(mixer: Mixer) -> int:
        return sum(p.numel() for p in mixer.parameters())

    per_square = count(build_mixer(mixer_name, dim=128, heads=4)) / 128**2
    expected = {
        "attention": 4, "linear_attention": 4, "retnet": 8, "gla": 4.2, "hgrn2": 4, "mamba2": 7.1,
        "mlstm": 5.1, "lightnet": 5, "aaren": 3, "deltanet": 4.1, "gated_deltanet": 5.2,
        "deltaproduct": 6.2, "kda": 5.1, "rwkv7": 8.1, "rwkv6": 8.6, "ttt": 4.3, "lru": 6.05, "mamba": 7.1,
        "lstm": 6, "gru": 4.8, "slstm": 6.08, "elman": 2.26, "s4d": 3.03, "lssl": 1.515, "hyena": 5.8,
    }  # fmt: skip
    assert set(expected) == set(MIXERS)
    assert per_square == pytest.approx(expected[mixer_name], rel=0.03)
