import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mainstem.kernels import dispatch, gpu


@pytest.fixture(autouse=True)
def _nothing_said_before() -> Iterator[None]:
    dispatch.say_once.cache_clear()
    yield
    dispatch.say_once.cache_clear()


@pytest.fixture
def choosy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the operation `linear` a cpu backend that refuses more than 2 tokens."""

    def unable(*tensors: Tensor) -> str | None:
        return "more than 2 tokens" if tensors[0].shape[0] > 2 else None

    load = dispatch._load
    picky = types.SimpleNamespace(unable=unable)
    monkeypatch.setattr(
        dispatch, "_load", lambda operation, name: picky if name == "cpu" else load(operation, name)
    )


def test_auto_is_the_fast_backend_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.resolve("linear", "auto", torch.zeros(1)) == "cpu"
    assert dispatch.implementation("linear", "auto", torch.zeros(1)).__name__ == "mainstem.kernels.linear.cpu"
    monkeypatch.setattr(dispatch, "offers", lambda operation, backend: backend in ("reference", "chunked"))
    assert dispatch.resolve("linear", "auto", torch.zeros(1)) == "chunked"


@pytest.mark.usefixtures("choosy")
def test_what_a_backend_refuses_another_serves_and_it_is_said_once() -> None:
    assert dispatch.resolve("linear", "auto", torch.zeros(2)) == "cpu"
    with pytest.warns(UserWarning, match="taking the slower chunked backend on cpu, because more than 2"):
        assert dispatch.resolve("linear", "auto", torch.zeros(3)) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("linear", "auto", torch.zeros(4)) == "chunked"


@pytest.mark.usefixtures("choosy")
def test_a_backend_that_was_asked_for_and_refuses_is_an_error() -> None:
    message = r"backend='cpu' cannot serve this call: more than 2 tokens; these can: auto, reference, chunked"
    with pytest.raises(ValueError, match=message):
        dispatch.resolve("linear", "cpu", torch.zeros(3))
    assert dispatch.resolve("linear", "cpu", torch.zeros(2)) == "cpu"


def test_unknown() -> None:
    with pytest.raises(ValueError, match="backend='gpu' is unknown: choose one of auto, reference, chunked"):
        dispatch.resolve("linear", "gpu", torch.zeros(1))
    assert dispatch.why_not("linear", "gpu", torch.device("cpu")) == "linear has no gpu backend"


def test_devices() -> None:
    cuda = torch.device("cuda")
    assert dispatch.why_not("linear", "cpu", cuda) == (
        "the cpu backend needs tensors on the CPU, and these are on cuda"
    )


def test_triton_needs_a_device_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "offers", lambda operation, backend: True)
    monkeypatch.setattr(dispatch, "missing", lambda backend: None)
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.interpreted()
    assert dispatch.why_not("linear", "triton", cpu) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert dispatch.why_not("linear", "triton", cpu) == (
        "the triton backend needs tensors on a CUDA device, and these are on cpu"
    )


def test_triton_leaves_double_precision_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "offers", lambda operation, backend: True)
    monkeypatch.setattr(dispatch, "missing", lambda backend: None)
    monkeypatch.setattr(dispatch, "_load", lambda operation, backend: types.SimpleNamespace())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (torch.float64, torch.complex128):
        with pytest.raises(ValueError, match="the triton backend computes in float32"):
            dispatch.resolve("linear", "triton", torch.zeros(1, dtype=dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        assert dispatch.resolve("linear", "triton", torch.zeros(1, dtype=dtype)) == "triton"


def test_the_tile_table_where_there_is_no_device() -> None:
    cpu = torch.device("cpu")
    assert gpu.capability(cpu) in gpu.SHARED_LIMIT
    assert gpu.multiprocessors(cpu) > 0
    assert gpu.dot_precision(torch.float32) == "tf32x3"
