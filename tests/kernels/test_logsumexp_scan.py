from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainstem.kernels import logcumsumexp, logsumexp_scan, logsumexp_scan_step

BACKENDS = ["chunked", "cpu"]
H, V = 2, 3


def make(batch: int, length: int, sequences: int) -> dict[str, Any]:
    s = 3 * torch.randn(batch, length, H, dtype=torch.float64)
    s[:, ::5, 0] = -torch.inf
    w = torch.randn(sequences, H, V, dtype=torch.float64)
    m, u = torch.randn(sequences, H, 1, dtype=torch.float64), torch.rand(sequences, H, 1, dtype=torch.float64)
    v = torch.randn(batch, length, H, V, dtype=torch.float64)
    return {"s": s, "v": v, "initial_state": torch.cat((m, 1 + u, w), -1)}


def empty_state(sequences: int, dtype: torch.dtype = torch.float32) -> Tensor:
    state = torch.zeros(sequences, H, V + 2, dtype=dtype)
    state[..., 0] = -torch.inf
    return state


def scan(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scan, and return of the final state what does not depend on the level m that it is measured from."""
    o, state = logsumexp_scan(return_final_state=True, **inputs)
    m, u, w = state[..., 0], state[..., 1], state[..., 2:]
    seen = u > 0
    u = torch.where(seen, u, 1)
    return o, torch.where(seen, m + u.log(), -torch.inf), w / u[..., None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_reference(
    against_reference: Callable[..., None], layout: Any, reverse: bool, backend: str, dtype: torch.dtype
) -> None:
    inputs = make(layout.batch, layout.length, layout.sequences)
    op = partial(scan, cu_seqlens=layout.cu_seqlens, reverse=reverse)
    against_reference(op, inputs, backend=backend, dtype=dtype)
    del inputs["initial_state"]
    against_reference(op, inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logcumsumexp_matches_the_reference(
    against_reference: Callable[..., None], layout: Any, reverse: bool, backend: str, dtype: torch.dtype
) -> None:
    inputs = {"s": make(layout.batch, layout.length, layout.sequences)["s"]}
    op = partial(logcumsumexp, cu_seqlens=layout.cu_seqlens, reverse=reverse, return_final_state=True)
    against_reference(op, inputs, backend=backend, dtype=dtype)
    inputs["initial_state"] = torch.randn(layout.sequences, H, dtype=torch.float64)
    against_reference(op, inputs, backend=backend, dtype=dtype)


def test_agrees_with_softmax_and_with_torch() -> None:
    s, v = torch.randn(2, 100, H), torch.randn(2, 100, H, V)
    weights = s.mT[..., None, :].expand(2, H, 100, 100)
    weights = weights.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(logsumexp_scan(s, v), torch.einsum("bhij,bjhv->bihv", weights, v))
    torch.testing.assert_close(logcumsumexp(s), s.logcumsumexp(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, reverse: bool) -> None:
    inputs = make(1, 20, 3)
    inputs["s"] = inputs["s"].nan_to_num(neginf=0.3)
    bounds = torch.tensor([0, 0, 19, 20])

    def op(s: Tensor, v: Tensor, state: Tensor) -> Any:
        return scan(s=s, v=v, initial_state=state, cu_seqlens=bounds, reverse=reverse, backend=backend)

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs.values()], fast_mode=True)
    cumulative = partial(logcumsumexp, cu_seqlens=bounds, reverse=reverse, backend=backend)
    assert torch.autograd.gradcheck(cumulative, [inputs["s"]], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_scores_far_from_zero(against_reference: Callable[..., None], backend: str, offset: float) -> None:
    inputs = {"s": torch.randn(1, 300, H).round(decimals=1) * 3 + offset, "v": torch.randn(1, 300, H, V)}
    inputs["s"][:, ::3] = -inputs["s"][:, ::3]
    against_reference(partial(logsumexp_scan), inputs, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_equal_large_scores_keep_adding_up(backend: str) -> None:
    z = logcumsumexp(torch.full((1, 50_000, 1), 1e4), backend=backend)
    assert isinstance(z, Tensor)
    assert z[0, -1].item() == pytest.approx(1e4 + torch.tensor(50_000.0).log().item(), abs=2e-3)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_see_is_zero(backend: str) -> None:
    s = torch.full((1, 80, H), -torch.inf).requires_grad_()
    v = torch.randn(1, 80, H, V, requires_grad=True)
    o, state = logsumexp_scan(s, v, return_final_state=True, backend=backend)
    z = logcumsumexp(s, backend=backend)
    assert isinstance(z, Tensor)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(state, empty_state(1))
    assert torch.equal(z, torch.full_like(z, -torch.inf))
    gradients = torch.autograd.grad(o.sum() + state[..., 1:].sum(), (s, v))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_are_the_whole_and_gradients_are_repeatable(backend: str) -> None:
    s, v = torch.randn(2, 150, H, requires_grad=True), torch.randn(2, V, 150, H, requires_grad=True)
    whole = logsumexp_scan(s, v.movedim(1, -1), backend=backend)
    assert isinstance(whole, Tensor)
    state, pieces = empty_state(2), []
    for part in (slice(0, 1), slice(1, 71), slice(71, 150)):
        o, state = logsumexp_scan(
            s[:, part],
            v.movedim(1, -1)[:, part],
            initial_state=state,
            return_final_state=True,
            backend=backend,
        )
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    wanted = torch.autograd.grad(whole.square().sum(), (s, v), retain_graph=True)
    again = torch.autograd.grad(whole.square().sum(), (s, v))
    got = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), (s, v))
    for x, y, z in zip(got, wanted, again):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert torch.equal(y, z)


def test_step_is_the_scan() -> None:
    inputs = make(2, 12, 2)
    o, final = logsumexp_scan(**inputs, return_final_state=True, backend="chunked")
    state, steps = inputs["initial_state"], []
    for s, v in zip(inputs["s"].unbind(1), inputs["v"].unbind(1)):
        step, state = logsumexp_scan_step(s, v, state)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), o)
    torch.testing.assert_close(state, final)


def test_graphs(through_graphs: Callable[..., None]) -> None:
    def op(s: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        o, z = logsumexp_scan(s, v, cu_seqlens=bounds), logcumsumexp(s, cu_seqlens=bounds)
        assert isinstance(o, Tensor)
        assert isinstance(z, Tensor)
        return o * z[..., None]

    def inputs(length: int) -> tuple[Tensor, ...]:
        return torch.randn(1, length, H), torch.randn(1, length, H, V), torch.tensor([0, 3, 3, length])

    through_graphs(op, inputs)
    s, v, bounds = (x.requires_grad_(x.is_floating_point()) for x in inputs(24))
    state = make(1, 1, 1)["initial_state"].float().requires_grad_()
    operators = torch.ops.mainstem
    torch.library.opcheck(operators.logsumexp_scan.default, (s, v, None, state, True, "chunked"))
    torch.library.opcheck(operators.logsumexp_scan.default, (s, v, bounds, None, False, "auto"))
    torch.library.opcheck(operators.logcumsumexp.default, (s, bounds, None, False, "auto"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s": torch.zeros(1, 5, H)}, "s must be"),
        ({"v": torch.zeros(1, 4, H, V, dtype=torch.int64)}, "v must be floating point"),
        ({"initial_state": torch.zeros(1, H, V)}, "initial_state must be"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"s": torch.zeros(1, 4, H), "v": torch.zeros(1, 4, H, V), **change}
    with pytest.raises(ValueError, match=message):
        logsumexp_scan(**arguments)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    reverse=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_a_sequence_in_a_pack_is_the_sequence_alone(lengths: list[int], reverse: bool, backend: str) -> None:
    inputs = make(1, sum(lengths), len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = scan(**inputs, cu_seqlens=bounds, reverse=reverse, backend=backend)
    for i, (begin, end) in enumerate(pairwise(bounds.tolist())):
        s, v, state = inputs["s"][:, begin:end], inputs["v"][:, begin:end], inputs["initial_state"][i : i + 1]
        alone = scan(s=s, v=v, initial_state=state, reverse=reverse, backend=backend)
        torch.testing.assert_close(packed[0][:, begin:end], alone[0])
        torch.testing.assert_close([x[i : i + 1] for x in packed[1:]], list(alone[1:]))
