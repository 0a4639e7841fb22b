import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from comparison import assert_near, cast, run
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_case import Inputs
from torch import Tensor

from mainstem import kernels

# Calls by keyword dictionaries, some of them wrong on purpose, say nothing to a type checker.
attention: Any = kernels.attention

H, HK, D, V = 4, 2, 8, 5

# Batch, queries, keys, bounds of the queries, bounds of the keys.
LAYOUTS: dict[str, tuple[int, int, int, list[int] | None, list[int] | None]] = {
    "square": (2, 70, 70, None, None),
    "more_keys": (2, 40, 70, None, None),
    "more_queries": (2, 70, 40, None, None),
    "one_query": (2, 1, 30, None, None),
    "no_keys": (1, 5, 0, None, None),
    "no_queries": (1, 0, 5, None, None),
    "packed_even": (1, 60, 60, [0, 20, 40, 60], None),
    "packed_across": (1, 70, 80, [0, 0, 1, 30, 30, 59, 70], [0, 5, 5, 40, 45, 75, 80]),
}


def make(batch: int, queries: int, keys: int) -> Inputs:
    shapes = {"q": (batch, queries, H, D), "k": (batch, keys, HK, D), "v": (batch, keys, HK, V)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_matches_the_reference(layout: str, causal: bool, window: int | None) -> None:
    batch, queries, keys, bounds, bounds_k = LAYOUTS[layout]
    op = partial(
        attention,
        causal=causal,
        window=window,
        cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32),
        cu_seqlens_k=None if bounds_k is None else torch.tensor(bounds_k, dtype=torch.int32),
    )
    inputs = cast(cast(make(batch, queries, keys), torch.bfloat16), torch.float64)
    wanted = run(lambda x: (op(**x, backend="reference"),), inputs)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        got = run(lambda x: (op(**x, backend="chunked"),), cast(inputs, dtype))
        assert {x.dtype for x in got.values()} == {dtype}
        assert_near(got, wanted, dtype)


def test_a_cache_in_front_changes_nothing() -> None:
    q, k, v = (x.float() for x in make(2, 600, 600).values())
    whole = attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q[:, 301:], k, v, causal=True), whole[:, 301:])
    torch.testing.assert_close(attention(q[:, 599:], k, v, causal=True), whole[:, 599:])


def test_a_window_makes_no_square_of_scores() -> None:
    length = 40_000
    q, k, v = torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8)
    o = attention(q, k, v, causal=True, window=16)
    part = slice(length - 40, None)
    wanted = attention(q[:, part], k[:, part], v[:, part], causal=True, window=16, backend="reference")
    torch.testing.assert_close(o[:, -20:], wanted[:, -20:])


def test_large_scores_and_nan() -> None:
    q, k, v = (x.float() for x in make(1, 60, 60).values())
    q = (1e4 * q).transpose(1, 2).contiguous().transpose(1, 2)
    bounds = torch.tensor([0, 20, 60])
    wanted = attention(q, k, v, causal=True, cu_seqlens=bounds, backend="reference")
    o = attention(q, k, v, causal=True, cu_seqlens=bounds)
    torch.testing.assert_close(o, wanted, rtol=1e-3, atol=1e-3)
    k[:, 30] = torch.nan
    o = attention(q, k, v, causal=True, cu_seqlens=bounds)
    assert o[:, :20].isfinite().all()
    assert o[:, 30:].isnan().all()


def test_auto_is_silent_in_double_precision() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(**make(1, 6, 6), causal=True)


@pytest.mark.parametrize("window", [None, 4])
def test_compiles_and_exports_without_bounds(window: int | None) -> None:
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = attention(q, k, v, causal=True, window=window)
        return o

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return op(q, k, v)

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (24, 31):
        inputs = cast(make(2, length, length), torch.float32)
        got, wanted = run(lambda x: (compiled(**x),), inputs), run(lambda x: (op(**x),), inputs)
        assert_near(got, wanted, torch.float32)
    example = tuple(cast(make(2, 24, 24), torch.float32).values())
    exported = torch.export.export(Module(), example).module()
    torch.testing.assert_close(exported(*example), op(*example))


def test_operator() -> None:
    q, k, v = (x.float().requires_grad_() for x in make(1, 9, 9).values())
    bounds = torch.tensor([0, 4, 9])
    operator = torch.ops.mainstem.attention.default
    torch.library.opcheck(operator, (q, k, v, True, 3, 0.3, bounds, bounds, "auto"))
    torch.library.opcheck(operator, (q, k, v, False, None, 0.3, None, None, "chunked"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 4, 3, D), "v": torch.zeros(1, 4, 3, V)}, "heads of k must divide"),
        ({"k": torch.zeros(1, 4, HK, D + 1)}, "k must be"),
        ({"v": torch.zeros(1, 5, HK, V)}, "v must be"),
        ({"v": torch.zeros(1, 4, HK, V).bfloat16()}, "one type"),
        ({"window": 0}, "window must be at least 1"),
        ({"cu_seqlens_k": torch.tensor([0, 4])}, "needs cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 2, 4])}, "as many sequences"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    inputs = {name: x.float() for name, x in make(1, 4, 4).items()}
    with pytest.raises(ValueError, match=message):
        attention(**{**inputs, **change})


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 200),
)
def test_a_sequence_in_a_pack_is_the_sequence_alone(
    lengths: list[tuple[int, int]], causal: bool, window: int | None
) -> None:
    bounds_q, bounds_k = torch.tensor([(0, 0), *lengths]).cumsum(0).unbind(1)
    inputs = make(1, int(bounds_q[-1]), int(bounds_k[-1]))
    run = partial(attention, causal=causal, window=window)
    o = run(**inputs, cu_seqlens=bounds_q, cu_seqlens_k=bounds_k)
    pieces = zip(pairwise(bounds_q.tolist()), pairwise(bounds_k.tolist()))
    for (q0, q1), (k0, k1) in pieces:
        alone = run(inputs["q"][:, q0:q1], inputs["k"][:, k0:k1], inputs["v"][:, k0:k1], backend="reference")
        torch.testing.assert_close(o[:, q0:q1], alone)
