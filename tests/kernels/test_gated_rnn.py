from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mainstem.kernels import gated_rnn, gated_rnn_step

BACKENDS = ["chunked"]
H, D = 2, 3
CELLS = {"lstm": (4, 2), "gru": (3, 1)}


def make(cell: str, batch: int, length: int, sequences: int) -> dict[str, Any]:
    gates, states = CELLS[cell]
    shapes = {
        "x": (batch, length, gates, H, D),
        "R": (gates, H, D, D),
        "b": (gates, H, D),
        "initial_state": (sequences, states, H, D),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_reference(
    against_reference: Callable[..., None],
    layout: Any,
    reverse: bool,
    backend: str,
    cell: Any,
    dtype: torch.dtype,
) -> None:
    inputs = make(cell, layout.batch, layout.length, layout.sequences)
    op = partial(gated_rnn, cell=cell, cu_seqlens=layout.cu_seqlens, reverse=reverse, return_final_state=True)
    against_reference(op, inputs, backend=backend, dtype=dtype)
    if dtype == torch.float64:
        del inputs["initial_state"]
        against_reference(op, inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_gradcheck(backend: str, cell: Any, reverse: bool) -> None:
    inputs = [x.requires_grad_() for x in make(cell, 1, 9, 3).values()]

    def op(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> Any:
        return gated_rnn(
            x,
            R,
            b,
            cell=cell,
            cu_seqlens=torch.tensor([0, 7, 7, 9]),
            initial_state=state,
            return_final_state=True,
            reverse=reverse,
            backend=backend,
        )

    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("cell", list(CELLS))
def test_one_head_is_the_cell_of_torch(backend: str, cell: Any) -> None:
    gates, lengths, size = CELLS[cell][0], [7, 4, 1], 4
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](6, size, batch_first=True)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_hostile_numbers_strides_and_repeatable_gradients(backend: str, cell: Any) -> None:
    inputs = {name: x.float() for name, x in make(cell, 2, 20, 2).items()}
    inputs["x"] = (1e4 * inputs["x"]).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    inputs["R"] = inputs["R"].mT.requires_grad_()
    gradients = []
    for _ in range(2):
        h = gated_rnn(**inputs, cell=cell, backend=backend)
        assert isinstance(h, Tensor)
        gradients.append(torch.autograd.grad(h.square().sum(), (inputs["x"], inputs["R"])))
    torch.testing.assert_close(h, gated_rnn(**inputs, cell=cell, backend="reference"))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*gradients))


@pytest.mark.parametrize("cell", list(CELLS))
def test_step_is_the_scan(cell: Any) -> None:
    inputs = make(cell, 2, 12, 2)
    h, final = gated_rnn(**inputs, cell=cell, return_final_state=True, backend="chunked")
    state, steps = inputs["initial_state"], []
    for x in inputs["x"].unbind(1):
        step, state = gated_rnn_step(x, inputs["R"], inputs["b"], state, cell=cell)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), h)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("cell", list(CELLS))
def test_graphs(through_graphs: Callable[..., None], cell: Any) -> None:
    def op(x: Tensor, R: Tensor, b: Tensor, bounds: Tensor) -> Tensor:
        h = gated_rnn(x, R, b, cell=cell, cu_seqlens=bounds)
        assert isinstance(h, Tensor)
        return h

    def inputs(length: int) -> tuple[Tensor, ...]:
        x, R, b, _ = (t.float() for t in make(cell, 1, length, 1).values())
        return x, R, b, torch.tensor([0, 3, 3, length])

    through_graphs(op, inputs)
    x, R, b, state = (t.float().requires_grad_() for t in make(cell, 2, 6, 2).values())
    operator = torch.ops.mainstem.gated_rnn.default
    torch.library.opcheck(operator, (x, R, b, cell, None, state, True, "auto", True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "elman"}, "choose one of lstm, gru"),
        ({"cell": "gru"}, "x must have 3 gates"),
        ({"R": torch.zeros(4, H, D)}, "R must be"),
        ({"b": torch.zeros(4, D)}, "b must be"),
        ({"initial_state": torch.zeros(1, 1, H, D)}, "initial_state must be"),
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


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    reverse=st.booleans(),
    cell=st.sampled_from(list(CELLS)),
)
def test_a_sequence_in_a_pack_is_the_sequence_alone(lengths: list[int], reverse: bool, cell: Any) -> None:
    inputs = make(cell, 1, sum(lengths), len(lengths))
    x, state = inputs.pop("x"), inputs.pop("initial_state")
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    run = partial(gated_rnn, **inputs, cell=cell, reverse=reverse, return_final_state=True)
    h, final = run(x=x, cu_seqlens=bounds, initial_state=state)
    for i, (begin, end) in enumerate(pairwise(bounds.tolist())):
        h_alone, final_alone = run(x=x[:, begin:end], initial_state=state[i : i + 1])
        torch.testing.assert_close(h[:, begin:end], h_alone)
        torch.testing.assert_close(final[i : i + 1], final_alone)
