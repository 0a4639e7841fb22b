from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem.kernels import elementwise_scan, elementwise_scan_step, max_plus_scan

BACKENDS = ["chunked", "cpu"]
D = 5


def make(batch: int, length: int, sequences: int, *, complex_: bool = False) -> dict[str, Any]:
    dtype = torch.complex128 if complex_ else torch.float64
    a = torch.randn(batch, length, D, dtype=dtype)
    a = a / a.abs().clamp(min=1)
    if length > 20:
        a[:, ::7] = 0
        a[:, ::11] *= 1e-30
        a[:, 5:9] *= 3
    inputs = {"a": a, "b": torch.randn(batch, length, D, dtype=dtype)}
    inputs["initial_state"] = torch.randn(sequences, D, dtype=dtype)
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_matches_the_reference(
    against_reference: Callable[..., None], layout: Any, reverse: bool, backend: str, dtype: torch.dtype
) -> None:
    inputs = make(layout.batch, layout.length, layout.sequences, complex_=dtype.is_complex)
    op = partial(elementwise_scan, cu_seqlens=layout.cu_seqlens, reverse=reverse, return_final_state=True)
    against_reference(op, inputs, backend=backend, dtype=dtype)
    del inputs["initial_state"]
    against_reference(op, inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("complex_", [False, True])
def test_gradcheck(backend: str, complex_: bool, reverse: bool) -> None:
    cu_seqlens = torch.tensor([0, 0, 19, 20])
    inputs = [x.requires_grad_() for x in make(1, 20, 3, complex_=complex_).values()]

    def op(a: Tensor, b: Tensor, state: Tensor) -> Any:
        return elementwise_scan(
            a,
            b,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            return_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1000, 4096])
def test_coefficients_that_break_products_and_logarithms(backend: str, length: int) -> None:
    b = torch.randn(1, length, 6)
    b[..., 3] = b[..., 5] = 0
    a = torch.stack(
        [
            torch.zeros(length),
            torch.full((length,), -1.0),
            torch.full((length,), 1e-38),
            torch.tensor([1e30, -1e30, 0.0, 0.5]).repeat(length // 4),
            torch.tensor([2.0, 0.5]).repeat(length // 2),
            torch.full((length,), 2.0),
        ],
        -1,
    )[None]
    got = elementwise_scan(a, b, backend=backend)
    wanted = elementwise_scan(a.double(), b.double(), backend="reference")
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    keep = wanted.abs() < 1e38
    assert got[keep].isfinite().all()
    torch.testing.assert_close(got[keep].double(), wanted[keep], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend: str) -> None:
    a, b = torch.rand(1, 90, D), torch.randn(1, 90, D)
    b[:, 35] = torch.nan
    h = elementwise_scan(a, b, cu_seqlens=torch.tensor([0, 30, 60, 90]), backend=backend)
    assert isinstance(h, Tensor)
    assert h.isnan().any(-1)[0].nonzero().flatten().tolist() == list(range(35, 60))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_transposed_inputs_and_equal_gradients_twice(backend: str) -> None:
    a = torch.rand(D, requires_grad=True)
    b = torch.randn(2, D, 40, requires_grad=True)
    gradients = []
    for _ in range(2):
        h = elementwise_scan(a.expand(2, 40, D), b.mT, backend=backend)
        assert isinstance(h, Tensor)
        gradients.append(torch.autograd.grad(h.square().sum(), (a, b)))
    dense = elementwise_scan(a.expand(2, 40, D).contiguous(), b.mT.contiguous(), backend="reference")
    torch.testing.assert_close(h, dense)
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


@pytest.mark.parametrize("complex_", [False, True])
def test_step_is_the_scan(complex_: bool) -> None:
    inputs = make(2, 12, 2, complex_=complex_)
    h, final = elementwise_scan(**inputs, return_final_state=True, backend="chunked")
    state, steps = inputs["initial_state"], []
    for a, b in zip(inputs["a"].unbind(1), inputs["b"].unbind(1)):
        o, state = elementwise_scan_step(a, b, state)
        steps.append(o)
    torch.testing.assert_close(torch.stack(steps, 1), h)
    torch.testing.assert_close(state, final)


def test_graphs(through_graphs: Callable[..., None]) -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 24])

    def op(a: Tensor, b: Tensor, bounds: Tensor) -> Tensor:
        h = elementwise_scan(a, b, cu_seqlens=bounds)
        assert isinstance(h, Tensor)
        return h

    def inputs(length: int) -> tuple[Tensor, ...]:
        return torch.rand(1, length, D), torch.randn(1, length, D), torch.tensor([0, 3, 3, length])

    through_graphs(op, inputs)
    a, b, _ = (x.requires_grad_(x.is_floating_point()) for x in inputs(24))
    operator = torch.ops.mainstem.elementwise_scan.default
    torch.library.opcheck(operator, (a, b, None, torch.randn(1, D, requires_grad=True), True, "chunked"))
    torch.library.opcheck(operator, (a, b, cu_seqlens, None, False, "auto"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(1, 4, D + 1)}, "a and b must have one shape"),
        ({"a": torch.zeros(1, 4, D, dtype=torch.complex64)}, "both be complex"),
        ({"initial_state": torch.zeros(2, D)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "rise from 0 to T=4"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must be"),
        ({"backend": "fast"}, "choose one of"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"a": torch.zeros(1, 4, D), "b": torch.zeros(1, 4, D), **change}
    with pytest.raises(ValueError, match=message):
        elementwise_scan(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_max_plus_matches_the_reference(
    against_reference: Callable[..., None], layout: Any, reverse: bool, backend: str, dtype: torch.dtype
) -> None:
    shape = layout.batch, layout.length, D
    g, i = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    g[:, ::9], i[:, ::4] = -torch.inf, -torch.inf
    op = partial(max_plus_scan, cu_seqlens=layout.cu_seqlens, reverse=reverse, return_final_state=True)
    against_reference(op, {"g": g, "i": i}, backend=backend, dtype=dtype)
    state = torch.randn(layout.sequences, D, dtype=torch.float64)
    against_reference(op, {"g": g, "i": i, "initial_state": state}, backend=backend, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    reverse=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_a_sequence_in_a_pack_is_the_sequence_alone(lengths: list[int], reverse: bool, backend: str) -> None:
    inputs = make(1, sum(lengths), len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    keywords: dict[str, Any] = {"reverse": reverse, "return_final_state": True, "backend": backend}
    h, final = elementwise_scan(**inputs, cu_seqlens=bounds, **keywords)
    for i, (begin, end) in enumerate(pairwise(bounds.tolist())):
        alone = {name: x[:, begin:end] for name, x in inputs.items() if name != "initial_state"}
        state = inputs["initial_state"][i : i + 1]
        h_alone, final_alone = elementwise_scan(**alone, initial_state=state, **keywords)
        torch.testing.assert_close(h[:, begin:end], h_alone)
        torch.testing.assert_close(final[i : i + 1], final_alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_thousand_tokens(backend: str) -> None:
    a, b = torch.full((1, 100_000, 2), 0.999), torch.ones(1, 100_000, 2)
    h = elementwise_scan(a, b, backend=backend)
    assert isinstance(h, Tensor)
    exact = (1 - 0.999 ** torch.arange(1, 100_001, dtype=torch.float64)) / (1 - 0.999)
    torch.testing.assert_close(h[0, :, 0].double(), exact, rtol=2e-4, atol=0)
