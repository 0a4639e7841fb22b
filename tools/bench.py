"""`mainstem bench`: time, memory and resources of the scans here, beside what else is installed."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .bench_run import Bench, Task
    from .operations import Operation, Shape

WORDS = {
    "scans": ("bench", "time and error of every operation and backend, beside its peers (the default)"),
    "gpu": ("bench", "the same at the six shapes of flash-linear-attention's benchmark, bfloat16, on a GPU"),
    "threads": ("bench_threads", "what a second core gains"),
    "memory": ("bench_memory", "peak memory of 10⁵ and of 10⁶ tokens, streamed in pieces"),
    "ahead-of-time": (
        "bench_builds",
        "registers, spills and shared memory of the Triton kernels, without a GPU",
    ),
    "document": ("bench_document", "all of it, written into a Markdown file between its markers"),
}
GPU_SHAPES = "1,8192,96,128 2,16384,16,128 4,2048,16,128 4,4096,64,128 8,1024,8,64 8,2048,32,256"
"""B, T, H, D."""
USAGE = """usage: mainstem bench [{words}] [options]

{lines}

`mainstem bench WORD --help` tells more.
"""


def names(text: str) -> list[str]:
    """Split at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def integers(text: str) -> list[int]:
    """Split at commas into integers."""
    return [int(number) for number in text.split(",")]


def shapes(text: str) -> list[list[int]]:
    """Split at spaces into shapes ``B,T,H,D``."""
    found = [integers(shape) for shape in text.split()]
    if any(len(shape) != 4 for shape in found):
        raise argparse.ArgumentTypeError(f"shapes are B,T,H,D with spaces between them, not {text!r}")
    return found


def main(argv: Sequence[str]) -> int:
    """Do what the first word asks for: `WORDS`."""
    word, rest = (argv[0], argv[1:]) if argv and argv[0] in WORDS else ("scans", argv)
    if argv and argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:14} {text}" for name, (_, text) in WORDS.items())
        print(USAGE.format(words="|".join(WORDS), lines=lines), end="")
        return 0
    if word in ("scans", "gpu"):
        return scans(rest, gpu=word == "gpu")
    return int(import_module(f"{__package__}.{WORDS[word][0]}").main(list(rest)))


