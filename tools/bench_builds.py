"""`mainstem bench ahead-of-time`: what the Triton kernels take of a GPU that need not be there."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ..kernels import ahead_of_time
from ..kernels.dispatch import offers
from ..kernels.gpu import SHARED_LIMIT
from .bench import chosen, integers, names
from .bench_report import console
from .bench_table import publish
from .measure import machine
from .operations import OPERATIONS

COLUMNS = (
    "operation",
    "kernel",
    "sm",
    "warps",
    "stages",
    "registers",
    "spilled, bytes",
    "shared, bytes",
    "of it",
)
LEGEND = (
    "Compiled as the launchers call them; sm is the compute capability (80 is an A100, 90 an H100, 100 a "
    "B200); registers a thread; spilled is what a thread keeps in local memory; the last column is the share "
    "of the shared memory that one program may have."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("mainstem bench ahead-of-time", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--op",
        type=names,
        default=["all"],
        help="folders of kernels/ (default: all that have Triton kernels)",
    )
    add(
        "--capability", type=integers, default=sorted(SHARED_LIMIT), help="80, 90 or 100 (default: 80,90,100)"
    )
    add("--all", action="store_true", help="every head size, not only the usual ones")
    add(
        "--output",
        type=Path,
        default=Path("bench"),
        help="folder of ahead-of-time.csv and .md (default: bench)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Compile, print and write the table; 1 where a kernel spills or takes more memory than there is.

    Raises:
        ValueError: an unknown folder or capability.
    """
    arguments = parse(argv)
    known = [
        folder for folder in dict.fromkeys(o.folder for o in OPERATIONS.values()) if offers(folder, "triton")
    ]
    folders = chosen("--op", arguments.op, known)
    for capability in arguments.capability:
        if capability not in SHARED_LIMIT:
            raise ValueError(f"--capability {capability}: choose from {', '.join(map(str, SHARED_LIMIT))}")
    plan = [(folder, capability) for folder in folders for capability in arguments.capability]
    body, bad = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers are processes of their own
        compiled = pool.map(lambda place: builds(*place, everything=arguments.all), plan)
        found = list(track(compiled, "ahead of time", total=len(plan), console=console(), transient=True))
    for (folder, capability), listed in zip(plan, found):
        for build in listed:
            share = build["shared"] / SHARED_LIMIT[capability]
            numbers = [build[key] for key in ("warps", "stages", "registers", "spilled", "shared")]
            body.append([folder, build["name"], str(capability), *map(str, numbers), f"{share:.0%}"])
            if build["spilled"] or share > 1:
                bad.append(f"{folder} {build['name']} sm_{capability}")
    header = machine(torch.device("cpu"))
    header = {key: header[key] for key in ("mainstem", "torch", "triton") if key in header}
    header["command"] = " ".join(["mainstem bench ahead-of-time", *argv])
    publish("ahead-of-time", COLUMNS, body, header, arguments.output, names=2, legend=LEGEND)
    for name in bad:
        print(f"spills, or does not fit: {name}", file=sys.stderr)
    return 1 if bad else 0


def builds(folder: str, capability: int, *, everything: bool = False) -> list[dict[str, Any]]:
    """Compile one folder's kernels in a process of its own, where nothing is interpreted.

    Raises:
        RuntimeError: a kernel does not compile; the last line of the compiler's message.
    """
    command = [sys.executable, "-m", ahead_of_time.__name__, folder, str(capability)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command + ["--all"] * everything, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{folder} does not compile for sm_{capability}: {last}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
