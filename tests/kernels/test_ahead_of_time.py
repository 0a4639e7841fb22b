"""Every Triton kernel compiles for A100, H100 and B200, without spills and within their shared memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mainstem
from mainstem.kernels import ahead_of_time, gpu

KERNELS = Path(mainstem.__file__).parent / "kernels"
OPERATIONS = sorted(file.parent.name for file in KERNELS.glob("*/triton.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiling(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are not interpreted, so that there is a compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def check(operation: str, capability: int, *more: str) -> None:
    done = compiling("-m", "mainstem.kernels.ahead_of_time", operation, str(capability), *more)
    assert done.returncode == 0, done.stderr
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert builds, "no build is listed"
    wrong = [
        build
        for build in builds
        if build["spilled"] or build["shared"] > gpu.SHARED_LIMIT[capability] or build["registers"] > 255
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("capability", sorted(gpu.SHARED_LIMIT))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_usual_sizes(operation: str, capability: int) -> None:
    check(operation, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(gpu.SHARED_LIMIT))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_size(operation: str, capability: int) -> None:
    check(operation, capability, "--all")


def test_arguments_must_be_complete(tmp_path: Path) -> None:
    code = """
import triton
from mainstem.kernels.ahead_of_time import Build, compile_ahead

@triton.jit
def nothing(x, n):
    pass

compile_ahead(Build("nothing", nothing, {"x": "*fp32"}, {}, 1, 1), 90)
"""
    file = tmp_path / "nothing.py"
    file.write_text(code)
    done = compiling(file)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: nothing: n must be in one of types and constants"


def test_no_compiler_where_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    build = ahead_of_time.Build("nothing", None, {}, {}, 1, 1)
    with pytest.raises(RuntimeError, match="compile in a process without it"):
        ahead_of_time.compile_ahead(build, 90)
