"""What the sLSTM mixer and the plain recurrent baseline say of themselves."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem import Backbone
from mainstem.core.mixers import build_mixer

DOUBLE = torch.float64


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_the_block_is_that_of_the_paper(forget: str) -> None:
    mixer: Any = build_mixer("slstm", dim=8, heads=2, forget=forget).to(DOUBLE)
    x = torch.randn(1, 7, 8, dtype=DOUBLE)
    padded = F.pad(x, (0, 0, 3, 0))
    weight, bias = mixer.conv.weight, mixer.conv.bias
    seen = F.silu(torch.stack([(padded[0, t : t + 4].T * weight).sum(1) + bias for t in range(7)]))
    i_f, z_o = mixer.gate_proj(seen), mixer.in_proj(x[0])
    h, c, n, expected = torch.zeros(2, 4, dtype=DOUBLE), 0.0, 0.0, []
    for t in range(7):
        gates = torch.cat([i_f[t], z_o[t]]).view(4, 2, 4) + mixer.recurrent_bias
        i, f, z, o = gates + torch.einsum("ghij,hj->ghi", mixer.recurrent_weight, h)
        opening = f.sigmoid() if forget == "sigmoid" else f.exp()
        c, n = opening * c + i.exp() * z.tanh(), opening * n + i.exp()
        h = o.sigmoid() * c / n
        normed = F.layer_norm(h, (4,), mixer.norm.norm.weight, mixer.norm.norm.bias, eps=1e-5)
        expected.append(mixer.out_proj(normed.flatten()))
    torch.testing.assert_close(mixer(x)[0], torch.stack(expected))


def test_heads_start_with_memories_of_different_length() -> None:
    sigmoid: Any = build_mixer("slstm", dim=16, heads=4)
    exponential: Any = build_mixer("slstm", dim=16, heads=4, forget="exp")
    rates = torch.tensor([3.0, 4, 5, 6]).sigmoid()[:, None].expand(4, 4)
    torch.testing.assert_close(sigmoid.recurrent_bias[1].sigmoid(), rates)
    torch.testing.assert_close(exponential.recurrent_bias[1].exp(), rates)
    R = sigmoid.recurrent_weight
    torch.testing.assert_close(R @ R.mT, torch.eye(4).expand_as(R))
    assert sigmoid.recurrent_bias[[0, 2, 3]].abs().max() == 0


def test_without_the_convolution_all_gates_see_the_token() -> None:
    mixer = build_mixer("slstm", dim=8, heads=2, conv=0)
    assert set(mixer.init_state(3)) == {"hidden"}
    assert set(build_mixer("slstm", dim=8, heads=2).init_state(3)) == {"hidden", "conv"}
    assert mixer.init_state(3)["hidden"].shape == (3, 4, 2, 4)


def test_an_unknown_forget_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="forget = 'relu': choose one of sigmoid, exp"):
        build_mixer("slstm", dim=8, heads=2, forget="relu")


def test_elman_is_one_tanh() -> None:
    mixer: Any = build_mixer("elman", dim=6, heads=2).to(DOUBLE)
    x = torch.randn(2, 5, 6, dtype=DOUBLE)
    h, expected = torch.zeros(2, 2, 3, dtype=DOUBLE), []
    for x_t in mixer.in_proj(x).unbind(1):
        recurrent = torch.einsum("hij,bhj->bhi", mixer.recurrent_weight[0], h) + mixer.recurrent_bias[0]
        h = torch.tanh(x_t.view(2, 2, 3) + recurrent)
        expected.append(mixer.out_proj(h.flatten(-2)))
    torch.testing.assert_close(mixer(x), torch.stack(expected, 1))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["slstm", "lstm"])
def test_learns_parity_which_no_linear_recurrence_of_positive_eigenvalues_can(mixer: Any) -> None:
    """xLSTM, section 4.1: state tracking needs memory mixing. Trained at length 32, right at length 256."""
    net = Backbone(dim=16, heads=1, depth=1, mixer=mixer)
    embed, read = torch.nn.Embedding(2, 16), torch.nn.Linear(16, 2)
    parameters = [*net.parameters(), *embed.parameters(), *read.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)

    def logits(bits: Tensor) -> Tensor:
        out: Tensor = read(net(embed(bits)))
        return out

    for step in range(600):
        length = 4 + 28 * min(step, 300) // 300
        bits = torch.randint(2, (64, length))
        loss: Any = F.cross_entropy(logits(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    bits = torch.randint(2, (32, 256))
    with torch.no_grad():
        right = (logits(bits).argmax(-1) == bits.cumsum(1) % 2).float().mean()
    assert right > 0.99
