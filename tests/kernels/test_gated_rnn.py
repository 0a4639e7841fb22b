from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from operation_case import backends
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mainstem.kernels import gated_rnn

H, D = 2, 3
MODULES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}


@pytest.mark.parametrize("backend", backends("rnn"))
@pytest.mark.parametrize("cell", list(MODULES))
def test_one_head_is_the_cell_of_torch(backend: str, cell: Any) -> None:
    gates, lengths, size = {"lstm": 4, "gru": 3, "elman": 1}[cell], [7, 4, 1], 4
    module = MODULES[cell](6, size, batch_first=True)
    inputs = torch.randn(3, 7, 6)
    packed = pack_padded_sequence(inputs, torch.tensor(lengths), batch_first=True)
    wanted = pad_packed_sequence(module(packed)[0], batch_first=True)[0]
    tokens = torch.cat([row[:n] for row, n in zip(inputs, lengths)])
    x = torch.nn.functional.linear(tokens, module.weight_ih_l0, module.bias_ih_l0)
    h = gated_rnn(
        x.view(1, -1, gates, 1, size),
        module.weight_hh_l0.view(gates, 1, size, size),
        module.bias_hh_l0.view(gates, 1, size),
        cell=cell,
        cu_seqlens=torch.tensor([0, 7, 11, 12]),
        backend=backend,
    )
    assert isinstance(h, Tensor)
    wanted = torch.cat([row[:n] for row, n in zip(wanted, lengths)])
    torch.testing.assert_close(h[0, :, 0], wanted)
    got_gradients = torch.autograd.grad(h.square().sum(), list(module.parameters()))
    for got, expected in zip(
        got_gradients, torch.autograd.grad(wanted.square().sum(), list(module.parameters()))
    ):
        torch.testing.assert_close(got, expected)


def test_heads_are_the_blocks_of_one_matrix() -> None:
    heads, size, length = 4, 8, 12
    module: Any = torch.nn.LSTM(5, heads * size, batch_first=True).double()
    R = torch.randn(4, heads, size, size, dtype=torch.float64)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        for gate, blocks in zip(module.weight_hh_l0.view(4, heads * size, heads * size), R):
            for k, block in enumerate(blocks):
                gate[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    x = torch.randn(2, length, 5, dtype=torch.float64)
    inputs = torch.nn.functional.linear(x, module.weight_ih_l0, module.bias_ih_l0)
    h = gated_rnn(
        inputs.view(2, length, 4, heads, size), R, module.bias_hh_l0.view(4, heads, size), backend="cpu"
    )
    assert isinstance(h, Tensor)
    torch.testing.assert_close(h.flatten(-2), module(x)[0], rtol=0, atol=1e-14)


def slstm_inputs(length: int) -> dict[str, Tensor]:
    R = torch.randn(4, H, D, D, dtype=torch.float64) / 2
    return {
        "x": torch.randn(1, length, 4, H, D, dtype=torch.float64),
        "R": R,
        "b": torch.zeros(4, H, D).double(),
    }


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize(("cell", "forget"), [("slstm", torch.sigmoid), ("slstm_exp", torch.exp)])
def test_slstm_is_the_recurrence_without_its_stabiliser(
    backend: str, cell: Any, forget: Callable[[Tensor], Tensor]
) -> None:
    inputs: dict[str, Any] = slstm_inputs(12)
    h, c, n = (torch.zeros(H, D, dtype=torch.float64) for _ in range(3))
    wanted = []
    for x in inputs["x"][0]:
        i, f, z, o = x + torch.einsum("ghij,hj->ghi", inputs["R"], h)
        c = forget(f) * c + i.exp() * z.tanh()
        n = forget(f) * n + i.exp()
        h = o.sigmoid() * c / n
        wanted.append(h)
    got, state = gated_rnn(**inputs, cell=cell, return_final_state=True, backend=backend)
    torch.testing.assert_close(got[0], torch.stack(wanted), rtol=0, atol=1e-13)
    torch.testing.assert_close(state[0, 1] * state[0, 3].exp(), c)
    torch.testing.assert_close(state[0, 2] * state[0, 3].exp(), n)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("level", [-300.0, 200.0])
def test_slstm_does_not_care_for_the_level_of_its_input_gate(backend: str, level: float) -> None:
    inputs = {name: x.float() for name, x in slstm_inputs(40).items()}
    run = partial(gated_rnn, R=inputs["R"], b=inputs["b"], cell="slstm", backend=backend)
    shifted = inputs["x"].clone()
    shifted[:, :, 0] += level
    a, b = inputs["x"].requires_grad_(), shifted.requires_grad_()
    ours, theirs = run(a), run(b)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    (got,), (wanted,) = (torch.autograd.grad(h.square().sum(), x) for h, x in ((theirs, b), (ours, a)))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "slstm"])
def test_threads_and_company_change_no_bit(cell: Any) -> None:
    """A long sequence among short ones, which several threads share by another plan than one does."""
    lengths = [900, *([17] * 40), 0, 300]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(1, sum(lengths), 4, 3, 16, requires_grad=True)
    R, b = torch.randn(4, 3, 16, 16) / 4, torch.randn(4, 3, 16)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        h = gated_rnn(x, R, b, cell=cell, cu_seqlens=bounds, backend="cpu")
        assert isinstance(h, Tensor)
        found.append((h, *torch.autograd.grad(h.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    alone = gated_rnn(x[:, :900], R, b, cell=cell, backend="cpu")
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, found[0][0][:, :900])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "peephole"}, "choose one of lstm, gru, slstm, slstm_exp, elman"),
        ({"cell": "gru"}, "x must have 3 gates"),
        ({"cell": "elman"}, "x must have 1 gates"),
        ({"R": torch.zeros(4, H, D)}, "R must be"),
        ({"b": torch.zeros(4, D)}, "b must be"),
        ({"initial_state": torch.zeros(1, 1, H, D)}, "initial_state must be"),
        ({"cell": "slstm", "initial_state": torch.zeros(1, 2, H, D)}, r"\(1, 4, 2, 3\)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(1, 5, 4, H, D),
        "R": torch.zeros(4, H, D, D),
        "b": torch.zeros(4, H, D),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        gated_rnn(**arguments)
