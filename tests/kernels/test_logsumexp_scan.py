from typing import Any

import pytest
import torch
from operation_case import backends
from torch import Tensor

from mainstem.kernels import logcumsumexp, logsumexp_scan

H, V = 2, 3
BACKENDS = backends("scan")


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_softmax_and_with_torch(backend: str) -> None:
    s, v = torch.randn(2, 100, H), torch.randn(2, 100, H, V)
    weights = s.mT[..., None, :].expand(2, H, 100, 100)
    weights = weights.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1)
    o = logsumexp_scan(s, v, backend=backend)
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", weights, v))
    torch.testing.assert_close(logcumsumexp(s, backend=backend), s.logcumsumexp(1))


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_many_equal_large_scores_keep_adding_up(backend: str) -> None:
    z = logcumsumexp(torch.full((1, 50_000, 1), 1e4), backend=backend)
    assert isinstance(z, Tensor)
    assert z[0, -1].item() == pytest.approx(1e4 + torch.tensor(50_000.0).log().item(), abs=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_see_is_zero(backend: str) -> None:
    s = torch.full((1, 80, H), -torch.inf).requires_grad_()
    v = torch.randn(1, 80, H, V, requires_grad=True)
    o, state = logsumexp_scan(s, v, return_final_state=True, backend=backend)
    z = logcumsumexp(s, backend=backend)
    assert isinstance(z, Tensor)
    assert torch.equal(o, torch.zeros_like(o))
    empty = torch.zeros(1, H, V + 2)
    empty[..., 0] = -torch.inf
    assert torch.equal(state, empty)
    assert torch.equal(z, torch.full_like(z, -torch.inf))
    gradients = torch.autograd.grad(o.sum() + state[..., 1:].sum(), (s, v))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_through_the_state_between_pieces(backend: str) -> None:
    s, v = torch.randn(2, 150, H, requires_grad=True), torch.randn(2, 150, H, V, requires_grad=True)
    whole = logsumexp_scan(s, v, backend=backend)
    state, pieces = torch.zeros(2, H, V + 2), []
    state[..., 0] = -torch.inf
    for part in (slice(0, 1), slice(1, 71), slice(71, 150)):
        o, state = logsumexp_scan(
            s[:, part], v[:, part], initial_state=state, return_final_state=True, backend=backend
        )
        pieces.append(o)
    joined = torch.cat(pieces, 1)
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(joined, whole)
    wanted = torch.autograd.grad(whole.square().sum(), (s, v))
    for x, y in zip(torch.autograd.grad(joined.square().sum(), (s, v)), wanted):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["s", "v", "initial_state", "do"])
def test_what_is_not_finite_stays_in_its_sequence_and_head(backend: str, bad: str) -> None:
    # All of these sequences lie in one block of 64 tokens, but for the last.
    bounds, place = [0, 9, 30, 70], 20
    inputs: dict[str, Any] = {
        "s": torch.randn(1, 70, 2),
        "v": torch.randn(1, 70, 2, 3),
        "initial_state": torch.rand(3, 2, 5),
        "do": torch.randn(1, 70, 2, 3),
    }
    at = (1, 1) if bad == "initial_state" else (0, place, 1)
    inputs[bad][at] = torch.nan
    do = inputs.pop("do")
    leaves = [x.requires_grad_() for x in inputs.values()]
    o = logsumexp_scan(**inputs, cu_seqlens=torch.tensor(bounds), backend=backend)
    assert isinstance(o, Tensor)
    ds, dv, dinitial = torch.autograd.grad(o, leaves, do)
    spoiled = torch.zeros(70, 2, dtype=torch.bool)
    spoiled[9:30, 1] = True
    for x in (o[0], dv[0], ds[0, :, :, None]):
        assert x[~spoiled].isfinite().all()
    assert dinitial[[0, 2]].isfinite().all()
    assert dinitial[1, 0].isfinite().all()
    # Nothing before a token sees it, nor does the gradient of what comes after an output.
    if bad in ("s", "v"):
        assert o[0, 9:place].isfinite().all()
        assert o[0, place:30, 1].isnan().any(-1).all()
    if bad == "do":
        assert dv[0, place + 1 : 30].isfinite().all()
        assert dv[0, 9 : place + 1, 1].isnan().any(-1).all()
