import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")
from mainstem.kernels import vector_math  # noqa: E402
from mainstem.kernels.simd import BYTES, FASTMATH, load, store  # noqa: E402

# Largest error in units in the last place that the module's documentation allows.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "exp2": (torch.exp2, 2),
    "exp": (torch.exp, 2),
    "sigmoid": (torch.sigmoid, 3),
    "tanh": (torch.tanh, 4),
}


def apply(name: str, x: Any) -> Any:
    function = getattr(vector_math, name)
    lanes = BYTES // x.itemsize

    @numba.njit(fastmath=FASTMATH)  # type: ignore[untyped-decorator]
    def run(x: Any, y: Any) -> None:
        for i in range(0, x.size, lanes):
            store(y, i, function(load(x, i)))

    y = np.empty_like(x)
    run(x, y)
    return y


def samples(dtype: Any, limit: float) -> Any:
    generator = np.random.default_rng(0)
    wide = generator.uniform(-limit, limit, 60_000)
    small = np.exp2(generator.uniform(-20, 0, 20_000)) * generator.choice([-1, 1], 20_000)
    return np.concatenate([wide, small]).astype(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_is_right_to_the_last_digits(name: str) -> None:
    exact, allowed = FUNCTIONS[name]
    x = samples(np.float32, 200)
    got = apply(name, x).astype(np.float64)
    wanted = exact(torch.from_numpy(x).double()).numpy()
    normal = (np.abs(wanted) >= np.finfo(np.float32).tiny) & (np.abs(wanted) <= np.finfo(np.float32).max)
    unit = np.spacing(np.abs(wanted[normal]).astype(np.float32)).astype(np.float64)
    assert (np.abs(got[normal] - wanted[normal]) / unit).max() <= allowed
    np.testing.assert_allclose(got[~normal], exact(torch.from_numpy(x)).numpy()[~normal], atol=1.2e-38)
    if name.startswith("exp"):
        assert (got[np.abs(wanted) < np.finfo(np.float32).tiny / 2] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_is_right_to_the_last_digits(name: str) -> None:
    exact, _ = FUNCTIONS[name]
    x = samples(np.float64, 700)
    wanted = exact(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(apply(name, x), wanted, rtol=4e-15, atol=1e-300)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_ends_of_the_range(name: str, dtype: Any) -> None:
    limit = {"exp2": 128 if dtype == np.float32 else 1024}.get(name, 89 if dtype == np.float32 else 710)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, limit, -2 * limit, 1e30, -1e30, 1.0]
    x = np.array([*special, *[0.0] * 6], dtype)
    got, wanted = apply(name, x), FUNCTIONS[name][0](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=float(np.finfo(dtype).tiny))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_decays_without_a_decay(dtype: Any) -> None:
    tiny = np.array([0.0, 1e-9, -1e-9, 3e-8, -2e-8, *[0.0] * 11], dtype)
    for name in ("exp", "exp2"):
        got = apply(name, tiny)
        assert got[0] == 1
        np.testing.assert_allclose(got, 1, rtol=6e-8)
