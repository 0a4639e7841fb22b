from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem import kernels

# Calls by keyword dictionaries, some of them wrong on purpose, say nothing to a type checker.
linear_recurrence: Any = kernels.linear_recurrence
linear_recurrence_step: Any = kernels.linear_recurrence_step

FAST = ["chunked", "cpu"]
DECAYS = ["none", "head", "token", "channel"]
Check = Callable[..., None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallel kernels are compiled by the one test that needs them
    yield
    torch.set_num_threads(threads)


def make(
    B: int,
    T: int,
    sequences: int | None = None,
    *,
    H: int = 2,
    K: int = 9,
    V: int = 20,
    decay: str = "channel",
) -> dict[str, Tensor]:
    shapes = {
        "q": (B, T, H, K),
        "k": (B, T, H, K),
        "v": (B, T, H, V),
        "initial_state": (B if sequences is None else sequences, H, K, V),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    shape = {"none": None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[decay]
    if shape is not None:
        inputs["decay"] = torch.nn.functional.logsigmoid(2 + torch.randn(shape, dtype=torch.float64))
    return inputs


def call(**fixed: Any) -> Callable[..., Any]:
    return lambda **inputs: linear_recurrence(**inputs, **fixed, return_final_state=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", DECAYS)
def test_matches_reference(
    backend: str, decay: str, layout: Any, reverse: bool, against_reference: Check
) -> None:
    inputs = make(layout.batch, layout.length, layout.sequences, decay=decay)
    op = call(cu_seqlens=layout.cu_seqlens, reverse=reverse)
    against_reference(op, inputs, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_types(backend: str, dtype: torch.dtype, packed: Any, against_reference: Check) -> None:
    inputs = make(packed.batch, packed.length, packed.sequences)
    against_reference(call(cu_seqlens=packed.cu_seqlens.long()), inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("K", "V"), [(1, 1), (16, 64), (60, 33), (64, 64), (128, 16)])
def test_head_sizes(backend: str, K: int, V: int, against_reference: Check) -> None:
    against_reference(call(scale=1.0), make(1, 37, K=K, V=V), backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rate", [0.0, -20.0, -torch.inf, "mixed"])
def test_extreme_decays(backend: str, decay: str, rate: float | str, against_reference: Check) -> None:
    inputs = make(2, 70, decay=decay)
    g = inputs["decay"]
    if isinstance(rate, float):
        g.fill_(rate)
    else:
        g[:, 5::7], g[:, 6::9], g[:, 20:23] = -torch.inf, -20.0, 0.0
        g[:, 40::11, 0] = -torch.inf
    against_reference(call(), inputs, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_gradient_of_a_strong_decay_keeps_its_digits(backend: str, decay: str) -> None:
    inputs = make(1, 70, decay=decay)
    inputs["decay"].fill_(-15.0)
    wanted, got = (
        torch.autograd.grad(
            linear_recurrence(**(x := leaves(inputs, dtype)), backend=name).sum(), x["decay"]
        )[0].double()
        for name, dtype in (("reference", torch.float64), (backend, torch.float32))
    )
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_extreme_values(backend: str, size: float, against_reference: Check) -> None:
    inputs = make(1, 70)
    for name in ("q", "k", "v"):
        inputs[name] *= size
    if size:  # compare on the scale of one
        op = call()
        high = {name: x.clone() for name, x in inputs.items()}
        wanted = op(backend="reference", **high)[0]
        got = op(backend=backend, **{name: x.float() for name, x in inputs.items()})[0]
        assert (got - wanted).abs().max() / wanted.abs().max() < 1e-5
    else:
        against_reference(call(), inputs, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_a_long_sequence_keeps_its_precision(backend: str) -> None:
    length = 100_000 if backend == "cpu" else 4_000
    inputs = make(1, length, H=1, K=4, V=4, decay="token")
    gradients = []
    for name, dtype in (("cpu", torch.float64), (backend, torch.float32)):
        x = leaves(inputs, dtype)
        o = linear_recurrence(**x, backend=name)
        gradients.append(torch.autograd.grad(o.sum(), list(x.values())))
    for wanted, got in zip(*gradients):
        assert (got - wanted).norm() / wanted.norm() < 1e-4


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=0, max_size=6), reverse=st.booleans())
@pytest.mark.parametrize("backend", FAST)
def test_a_packed_sequence_equals_it_alone(backend: str, lengths: list[int], reverse: bool) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x = make(1, int(bounds[-1]), len(lengths), H=1, K=3, V=5)
    o, states = call(cu_seqlens=bounds.int(), reverse=reverse, backend=backend)(**x)
    for i, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        alone = {name: y[:, begin:end] for name, y in x.items() if name != "initial_state"}
        start = x["initial_state"][i : i + 1]
        o_i, state = call(reverse=reverse, backend=backend)(**alone, initial_state=start)
        torch.testing.assert_close(o[:, begin:end], o_i)
        torch.testing.assert_close(states[i : i + 1], state)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_and_pieces_equal_the_whole(backend: str, decay: str) -> None:
    x = make(2, 70, decay=decay)
    state = x.pop("initial_state")
    o, final = call(backend=backend)(**x, initial_state=state)

    def part(begin: int, end: int) -> dict[str, Tensor]:
        return {name: y if y.ndim == 1 else y[:, begin:end] for name, y in x.items()}

    first, middle = call(backend=backend)(**part(0, 33), initial_state=state)
    second, last = call(backend=backend)(**part(33, 70), initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), o)
    torch.testing.assert_close(last, final)
    for t in range(70):
        token = {name: y if y.ndim == 1 else y[:, t] for name, y in x.items()}
        o_t, state = linear_recurrence_step(**{"decay": None, **token}, state=state)
        torch.testing.assert_close(o_t, o[:, t])
    torch.testing.assert_close(state, final)


def test_step_keeps_the_type_of_v_and_a_wide_state() -> None:
    x = {name: y.bfloat16() for name, y in make(2, 1).items()}
    state = x.pop("initial_state").float()
    o, state = linear_recurrence_step(**{name: y[:, 0] for name, y in x.items()}, state=state)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_are_read_as_they_are(backend: str) -> None:
    x = make(2, 20)
    strided = {name: y.transpose(0, -1).contiguous().transpose(0, -1) for name, y in x.items()}
    assert not strided["q"].is_contiguous()
    for a, b in zip(call(backend=backend)(**x), call(backend=backend)(**strided)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_repeat_bit_for_bit_on_any_number_of_threads(backend: str) -> None:
    inputs, runs = make(3, 70), []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads if backend == "cpu" else 1)
        x = leaves(inputs, torch.float32)
        o, state = call(backend=backend)(**x)
        runs.append(torch.autograd.grad(o.sum() + state.square().sum(), list(x.values())))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(backend: str, decay: str) -> None:
    x = leaves(make(1, 6, 2, H=1, K=2, V=3, decay=decay), torch.float64)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    op = call(cu_seqlens=bounds, backend=backend)
    assert torch.autograd.gradcheck(lambda *y: op(**dict(zip(x, y))), tuple(x.values()))


@pytest.mark.parametrize("backend", FAST)
def test_custom_operator(backend: str) -> None:
    x = leaves(make(1, 10, 2), torch.float32)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    op = torch.ops.mainstem.linear_recurrence.default
    for decay, cu_seqlens, state in ((x["decay"], bounds, x["initial_state"]), (None, None, None)):
        args = (x["q"], x["k"], x["v"], decay, 0.5, cu_seqlens, state, False, backend)
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("backend", FAST)
def test_compiles_and_exports(backend: str, through_graphs: Check) -> None:
    def make_inputs(length: int) -> tuple[Tensor, ...]:
        x = make(2, length)
        return tuple(x[name].float() for name in ("q", "k", "v", "decay", "initial_state"))

    def op(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Any:
        return linear_recurrence(q, k, v, decay, initial_state=state, backend=backend)

    through_graphs(op, make_inputs)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    x = leaves(make(2, 24), torch.float32)
    op = torch.compile(lambda **y: linear_recurrence(**y).sin(), fullgraph=True)
    wanted = torch.autograd.grad(linear_recurrence(**x).sin().sum(), list(x.values()))
    for got, want in zip(torch.autograd.grad(op(**x).sum(), list(x.values())), wanted):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 5, 2, 8)},
            r"q and k must have one shape .*got q \(2, 5, 2, 9\) and k \(2, 5, 2, 8\)",
        ),
        ({"v": torch.zeros(2, 4, 2, 8)}, r"v must be \(B, T, H, V\)"),
        (
            {"q": torch.zeros(5, 2, 9), "k": torch.zeros(5, 2, 9)},
            r"q and k must have one shape \(B, T, H, K\)",
        ),
        ({"v": torch.zeros(2, 5, 2, 8, dtype=torch.int64)}, "v must be floating point"),
        ({"decay": torch.zeros(2, 5, 9)}, r"decay must be \(H,\), \(B, T, H\) or \(B, T, H, K\)"),
        ({"initial_state": torch.zeros(1, 2, 9, 8)}, r"initial_state must be .* = \(2, 2, 9, 20\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "with cu_seqlens the batch must be 1"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens must be an int32 vector"),
        ({"backend": "gpu"}, "backend='gpu' is unknown: choose one of auto, reference"),
        ({"backend": "triton"}, "backend='triton' cannot serve this call"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{**make(2, 5), **change})


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 6]])
def test_bounds_must_rise_from_0_to_T(backend: str, bounds: list[int]) -> None:
    x = make(1, 5, len(bounds) - 1)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=5"):
        linear_recurrence(**x, cu_seqlens=torch.tensor(bounds), backend=backend)