def parse(argv: Sequence[str], *, gpu: bool = False) -> argparse.Namespace:
    """Read the command line of ``scans`` or ``gpu``."""
    word = "gpu" if gpu else "scans"
    parser = argparse.ArgumentParser(f"mainstem bench {word}", description=WORDS[word][1], allow_abbrev=False)
    add = parser.add_argument
    add("--op", type=names, default=["all"], help="operations, comma-separated (default: all)")
    add("--decay", type=names, default=["all"], help="none,head,token,key (default: all)")
    backends = ["auto"] if gpu else ["all"]
    add("--backend", type=names, default=backends, help=f"of ours, or auto, or none (default: {backends[0]})")
    add("--peer", type=names, default=["all"], help="what else is timed, or none (default: all)")
    if gpu:
        add("--shapes", type=shapes, default=shapes(GPU_SHAPES), help=f'B,T,H,D (default: "{GPU_SHAPES}")')
    else:
        add("--lengths", type=integers, default=[512, 2048, 8192, 16384], help="T (512,2048,8192,16384)")
        add("--heads", type=int, default=4)
        add("--dim", type=int, default=64, help="head size")
        add("--batch", type=int, default=1)
        add("--threads", type=int, default=1, help="cores; with 1, CPU time is measured")
    add(
        "--dtype",
        default="bfloat16" if gpu else "float32",
        choices=["float32", "float64", "bfloat16", "float16"],
    )
    add("--device", default="cuda" if gpu else "auto", help="cpu or cuda (default: %(default)s)")
    add("--seconds", type=float, default=0.2 if gpu else 0.5, help="of repeats of each measurement")
    folder = Path("bench/gpu" if gpu else "bench")
    add(
        "--output", type=Path, default=folder, help="folder of bench.csv, .md and .png (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    arguments.word = word
    return arguments


def chosen(argument: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    """Resolve a comma-separated choice; ``all`` is every known name, ``none`` is nothing.

    Raises:
        ValueError: a name is not known.
    """
    if list(given) == ["all"]:
        return list(known)
    if list(given) == ["none"]:
        return []
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}: {name!r} is unknown, choose from all, {', '.join(known)}")
    return list(given)


def scans(argv: Sequence[str], *, gpu: bool = False, clock: Any = None) -> int:
    """Measure what the command line asks for, print the table and write the files.

    An interrupted run leaves what it has, and the same command goes on from there.

    Args:
        argv: the command line.
        gpu: whether it is that of ``mainstem bench gpu``.
        clock: takes the place of `measure.seconds_per_call`.

    Raises:
        ValueError: a name is unknown, a size is not positive, or nothing is left to measure.
    """
    arguments = parse(argv, gpu=gpu)

    import torch

    from . import bench_report, bench_store
    from .bench_run import Bench, add_ratios
    from .measure import clock_name, machine, seconds_per_call, set_threads
    from .peers import versions

    device, dtype = _device(arguments.device), getattr(torch, arguments.dtype)
    tasks = _plan(arguments, device)
    wanted = _shapes(arguments)
    threads = torch.get_num_threads() if gpu else arguments.threads
    set_threads(threads)
    bench = Bench(wanted, dtype, device, threads, arguments.seconds, clock or seconds_per_call)
    header = (
        machine(device)
        | versions()
        | {
            "dtype": arguments.dtype,
            "time": clock_name(device, threads),
            "command": " ".join(["mainstem bench", *(["gpu"] if gpu else []), *argv]),
        }
    )
    bench.rows, done = bench_store.load(arguments.output, header)
    console = bench_report.console()
    if done:
        console.print(f"going on after {len(done)} of {len(tasks)} that {arguments.output} holds")
    complete = _run(bench, tasks, done, arguments.output, header)
    bench_report.add_exponents(bench.rows)
    add_ratios(bench.rows)
    written = bench_report.write(bench.rows, header, arguments.output)
    bench_report.show(console, bench.rows, header)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    if not complete:
        print("interrupted: the rows above are what was done; the same command goes on", file=sys.stderr)
    return 0 if complete else 130


def _plan(arguments: argparse.Namespace, device: "torch.device") -> "list[Task]":
    """List every operation, variant, backend and peer that was asked for."""
    from ..kernels.dispatch import BACKENDS
    from .bench_run import tasks_of
    from .operations import DECAYS, OPERATIONS
    from .peers import PEERS

    operations = [OPERATIONS[name] for name in chosen("--op", arguments.op, list(OPERATIONS))]
    decays = chosen("--decay", arguments.decay, DECAYS)
    given = arguments.backend
    backends = given if given == ["auto"] else chosen("--backend", given, BACKENDS)
    peers = chosen("--peer", arguments.peer, [peer.name for peer in PEERS])
    variants: list[tuple[Operation, str]] = [
        (operation, variant)
        for operation in operations
        for variant in operation.variants
        if variant not in DECAYS or variant in decays
    ]
    if not variants:
        raise ValueError(f"--decay {','.join(decays)}: none of {', '.join(arguments.op)} has such a decay")
    tasks = tasks_of(variants, backends, peers, device)
    if not tasks:
        raise ValueError("--backend none and --peer none leave nothing to measure")
    return tasks


def _shapes(arguments: argparse.Namespace) -> "list[Shape]":
    from .operations import Shape

    if arguments.word == "gpu":
        if min(min(shape) for shape in arguments.shapes) < 1:
            raise ValueError("--shapes must be positive")
        return [Shape(*shape) for shape in arguments.shapes]
    for name in ("heads", "dim", "batch", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if min(arguments.lengths) < 1:
        raise ValueError(f"--lengths must be positive, got {arguments.lengths}")
    batch, heads, dim = arguments.batch, arguments.heads, arguments.dim
    return [Shape(batch, length, heads, dim) for length in sorted(arguments.lengths)]


def _run(bench: "Bench", tasks: "list[Task]", done: list[str], folder: Path, header: dict[str, str]) -> bool:
    """Fill the rows under a progress bar; returns False if Ctrl-C ended it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import bench_report, bench_store
    from .bench_run import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A refreshing thread would add to the process CPU time that is measured.
    with Progress(*columns, console=bench_report.console(), auto_refresh=False, transient=True) as progress:
        bar = progress.add_task("bench", total=len(tasks), completed=len(done))
        try:
            for title in run(bench, [task for task in tasks if task.title not in done]):
                done.append(title)
                bench_store.save(folder, header, bench.rows, done)
                progress.update(bar, advance=1, description=title, refresh=True)
        except KeyboardInterrupt:
            return False
    bench_store.clear(folder)
    return True


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name} cannot be used here: choose auto, cpu or, with a GPU, cuda")
    return torch.device(name)
