from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from mainstem.kernels import short_convolution, short_convolution_step

BACKENDS = ["chunked"]
D = 5


def make(batch: int, length: int, sequences: int, width: int) -> dict[str, Any]:
    shapes = {
        "x": (batch, length, D),
        "weight": (D, width),
        "bias": (D,),
        "initial_state": (sequences, D, width - 1),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "activation"), [(4, "silu"), (2, None), (8, None), (1, "silu")])
def test_matches_the_reference(
    against_reference: Callable[..., None],
    layout: Any,
    reverse: bool,
    backend: str,
    dtype: torch.dtype,
    width: int,
    activation: Any,
) -> None:
    inputs = make(layout.batch, layout.length, layout.sequences, width)
    op = partial(
        short_convolution,
        activation=activation,
        cu_seqlens=layout.cu_seqlens,
        reverse=reverse,
        return_final_state=True,
    )
    against_reference(op, inputs, backend=backend, dtype=dtype)
    del inputs["initial_state"], inputs["bias"]
    against_reference(op, inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_agrees_with_conv1d(backend: str) -> None:
    x, weight, bias = torch.randn(2, 30, D), torch.randn(D, 4), torch.randn(D)
    wanted = silu(conv1d(pad(x.mT, (3, 0)), weight[:, None], bias, groups=D)).mT
    y = short_convolution(x, weight, bias, activation="silu", backend=backend)
    torch.testing.assert_close(y, wanted)
    mirrored = short_convolution(x.flip(1), weight, bias, activation="silu", reverse=True, backend=backend)
    assert isinstance(mirrored, Tensor)
    torch.testing.assert_close(mirrored.flip(1), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_sequence_keeps_part_of_its_initial_state(backend: str) -> None:
    state = torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    x = torch.tensor([[[7.0], [8.0]]])
    _, final = short_convolution(
        x,
        torch.ones(1, 4),
        cu_seqlens=torch.tensor([0, 0, 2]),
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    assert final.tolist() == [[[1, 2, 3]], [[6, 7, 8]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, reverse: bool) -> None:
    inputs = [x.requires_grad_() for x in make(1, 9, 3, 4).values()]

    def op(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        return short_convolution(
            x,
            weight,
            bias,
            activation="silu",
            cu_seqlens=torch.tensor([0, 0, 7, 9]),
            initial_state=state,
            return_final_state=True,
            reverse=reverse,
            backend=backend,
        )

    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence_and_gradients_are_repeatable(backend: str) -> None:
    x = torch.randn(1, D, 30)
    x[:, :, 12] = torch.nan
    weight = torch.randn(D, 4, requires_grad=True)
    y = short_convolution(x.mT, weight, cu_seqlens=torch.tensor([0, 14, 30]), backend=backend)
    assert isinstance(y, Tensor)
    assert y.isnan().any(-1)[0].nonzero().flatten().tolist() == [12, 13]
    x = torch.randn(1, D, 30)
    gradients = [
        torch.autograd.grad(short_convolution(x.mT, weight, backend=backend).square().sum(), weight)[0]  # type: ignore[union-attr]
        for _ in range(2)
    ]
    assert torch.equal(*gradients)


def test_step_is_the_scan() -> None:
    inputs = make(2, 12, 2, 4)
    y, final = short_convolution(**inputs, activation="silu", return_final_state=True)
    state, steps = inputs["initial_state"], []
    for x in inputs["x"].unbind(1):
        step, state = short_convolution_step(x, inputs["weight"], inputs["bias"], state, activation="silu")
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(state, final)


def test_graphs(through_graphs: Callable[..., None]) -> None:
    def op(x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
        y = short_convolution(x, weight, cu_seqlens=bounds, activation="silu")
        assert isinstance(y, Tensor)
        return y

    def inputs(length: int) -> tuple[Tensor, ...]:
        return torch.randn(1, length, D), torch.randn(D, 4), torch.tensor([0, 3, 3, length])

    through_graphs(op, inputs)
    x, weight, bias, state = (t.float().requires_grad_() for t in make(2, 6, 2, 4).values())
    operator = torch.ops.mainstem.short_convolution.default
    torch.library.opcheck(operator, (x, weight, bias, "silu", None, state, True, "auto"))
    first = x[:1].detach().requires_grad_()
    torch.library.opcheck(operator, (first, weight, None, None, torch.tensor([0, 6]), None, False, "chunked"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(D + 1, 4)}, "weight must be"),
        ({"bias": torch.zeros(D, 1)}, "bias must be"),
        ({"activation": "relu"}, "choose None or 'silu'"),
        ({"initial_state": torch.zeros(1, D, 4)}, "initial_state must be"),
        ({"backend": "triton"}, "conv has no triton backend"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 4, D), "weight": torch.zeros(D, 4), **change}
    with pytest.raises(ValueError, match=message):
        short_convolution(**arguments)
