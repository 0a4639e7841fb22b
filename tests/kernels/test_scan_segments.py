"""Long sequences are cut into segments on a GPU; here so short that the interpreter meets several of them."""

import importlib.util
from typing import Any

import pytest
import torch
from comparison import assert_near, call, cast, reference, run
from operation_case import Case, Layout, every_case

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of every operation do it on the GPU"),
]

PACKED = Layout(1, 50, (0, 30, 50))
CASES = [case for case in every_case() if case.folder == "scan"]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_segments_are_the_whole(case: Case, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mainstem.kernels.scan import triton

    passes: list[bool] = []
    segments = triton._Walk.segments

    def counted(walk: Any) -> Any:
        passes.append(True)
        return segments(walk)

    monkeypatch.setattr(triton, "SEGMENT", 4)
    monkeypatch.setattr(triton, "multiprocessors", lambda device: 10**6)
    monkeypatch.setattr(triton._Walk, "segments", counted)
    inputs, wanted = reference(case, PACKED, torch.float32, reverse)
    got = run(call(case, "triton", PACKED, reverse), cast(inputs, torch.float32))
    assert_near(got, wanted, torch.float32)
    assert passes
