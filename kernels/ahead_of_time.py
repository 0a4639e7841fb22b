"""Compile Triton kernels for a GPU that need not be there, and read what they take of it.

``python -m mainstem.kernels.ahead_of_time linear 90`` prints one JSON line for each kernel of that folder
as an H100 would run it. ``TRITON_INTERPRET`` must not be set.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .gpu import SHARED_LIMIT, interpreted


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as its launcher makes it.

    Attributes:
        name: kernel, head sizes and type, for a report.
        kernel: the ``@triton.jit`` function.
        types: Triton types of the run-time arguments, ``"*bf16"`` or ``"i32"``.
        constants: all other arguments, ``None`` for a pointer that is absent.
        warps: warps a program.
        stages: of software pipelining.
        maxnreg: most registers a thread, where the launcher names it; without, the compiler may aim at fewer
            than there are, for occupancy, and spill.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes that a thread spilled, and bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


def compile_ahead(build: Build, capability: int) -> Resources:
    """Compile ``build`` for compute capability 80, 90 or 100; read its resources from the machine code.

    Raises:
        ValueError: an argument of the kernel is in neither or both of ``types`` and ``constants``.
        RuntimeError: ``TRITON_INTERPRET`` is set, so there is no compiler in this process.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: compile in a process without it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = build.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # under a decorator
    names = kernel.arg_names
    if sorted(names) != sorted([*build.types, *build.constants]):
        wrong = set(names) ^ {*build.types, *build.constants} or set(build.types) & set(build.constants)
        raise ValueError(f"{build.name}: {', '.join(sorted(wrong))} must be in one of types and constants")
    source = ASTSource(
        fn=kernel,
        signature={name: build.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        # The allocator aligns tensors, and a launcher passes them whole.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in build.types.items()
            if kind.startswith("*")
        },
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton.backends.nvidia as nvidia

    tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources:\n{text}")
    return int(found[1]), int(found[2])


def main(arguments: list[str] | None = None) -> None:
    """Print the resources of one operation's kernels, one JSON line each."""
    parser = argparse.ArgumentParser(prog="python -m mainstem.kernels.ahead_of_time", description=__doc__)
    parser.add_argument("operation", help="a folder of kernels/ that has a triton.py")
    parser.add_argument("capability", type=int, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--all", action="store_true", help="every head size, not only the usual ones")
    given = parser.parse_args(arguments)
    module = importlib.import_module(f"{__package__}.{given.operation}.triton")
    for build in module.builds(given.capability, everything=given.all):
        resources = compile_ahead(build, given.capability)
        print(
            json.dumps(
                {"name": build.name, "warps": build.warps, "stages": build.stages, **asdict(resources)}
            )
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
