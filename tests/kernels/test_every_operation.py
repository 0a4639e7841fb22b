"""One body of tests for every operation on every backend; `operation_case` says how an operation comes in."""

import inspect
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from comparison import (
    TOLERANCE,
    assert_near,
    assert_near_relative,
    call,
    cast,
    draw,
    leaves,
    reference,
    reference_of,
    run,
    wide_type,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_case import (
    Case,
    Inputs,
    Labelled,
    Layout,
    Target,
    every_case,
    first_cases,
    one_form,
    runs,
    targets,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mainstem import kernels
from mainstem.kernels import dispatch, simd
from mainstem.kernels.checks import accumulator

CASES = every_case()
Make = Callable[[], Inputs]


def named(cases: tuple[Case, ...]) -> Any:
    return [pytest.param(case, id=case.name) for case in cases]


def layouts(case: Case, target: Target) -> Labelled:
    wide = wide_type(draw(case, Layout(1, 1)))
    for name, layout in target.layouts.items():
        if layout.bounds is None or case.takes("cu_seqlens"):
            both = case.takes("reverse") and (not target.interpreted or name == "packed")
            for reverse in (False, True) if both else (False,):
                for dtype in target.dtypes(wide):
                    label = f"{name}{'-reverse' * reverse}-{str(dtype).removeprefix('torch.')}"
                    yield label, (layout, reverse, dtype)


@pytest.mark.parametrize(("case", "target", "layout", "reverse", "dtype"), runs(layouts))
def test_matches_reference(
    case: Case, target: Target, layout: Layout, reverse: bool, dtype: torch.dtype
) -> None:
    inputs, wanted = reference(case, layout, dtype, reverse)
    low = cast(inputs, dtype, target.device)
    got = run(call(case, target.backend, layout, reverse, target.device), low)
    assert_near(got, wanted, dtype)
    for name, x in got.items():
        if name.startswith("state"):
            assert x.dtype == accumulator(dtype), name
        else:
            assert x.dtype == (dtype if name == "output" else low[name[1:]].dtype), name


def sizes(case: Case, target: Target) -> Labelled:
    yield from ((label, (make,)) for label, make in case.sizes.items())


@pytest.mark.parametrize(("case", "target", "make"), runs(sizes))
def test_sizes(case: Case, target: Target, make: Make) -> None:
    inputs, wanted = reference_of(case, make)
    got = run(call(case, target.backend), cast(inputs, torch.float32, target.device))
    assert_near(got, wanted, torch.float32)


def hostile(case: Case, target: Target) -> Labelled:
    for label, make in case.hostile.items():
        yield label, (make, label.startswith("strong"))


@pytest.mark.parametrize(("case", "target", "make", "strong"), runs(hostile))
def test_hostile_numbers(case: Case, target: Target, make: Make, strong: bool) -> None:
    inputs, wanted = reference_of(case, make)
    got = run(call(case, target.backend), cast(inputs, torch.float32, target.device))
    assert_near(got, wanted, torch.float32)
    if strong:
        assert_near_relative(got, wanted, 1e-5)


@pytest.mark.parametrize(("case", "target"), runs(only=lambda case: case.long is not None))
def test_a_long_sequence_keeps_its_precision(case: Case, target: Target) -> None:
    if target.interpreted or case.long is None:
        pytest.skip("the interpreter takes minutes")
    inputs = case.long(4_000 if target.backend == "chunked" else 100_000)
    best = "cpu" if dispatch.offers(case.folder, "cpu") else "chunked"
    wanted = run(call(case, best), cast(inputs, torch.float64))
    got = run(call(case, target.backend), cast(inputs, torch.float32, target.device))
    assert_near_relative(got, wanted, 1e-4)


def for_lengths(check: Callable[[list[int], bool], None], case: Case, target: Target) -> None:
    """Call ``check(lengths, reverse)`` with what hypothesis thinks up; where interpreted, with one choice."""
    directions = (False, True) if case.takes("reverse") else (False,)
    if target.interpreted:
        for reverse in directions:
            check([3, 0, 9], reverse)
        return
    lengths = st.lists(st.integers(0, 3) | st.integers(0, 90), max_size=5)
    given(lengths, st.sampled_from(directions))(settings(max_examples=10, deadline=None)(check))()


def assert_close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, wanted, strict=True):
        tolerance = TOLERANCE[y.dtype] if y.dtype == torch.float32 else None
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def most_precise(case: Case, target: Target, inputs: Inputs) -> Inputs:
    return cast(inputs, target.dtypes(wide_type(inputs))[0], target.device)


def between(case: Case, x: Inputs, begin: int, end: int) -> Inputs:
    return {name: y[:, begin:end] if name in case.timed else y for name, y in x.items()}


@pytest.mark.parametrize(("case", "target"), runs(one_form, lambda case: case.takes("cu_seqlens")))
def test_a_packed_sequence_equals_it_alone(case: Case, target: Target) -> None:
    def check(lengths: list[int], reverse: bool) -> None:
        bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
        layout = Layout(1, bounds[-1], tuple(bounds))
        x = most_precise(case, target, draw(case, layout))
        packed = call(case, target.backend, layout, reverse, target.device)(x)
        states = x.pop("initial_state", None)
        for i, (begin, end) in enumerate(pairwise(bounds)):
            part = between(case, x, begin, end)
            if states is not None:
                part["initial_state"] = states[i : i + 1]
            alone = call(case, target.backend, None, reverse)(part)
            assert_close((packed[0][:, begin:end], *(y[i : i + 1] for y in packed[1:])), alone)

    for_lengths(check, case, target)


@pytest.mark.parametrize(("case", "target"), runs(only=lambda case: case.stateful))
def test_pieces_equal_the_whole(case: Case, target: Target) -> None:
    def check(lengths: list[int], reverse: bool) -> None:
        x = most_precise(case, target, draw(case, Layout(2, sum(lengths))))
        how = {"reverse": reverse, "backend": target.backend, **case.keywords}
        whole, last = case.function(**x, **how, return_final_state=True)
        state = x.pop("initial_state")
        pieces = [whole[:, :0]]
        bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
        walk = list(pairwise(bounds))
        for begin, end in reversed(walk) if reverse else walk:
            o, state = case.function(
                **between(case, x, begin, end), **how, initial_state=state, return_final_state=True
            )
            pieces.append(o)
        joined = torch.cat(pieces[::-1] if reverse else pieces, 1)
        assert_close((joined, *case.readings(state)), (whole, *case.readings(last)))

    for_lengths(check, case, target)


def step(case: Case, token: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    assert case.step is not None
    function = getattr(kernels, case.step)
    given = {**token, "state": state, **case.keywords}
    # What a step requires and the operation has a default for.
    absent = {
        name: None
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in given and parameter.default is inspect.Parameter.empty
    }
    o, state = function(**given, **absent)
    return o, state


STEPS = tuple(case for case in CASES if case.step is not None)


@pytest.mark.parametrize("case", named(STEPS))
def test_steps_equal_the_whole(case: Case) -> None:
    inputs = draw(case, Layout(2, 20))
    wanted = call(case, "chunked")(inputs)
    state = inputs.pop("initial_state")
    before, steps = state.clone(), []
    for t in range(20):
        token = {name: x[:, t] if name in case.timed else x for name, x in inputs.items()}
        o, state = step(case, token, state)
        steps.append(o)
    assert_close((torch.stack(steps, 1), *case.readings(state)), wanted)
    assert torch.equal(before, draw(case, Layout(2, 20))["initial_state"])


@pytest.mark.parametrize("case", named(STEPS))
def test_a_step_keeps_the_type_of_its_input_and_a_wide_state(case: Case) -> None:
    inputs = draw(case, Layout(2, 1))
    if wide_type(inputs).is_complex:
        pytest.skip("there are no complex numbers of 16 bits")
    state = inputs.pop("initial_state").float()
    token = {name: x[:, 0] if name in case.timed else x for name, x in cast(inputs, torch.bfloat16).items()}
    o, state = step(case, token, state)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("case", "target"), runs(one_form))
def test_strides_change_nothing(case: Case, target: Target) -> None:
    x = most_precise(case, target, draw(case, Layout(2, 5) if target.interpreted else Layout(3, 20)))
    op = call(case, target.backend, device=target.device)
    expanded = {name: y[:1].expand_as(y) for name, y in x.items()}
    for strided in (
        {name: y.transpose(0, -1).contiguous().transpose(0, -1) for name, y in x.items()},
        expanded,
    ):
        wanted = run(op, {name: y.contiguous() for name, y in strided.items()})
        for name, y in run(op, strided).items():
            torch.testing.assert_close(y, wanted[name])


@pytest.mark.parametrize(("case", "target"), runs(one_form))
def test_results_repeat_bit_for_bit_on_any_number_of_threads(
    case: Case, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simd, "_WORTH_A_THREAD", 0)
    layout = Layout(2, 5) if target.interpreted else Layout(3, 70)
    inputs = cast(draw(case, layout), torch.float32, target.device)
    results = []
    for threads in (1, 1, 2) if target.backend == "cpu" else (1, 1):
        torch.set_num_threads(threads)
        results.append(run(call(case, target.backend), inputs))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize(("case", "target"), runs(one_form, lambda case: case.takes("cu_seqlens")))
def test_nan_stays_in_its_sequence(case: Case, target: Target) -> None:
    layout = Layout(1, 24, (0, 8, 16, 24)) if target.interpreted else Layout(1, 90, (0, 30, 60, 90))
    bounds = layout.bounds or ()
    inputs = most_precise(case, target, draw(case, layout))
    op = call(case, target.backend, layout, device=target.device)
    clean = run(op, inputs)
    for name in case.timed:
        inputs[name] = inputs[name].clone()
        inputs[name][:, bounds[1] + 4] = torch.nan
    spoilt = run(op, inputs)
    for name, x in spoilt.items():
        if name == "output" or name[1:] in case.timed:
            assert torch.equal(x[:, : bounds[1]], clean[name][:, : bounds[1]]), name
            assert torch.equal(x[:, bounds[2] :], clean[name][:, bounds[2] :]), name
        elif name.startswith("state") or name == "dinitial_state":
            assert torch.equal(x[::2], clean[name][::2]), name


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case in CASES
        if case.differentiable
        for backend in ("reference", "chunked", "cpu")
        if dispatch.offers(case.folder, backend)
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    layout = Layout(1, 9, (0, 0, 7, 9)) if case.takes("cu_seqlens") else Layout(2, 9)
    # A minus infinity has no neighbours to take a difference with.
    x = leaves({name: y.nan_to_num(neginf=0.3) for name, y in draw(case, layout).items()})
    for reverse in (False, True) if case.takes("reverse") else (False,):
        op = call(case, backend, layout, reverse)
        assert torch.autograd.gradcheck(
            lambda *y, op=op: op(dict(zip(x, y))), tuple(x.values()), fast_mode=True
        )


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mainstem":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("case", "target"), runs(one_form))
def test_operators_are_as_they_say(case: Case, target: Target) -> None:
    """What `torch.compile` is told of an operator is what it does: types, shapes, no input changed."""
    quick = ["test_schema", "test_faketensor"]
    full = [*quick, "test_autograd_registration", "test_aot_dispatch_dynamic"]
    with_bounds = Layout(1, 6, (0, 4, 6)) if case.takes("cu_seqlens") else Layout(1, 6)
    for layout, checks in (
        (with_bounds, full if case in first_cases() and not target.interpreted else quick),
        (Layout(2, 5, state=False), quick),
    ):
        recorder = Recorder()
        inputs = leaves(cast(draw(case, layout), torch.float32, target.device))
        with recorder:
            call(case, target.backend, layout, device=target.device)(inputs)
        if not recorder.calls:
            pytest.skip("outside of a graph this is plain PyTorch")
        for func, args, kwargs in recorder.calls:
            fresh = [
                y.detach().requires_grad_(case.differentiable and y.is_floating_point())
                if isinstance(y, Tensor)
                else y
                for y in args
            ]
            torch.library.opcheck(func, tuple(fresh), kwargs, test_utils=checks)


@pytest.mark.parametrize("case", named(CASES))
def test_compiles_and_exports(case: Case) -> None:
    """Compiled for lengths that change, and exported, it is what it is eagerly."""
    packed = case.takes("cu_seqlens")

    def make(length: int) -> Inputs:
        bounds = (0, 3, 3, length) if packed else None
        inputs = cast(draw(case, Layout(1, length, bounds)), torch.float32)
        return inputs | ({"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)} if packed else {})

    names = list(make(5))

    def op(*inputs: Tensor) -> Any:
        return case.function(**dict(zip(names, inputs)), **case.keywords)

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return op(*inputs)

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (24, 31):
        got = run(lambda x: (compiled(*x.values()),), make(length))
        wanted = run(lambda x: (op(*x.values()),), make(length))
        assert_near(got, wanted, torch.float32)
    example = tuple(make(24).values())
    with torch.no_grad():
        exported = torch.export.export(Module(), example).module()(*example)
        torch.testing.assert_close(exported, op(*example))


@pytest.mark.slow
@pytest.mark.parametrize("case", named(tuple(case for case in first_cases() if case.differentiable)))
def test_compiles_with_inductor(case: Case) -> None:
    def op(inputs: Inputs) -> tuple[Tensor, ...]:
        return (case.function(**inputs, **case.keywords).abs().sin(),)

    inputs = cast(draw(case, Layout(2, 24)), torch.float32)
    compiled = torch.compile(op, fullgraph=True)
    assert_near(run(compiled, inputs), run(op, inputs), torch.float32)


@pytest.mark.parametrize("case", named(CASES))
def test_auto_is_silent(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(case, "auto")(cast(draw(case, Layout(1, 3)), torch.float32))


@pytest.mark.parametrize("case", named(first_cases()))
def test_errors_that_all_share(case: Case) -> None:
    inputs = draw(case, Layout(2, 5))

    def refused(message: str, backend: str = "auto", **change: Any) -> None:
        with pytest.raises(ValueError, match=message):
            case({**inputs, **change}, backend=backend)

    refused("backend='gpu' is unknown: choose one of auto, reference", backend="gpu")
    for backend in set(dispatch.BACKENDS) - {"reference"} - {target.backend for target in targets(case)}:
        refused(f"{case.folder} has no {backend} backend; these can: auto, ", backend=backend)
    if case.takes("cu_seqlens"):
        refused("with cu_seqlens the batch must be 1", cu_seqlens=torch.tensor([0, 5]))
        refused("cu_seqlens must be an int32 vector", cu_seqlens=torch.tensor([0.0, 5.0]))
    if case.stateful:
        refused(r"initial_state must be \(", initial_state=inputs["initial_state"][:1])
        refused(r"initial_state must be \(", initial_state=inputs["initial_state"][..., None])


@pytest.mark.parametrize("bounds", [(0, 4), (1, 5), (0, 3, 2, 5), (0, 6)], ids=str)
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case in first_cases()
        if case.takes("cu_seqlens")
        for backend in ("reference", *dict.fromkeys(target.backend for target in targets(case)))
        if backend
        != "triton"  # a call of it reads the bounds as a `chunk_table`, which has a test of its own
    ],
)
def test_bounds_must_rise_from_0_to_T(case: Case, backend: str, bounds: tuple[int, ...]) -> None:
    layout = Layout(1, 5, bounds)
    inputs = cast(draw(case, layout), torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=5"):
        call(case, backend, layout)(inputs)
