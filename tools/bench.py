"""`mainstem bench`: time, rate and error of every scan on this machine, beside PyTorch's causal attention."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .bench_run import Bench
    from .operations import Operation


def names(text: str) -> list[str]:
    """Split at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def integers(text: str) -> list[int]:
    """Split at commas into integers."""
    return [int(number) for number in text.split(",")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("mainstem bench", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--op", type=names, default=["all"], help="operations, comma-separated (default: all)"
    )
    parser.add_argument("--decay", type=names, default=["all"], help="none,head,token,key (default: all)")
    parser.add_argument(
        "--backend", type=names, default=["all"], help="reference,chunked,cpu,triton (default: all)"
    )
    parser.add_argument("--peer", default="sdpa", choices=["sdpa", "none"], help="what ratios are taken to")
    parser.add_argument(
        "--lengths",
        type=integers,
        default=[512, 2048, 8192, 16384],
        help="values of T (512,2048,8192,16384)",
    )
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64, help="head size")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="cores; with 1, CPU time is measured")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float64", "bfloat16", "float16"],
        help="of the inputs",
    )
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each measurement is repeated")
    parser.add_argument(
        "--output", type=Path, default=Path("bench"), help="folder of bench.csv and bench.png"
    )
    parser.add_argument("--markdown", type=Path, help="also write the table as Markdown to this file")
    return parser.parse_args(argv)


def chosen(argument: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    """Resolve a comma-separated choice; ``all`` is every known name.

    Raises:
        ValueError: a name is not known.
    """
    if list(given) == ["all"]:
        return list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}: {name!r} is unknown, choose from all, {', '.join(known)}")
    return list(given)


def main(argv: Sequence[str]) -> int:
    """Measure what the command line asks for, print the table and write the files.

    Raises:
        ValueError: a name is unknown, a size is not positive, or nothing is left to measure.
    """
    arguments = parse(argv)

    import torch

    from . import bench_report
    from .bench_run import Bench
    from .measure import clock_name, machine, set_threads
    from .operations import Shape

    plan = _plan(arguments)
    for name in ("heads", "dim", "batch", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if min(arguments.lengths) < 1:
        raise ValueError(f"--lengths must be positive, got {arguments.lengths}")
    set_threads(arguments.threads)
    device, dtype = _device(arguments.device), getattr(torch, arguments.dtype)
    shape = Shape(arguments.batch, 0, arguments.heads, arguments.dim)
    bench = Bench(shape, sorted(arguments.lengths), dtype, device, arguments.threads, arguments.seconds)
    console = bench_report.console()
    complete = _run(bench, plan, arguments.peer == "sdpa", console)
    header = machine(device) | {
        "dtype": arguments.dtype,
        "time": clock_name(device, arguments.threads),
        "command": " ".join(["mainstem bench", *argv]),
    }
    bench_report.add_exponents(bench.rows)
    written = bench_report.write(bench.rows, header, arguments.output, arguments.markdown)
    bench_report.show(console, bench.rows, header)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    if not complete:
        print("interrupted: the rows above are what was done", file=sys.stderr)
    return 0 if complete else 130


def _plan(arguments: argparse.Namespace) -> "list[tuple[Operation, str, str]]":
    """List every operation, variant and backend that was asked for."""
    from ..kernels.dispatch import BACKENDS
    from .operations import DECAYS, OPERATIONS

    operations = [OPERATIONS[name] for name in chosen("--op", arguments.op, list(OPERATIONS))]
    decays = chosen("--decay", arguments.decay, DECAYS)
    backends = chosen("--backend", arguments.backend, BACKENDS)
    plan = [
        (operation, variant, backend)
        for operation in operations
        for variant in operation.variants
        for backend in backends
        if variant not in DECAYS or variant in decays
    ]
    if not plan:
        raise ValueError(f"--decay {','.join(decays)}: none of {', '.join(arguments.op)} has such a decay")
    return plan


def _run(bench: "Bench", plan: "list[tuple[Operation, str, str]]", peer: bool, console: "Console") -> bool:
    """Fill the rows under a progress bar; returns False if Ctrl-C ended it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .bench_run import run_plan

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A refreshing thread would add to the process CPU time that is measured.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("bench", total=len(plan) + peer)
        try:
            for title in run_plan(bench, plan, peer):
                progress.update(task, advance=1, description=title, refresh=True)
        except KeyboardInterrupt:
            return False
    return True


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name} cannot be used here: choose auto, cpu or, with a GPU, cuda")
    return torch.device(name)
