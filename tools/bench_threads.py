"""`mainstem bench threads`: what a second core gains, for several numbers of heads."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from ..kernels.dispatch import offers
from .bench import chosen, integers, names
from .bench_report import console, three_digits
from .bench_run import forward_backward, usual_variant
from .bench_table import publish
from .measure import machine, set_threads
from .operations import OPERATIONS, Operation, Shape, cast

LEGEND = (
    "Wall time, the least of repeats that take turns between the numbers of threads, forward / forward + "
    "backward. Gain: time of the first number of threads over that of the last."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("mainstem bench threads", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--op",
        type=names,
        default=["all"],
        help="operations, comma-separated (default: all with a cpu backend)",
    )
    add("--heads", type=integers, default=[4, 8], help="values of H (default: 4,8)")
    add("--threads", type=integers, default=[1, 2], help="numbers of threads (default: 1,2)")
    add("--length", type=int, default=2048, help="T (default: %(default)s)")
    add("--dim", type=int, default=64, help="head size (default: %(default)s)")
    add("--seconds", type=float, default=0.5, help="of repeats of each measurement")
    add("--output", type=Path, default=Path("bench"), help="folder of threads.csv and .md (default: bench)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure, print and write the table.

    Raises:
        ValueError: an unknown operation, or a number below one.
    """
    arguments = parse(argv)
    known = [name for name, operation in OPERATIONS.items() if offers(operation.folder, "cpu")]
    operations = [OPERATIONS[name] for name in chosen("--op", arguments.op, known)]
    for name in ("heads", "threads"):
        if min(getattr(arguments, name)) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    header = machine(torch.device("cpu")) | {"command": " ".join(["mainstem bench threads", *argv])}
    del header["threads"]
    plan = [
        (operation, usual_variant(operation), heads) for operation in operations for heads in arguments.heads
    ]
    body = []
    for operation, variant, heads in track(plan, "threads", console=console(), transient=True):
        shape = Shape(1, arguments.length, heads, arguments.dim)
        times = measure(operation, variant, shape, arguments.threads, arguments.seconds)
        row = [f"`{operation.name}`", variant, str(heads)]
        row += [_pair(times[count], 1e3, "ms") for count in arguments.threads]
        first, last = times[arguments.threads[0]], times[arguments.threads[-1]]
        body.append([*row, _pair([a / b for a, b in zip(first, last)], 1, "")])
    columns = ["operation", "variant", "H", *(f"{count} thread(s)" for count in arguments.threads), "gain"]
    publish("threads", columns, body, header, arguments.output, names=2, legend=LEGEND)
    return 0


def _pair(values: Sequence[float], factor: float, unit: str) -> str:
    return f"{' / '.join(three_digits(factor * value) for value in values)} {unit}".strip()


def measure(
    operation: Operation, variant: str, shape: Shape, counts: Sequence[int], seconds: float
) -> dict[int, list[float]]:
    """Seconds of a forward, and of a forward and backward where there is one, by number of threads."""
    inputs = cast(operation.inputs(variant, shape), torch.float32, torch.device("cpu"))
    call = operation.bind(variant, "auto")
    calls: list[Callable[[], object]] = [torch.no_grad()(lambda: call(inputs))]
    if operation.differentiable:
        with torch.no_grad():
            given: Tensor = torch.randn_like(call(inputs))
        calls.append(lambda: forward_backward(call, inputs, given))
    found: dict[int, list[float]] = {count: [] for count in counts}
    for timed in calls:
        best = dict.fromkeys(counts, float("inf"))
        timed()
        end = time.perf_counter() + seconds
        while True:
            for count in counts:
                set_threads(count)
                begin = time.perf_counter()
                timed()
                best[count] = min(best[count], time.perf_counter() - begin)
            if time.perf_counter() >= end:
                break
        for count in counts:
            found[count].append(best[count])
    set_threads(1)
    return found
