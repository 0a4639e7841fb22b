"""`mainstem bench memory`: peak memory of a long forward pass, in pieces with the state carried on."""

import argparse
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from .. import Backbone, kernels
from ..core.mixers import MIXERS
from .bench import chosen, integers, names
from .bench_report import console
from .bench_run import usual_variant
from .bench_table import publish
from .measure import machine, peak_memory, set_threads
from .operations import OPERATIONS, Shape, cast

HEADS, DIM = 4, 64
OPERATION_NAMES = ["linear_recurrence", "delta_rule", "elementwise_scan", "selective_scan", "gated_rnn"]
MIXER_NAMES = ["gla", "mamba2"]
LEGEND = (
    "Peak: the most resident memory of a process of its own that does nothing else, Python and PyTorch with "
    f"it. One sequence, one thread, float32, forward only; operations with H = {HEADS} and D = {DIM}, "
    f"backbones of two blocks of width {DIM}."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("mainstem bench memory", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--op", type=names, default=OPERATION_NAMES, help=f"operations (default: {','.join(OPERATION_NAMES)})"
    )
    add("--mixer", type=names, default=MIXER_NAMES, help="mixers of a backbone (default: gla,mamba2)")
    add("--lengths", type=integers, default=[100_000, 1_000_000], help="tokens (default: 100000,1000000)")
    add("--piece", type=int, default=4096, help="tokens a call (default: %(default)s)")
    add("--output", type=Path, default=Path("bench"), help="folder of memory.csv and .md (default: bench)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure each in a process of its own, print and write the table.

    Raises:
        ValueError: an unknown name, or a number below one.
    """
    arguments = parse(argv)
    known = [
        name for name in OPERATIONS if "initial_state" in inspect.signature(getattr(kernels, name)).parameters
    ]
    plan = [("operation", name) for name in chosen("--op", arguments.op, known)]
    plan += [("backbone", name) for name in chosen("--mixer", arguments.mixer, list(MIXERS))]
    if min(*arguments.lengths, arguments.piece) < 1:
        raise ValueError(
            f"--lengths and --piece must be at least 1, got {arguments.lengths}, {arguments.piece}"
        )
    header = machine(torch.device("cpu")) | {"threads": "1"}
    header["command"] = " ".join(["mainstem bench memory", *argv])
    body = []
    for kind, name in track(plan, "memory", console=console(), transient=True):
        peaks = [in_a_process(kind, name, length, arguments.piece) for length in arguments.lengths]
        cells = [f"{peak / 2**20:.0f} MiB" for peak in peaks]
        body.append([kind, f"`{name}`", *cells, f"{(peaks[-1] - peaks[0]) / 2**20:+.1f} MiB"])
    columns = ["", "", *(f"peak, {length:,} tokens" for length in arguments.lengths), "last − first"]
    legend = f"{LEGEND} Pieces of {arguments.piece} tokens."
    publish("memory", columns, body, header, arguments.output, names=2, legend=legend)
    return 0


def in_a_process(kind: str, name: str, length: int, piece: int) -> int:
    """Peak resident bytes of a fresh process that streams ``length`` tokens.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    command = [sys.executable, "-m", __spec__.name, kind, name, str(length), str(piece)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


@torch.no_grad()
def stream(kind: str, name: str, length: int, piece: int) -> None:
    """Run ``length`` tokens through an operation or a backbone, in pieces."""
    advance = _operation(name, piece) if kind == "operation" else _backbone(name, piece)
    state = None
    for begin in range(0, length, piece):
        state = advance(min(piece, length - begin), state)


def _operation(name: str, piece: int) -> Callable[[int, Any], Any]:
    operation = OPERATIONS[name]
    variant = usual_variant(operation)
    function, keywords = getattr(kernels, name), operation.keywords(variant)

    def inputs(tokens: int) -> dict[str, torch.Tensor]:
        drawn = operation.inputs(variant, Shape(1, tokens, HEADS, DIM))
        return cast(drawn, torch.float32, torch.device("cpu"))

    whole = inputs(piece)

    def advance(tokens: int, state: Any) -> Any:
        given = whole if tokens == piece else inputs(tokens)
        before = {} if state is None else {"initial_state": state}
        return function(**{**given, **keywords, **before}, return_final_state=True)[1]

    return advance


def _backbone(name: str, piece: int) -> Callable[[int, Any], Any]:
    net = Backbone(dim=DIM, depth=2, heads=HEADS, mixer=name)  # type: ignore[arg-type]
    whole = torch.randn(1, piece, DIM)
    return lambda tokens, state: net(whole[:, :tokens], state=state, return_state=True)[1]


def _here(kind: str, name: str, length: str, piece: str) -> None:
    set_threads(1)
    stream(kind, name, int(length), int(piece))
    print(json.dumps({"peak": peak_memory(torch.device("cpu"))}))


if __name__ == "__main__":
    _here(*sys.argv[1:])
