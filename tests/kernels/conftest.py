from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 2e-5,
    torch.complex64: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

LAYOUTS: dict[str, tuple[int, int, list[int] | None]] = {
    "batch": (3, 70, None),
    "no_tokens": (2, 0, None),
    "one_token": (1, 1, None),
    "packed": (1, 143, [0, 0, 1, 1, 66, 130, 143, 143]),
    "packed_nothing": (1, 0, [0, 0, 0]),
}

Inputs = dict[str, Tensor]


class Layout(NamedTuple):
    """Batch, length and bounds of a call, and how many sequences that is."""

    batch: int
    length: int
    cu_seqlens: Tensor | None
    sequences: int


def make_layout(name: str) -> Layout:
    batch, length, bounds = LAYOUTS[name]
    if bounds is None:
        return Layout(batch, length, None, batch)
    return Layout(batch, length, torch.tensor(bounds, dtype=torch.int32), len(bounds) - 1)


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return make_layout(request.param)


@pytest.fixture
def packed() -> Layout:
    return make_layout("packed")


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def reverse(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for o in outputs:
        weight = torch.randn(o.shape, dtype=_wide(o.dtype), generator=generator)
        total = total + (o.to(weight.dtype) * weight).sum().real
    return total


def _run(op: Callable[..., Any], inputs: Inputs) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = op(**inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    loss = _loss(outputs)
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    if not loss.requires_grad:
        return outputs, {}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return outputs, {
        f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), gradients)
    }


def _assert_near(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape, name
    infinite = ~wanted.isfinite()
    assert torch.equal(got[infinite].to(wanted.dtype), wanted[infinite]), name
    got, wanted = got.to(wanted.dtype)[~infinite], wanted[~infinite]
    if got.numel():
        error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@pytest.fixture
def against_reference() -> Callable[..., None]:
    """Compare outputs and gradients of ``op(backend=…, **inputs)`` with the reference in double precision."""

    def check(
        op: Callable[..., Any],
        inputs: Inputs,
        *,
        backend: str,
        dtype: torch.dtype,
        tolerance: float | None = None,
    ) -> None:
        low = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
        high = {name: x.to(_wide(dtype)).detach().requires_grad_() for name, x in low.items()}
        got, got_gradients = _run(lambda **x: op(backend=backend, **x), low)
        wanted, wanted_gradients = _run(lambda **x: op(backend="reference", **x), high)
        assert got[0].dtype == dtype
        for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
            _assert_near(f"output {i}", x, y, TOLERANCE[dtype])
        assert got_gradients.keys() == wanted_gradients.keys()
        for name, x in got_gradients.items():
            assert x.dtype == dtype
            _assert_near(name, x, wanted_gradients[name], TOLERANCE[dtype])

    return check


@pytest.fixture
def through_graphs() -> Callable[..., None]:
    """Compare ``op(*inputs)`` compiled, with a length that changes, and exported, with itself run eagerly."""

    def check(op: Callable[..., Tensor], make: Callable[[int], tuple[Tensor, ...]]) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (24, 31):
            inputs = tuple(x.requires_grad_(x.is_floating_point() or x.is_complex()) for x in make(length))
            named = {str(i): x for i, x in enumerate(inputs)}
            got, got_gradients = _run(lambda c=compiled, **x: c(*x.values()), named)
            wanted, wanted_gradients = _run(lambda **x: op(*x.values()), named)
            _assert_near("output", got[0], wanted[0], 1e-5)
            for name, x in got_gradients.items():
                _assert_near(name, x, wanted_gradients[name], 1e-5)

        class Module(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                return op(*inputs)

        example = tuple(x.detach() for x in make(24))
        exported = torch.export.export(Module(), example)
        with torch.no_grad():
            _assert_near("exported", exported.module()(*example), op(*example), 1e-5)

    return check
