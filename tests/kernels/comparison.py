"""An operation run on given inputs, with gradients, and compared with another run of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from operation_case import Case, Inputs, Layout
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 2e-5,
    torch.complex64: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

Results = dict[str, Tensor]


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The inputs in ``dtype`` or its counterpart: complex ones stay complex, and real ones real."""
    real = dtype.to_real()
    kinds = {True: torch.complex128 if real == torch.float64 else torch.complex64, False: real}
    return {
        name: x.to(device, kinds[x.is_complex()] if x.is_floating_point() or x.is_complex() else x.dtype)
        for name, x in inputs.items()
    }


def leaves(inputs: Mapping[str, Tensor]) -> Inputs:
    """The same numbers as tensors that gradients are taken for, their strides kept."""
    return {
        name: x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for name, x in inputs.items()
    }


def wide_type(inputs: Mapping[str, Tensor]) -> torch.dtype:
    """The type of the reference: complex where an input is."""
    return torch.complex128 if any(x.is_complex() for x in inputs.values()) else torch.float64


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    """The outputs under weights that are the same in every run, added up in double precision."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for o in outputs:
        wide = torch.complex128 if o.is_complex() else torch.float64
        # Not contiguous, so that the gradient that comes in is not.
        weight = torch.randn(o.shape[::-1], dtype=wide, generator=generator).permute(*reversed(range(o.ndim)))
        total = total + (o.to(wide) * weight.to(o.device)).sum().real.cpu()
    return total


def run(call: Callable[[Inputs], tuple[Tensor, ...]], inputs: Mapping[str, Tensor]) -> Results:
    """Call, and name what comes out: ``output``, ``state 0`` …, and a gradient ``d…`` of every input."""
    x = leaves(inputs)
    outputs = call(x)
    names = ["output", *(f"state {i}" for i in range(len(outputs) - 1))]
    results = {name: o.detach() for name, o in zip(names, outputs)}
    total = loss(outputs)
    if total.requires_grad:
        wanted = {name: y for name, y in x.items() if y.requires_grad}
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        for (name, y), g in zip(wanted.items(), gradients):
            results[f"d{name}"] = torch.zeros_like(y) if g is None else g
    return results


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a part of the largest number where that exceeds one."""
    if not got.numel():
        return 0.0
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def assert_near(got: Results, wanted: Results, dtype: torch.dtype) -> None:
    """Compare everything that two runs gave; what is infinite must be so in both."""
    assert got.keys() == wanted.keys()
    for name, y in wanted.items():
        x = got[name].cpu()
        assert x.shape == y.shape, name
        infinite = ~y.isfinite()
        assert torch.equal(x[infinite].to(y.dtype), y[infinite]), name
        error = distance(x.to(y.dtype)[~infinite], y[~infinite])
        assert error < TOLERANCE[dtype], f"{name} is off by {error:.1e}"


def assert_near_relative(got: Results, wanted: Results, tolerance: float) -> None:
    """Compare every gradient on its own scale, however small it is."""
    for name, y in wanted.items():
        if name.startswith("d") and y.norm() > 0:
            error = ((got[name].cpu().to(y.dtype) - y).norm() / y.norm()).item()
            assert error < tolerance, f"{name} is off by {error:.1e} of itself"


def rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs as ``dtype`` holds them, in double precision."""
    return cast(cast(inputs, dtype), torch.float64)


def draw(case: Case, layout: Layout) -> Inputs:
    """The case's inputs for a layout, the same ones every time, in double precision."""
    with seeded():
        inputs = case.make(layout.batch, layout.length, layout.sequences)
    if not layout.state:
        inputs.pop("initial_state", None)
    return inputs


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@lru_cache(maxsize=32)
def _reference(case: Case, layout: Layout, dtype: torch.dtype, reverse: bool) -> tuple[Inputs, Results]:
    inputs = rounded(draw(case, layout), dtype)
    return inputs, run(call(case, "reference", layout, reverse), inputs)


def reference(case: Case, layout: Layout, dtype: torch.dtype, reverse: bool) -> tuple[Inputs, Results]:
    """Inputs that ``dtype`` can hold, and what the reference makes of them in double precision.

    Both are shared by all backends. The types of 16 bits share inputs that bfloat16 can hold, and all others
    those that float32 can hold.
    """
    return _reference(case, layout, torch.bfloat16 if dtype.itemsize == 2 else torch.float32, reverse)


@lru_cache(maxsize=8)
def reference_of(case: Case, make: Callable[[], Inputs]) -> tuple[Inputs, Results]:
    """The same for the inputs that ``make`` draws, rounded to float32."""
    with seeded():
        inputs = rounded(make(), torch.float32)
    return inputs, run(call(case, "reference"), inputs)


def call(
    case: Case, backend: str, layout: Layout | None = None, reverse: bool = False, device: str = "cpu"
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The operation on a layout, as a function of its tensors."""
    how: dict[str, object] = {"backend": backend}
    if layout is not None and layout.bounds is not None:
        how["cu_seqlens"] = layout.cu_seqlens(device)
    if case.takes("reverse"):
        how["reverse"] = reverse
    return lambda inputs: case(inputs, **how)
