"""Several Householder factors a token, against a loop written from the paper."""

from typing import Any

import pytest
import torch
from cases.delta_product import make
from torch import Tensor

from mainstem import kernels

delta_product: Any = kernels.delta_product
step: Any = kernels.delta_product_step
delta_rule: Any = kernels.delta_rule


def by_hand(x: dict[str, Tensor], reverse: bool) -> tuple[Tensor, Tensor]:
    """Siems et al. 2025, arXiv:2502.10297, with the decay of the gated form."""
    S, outputs = x["initial_state"], {}
    tokens, factors, K = x["k"].shape[1], x["k"].shape[2], x["q"].shape[-1]
    g = x.get("decay", torch.zeros_like(x["q"]))
    g = g if g.ndim == 4 else g[..., None]
    for t in reversed(range(tokens)) if reverse else range(tokens):
        S = g[:, t, ..., None].exp() * S
        for i in range(factors):
            k, v, beta = (
                x["k"][:, t, i, ..., None],
                x["v"][:, t, i, :, None],
                x["beta"][:, t, i, :, None, None],
            )
            S = S - beta * k @ (k.mT @ S) + beta * k @ v
        outputs[t] = (x["q"][:, t, :, None] @ S).squeeze(-2) * K**-0.5
    return torch.stack([outputs[t] for t in range(tokens)], 1), S


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_is_the_product_of_its_factors_in_order(decay: str, reverse: bool, backend: str) -> None:
    x = make(2, 7, None, decay)
    got = delta_product(**x, return_final_state=True, reverse=reverse, backend=backend)
    for a, b in zip(got, by_hand(x, reverse)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_one_factor_is_the_delta_rule(reverse: bool) -> None:
    x = make(2, 20, None, R=1)
    plain = {name: y[:, :, 0] if name in ("k", "v", "beta") else y for name, y in x.items()}
    torch.testing.assert_close(delta_product(**x, reverse=reverse), delta_rule(**plain, reverse=reverse))


def test_two_reflections_turn_a_state_by_any_angle() -> None:
    """Two factors with β = 2 are a rotation (ibid.), which no single factor is."""
    angle = torch.tensor(0.7, dtype=torch.float64)
    half = angle / 2
    k = torch.stack([torch.tensor([1.0, 0.0]).double(), torch.stack([half.cos(), half.sin()])])
    k = k.expand(5, 2, 2)[None, :, :, None]
    x = {
        "q": torch.ones(1, 5, 1, 2),
        "k": k,
        "v": torch.zeros(1, 5, 2, 1, 1),
        "beta": torch.full((1, 5, 2, 1), 2.0),
    }
    state = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    x = {name: y.double() for name, y in x.items()}
    _, turned = delta_product(**x, initial_state=state.double(), return_final_state=True)
    wanted = torch.stack([(5 * angle).cos(), (5 * angle).sin()])
    torch.testing.assert_close(turned.flatten(), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 9)}, r"k must be \(B, T, R, H, K\) .*got k \(2, 5, 2, 9\) beside q"),
        ({"k": torch.zeros(2, 5, 0, 2, 9)}, "R ≥ 1 factors a token"),
        ({"v": torch.zeros(2, 5, 2, 2, 20)}, r"v must be \(B, T, R, H, V\) and beta \(B, T, R, H\)"),
        ({"beta": torch.zeros(2, 5, 2)}, r"got v .* and beta \(2, 5, 2\)"),
        ({"decay": torch.zeros(2, 5, 3, 2)}, r"decay must be \(B, T, H\) or"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_product(**{**make(2, 5, None), **change})


def test_errors_of_a_step() -> None:
    x = {name: y[:, 0] for name, y in make(2, 1, None).items() if name != "initial_state"}
    state = torch.zeros(2, 2, 9, 20)
    with pytest.raises(ValueError, match=r"k must be \(B, R, H, K\) with R ≥ 1 factors"):
        step(**{**x, "k": x["k"][:, 0]}, state=state)
    with pytest.raises(ValueError, match=r"v must be \(B, R, H, V\)"):
        step(**{**x, "v": x["v"][:, 0]}, state=state)


def test_bounds_of_inference_mode_may_be_written_to() -> None:
    with torch.inference_mode():
        inputs = make(1, 9, None)
        del inputs["initial_state"]
        bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
        delta_product(**inputs, cu_seqlens=bounds)
        bounds[1] = 6
        got = delta_product(**inputs, cu_seqlens=bounds)
        torch.testing.assert_close(got, delta_product(**inputs, cu_seqlens=bounds.clone()))
