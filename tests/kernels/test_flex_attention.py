import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem.kernels import attention
from mainstem.kernels.attention import flex

BOUNDS = torch.tensor([0, 0, 1, 30, 30, 59, 70], dtype=torch.int32)
ACROSS = torch.tensor([0, 5, 5, 40, 45, 75, 80], dtype=torch.int32)


def make(keys: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (1, 70, 4, 16), (1, keys, 2, 16), (1, keys, 2, 32)
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def uncompiled(*inputs: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all scores are computed
        return flex.forward(*inputs, compiled=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("across", [False, True])
def test_blocks_meet_what_the_reference_sees(causal: bool, window: int | None, across: bool) -> None:
    bounds_k = ACROSS if across else BOUNDS
    q, k, v = make(int(bounds_k[-1]))
    wanted = attention(
        q, k, v, causal=causal, window=window, cu_seqlens=BOUNDS, cu_seqlens_k=bounds_k, backend="reference"
    )
    got = uncompiled(q, k, v, causal, window, 0.25, BOUNDS, bounds_k)
    torch.testing.assert_close(got, wanted)


def test_one_mask_serves_all_layers_until_the_bounds_change(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    build = flex._build

    def counted(*args: Any) -> Any:
        built.append(args[4:])
        return build(*args)

    monkeypatch.setattr(flex, "_build", counted)
    bounds, (q, k, v) = BOUNDS.clone(), make(70)
    first = uncompiled(q, k, v, True, None, 0.25, bounds, bounds)
    assert torch.equal(uncompiled(q, k, v, True, None, 0.25, bounds, bounds), first)
    uncompiled(q, k, v, True, 7, 0.25, bounds, bounds)
    assert built == [(True, None), (True, 7)]
    bounds[2] = 2
    changed = uncompiled(q, k, v, True, None, 0.25, bounds, bounds)
    assert len(built) == 3
    torch.testing.assert_close(
        changed, attention(q, k, v, causal=True, cu_seqlens=bounds, backend="reference")
    )


def test_it_is_for_eager_tensors_on_a_gpu() -> None:
    assert not flex.serves(*make(70))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_on_a_gpu(dtype: torch.dtype, window: int | None) -> None:
    inputs = [x.requires_grad_() for x in make(80, "cuda", dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert flex.serves(*inputs)
    keywords: dict[str, Any] = {"cu_seqlens": BOUNDS.cuda(), "cu_seqlens_k": ACROSS.cuda(), "window": window}
    got = attention(*inputs, causal=True, **keywords)
    wanted = attention(*exact, causal=True, **keywords, backend="reference")
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-3
    weight = torch.randn_like(wanted)
    pairs = [(got, wanted)]
    pairs += zip(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((wanted * weight).sum(), exact)
    )
    for x, y in pairs:
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
