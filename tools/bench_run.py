"""The measurements of `mainstem bench`: one row for every operation, variant, implementation and shape."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..kernels.dispatch import offers, why_not
from .measure import seconds_per_call
from .operations import Call, Inputs, Operation, Shape, cast
from .peers import PEERS, Peer

ERROR_LENGTH = 256
"""Tokens of the call that is compared with the float64 reference, which runs one token at a time."""
ERROR_HEADS = 4
"""Heads of that call."""
REFERENCE_LENGTH = 2048
"""Longest sequence on which the reference itself is timed: it keeps every state of the sequence."""
LONGEST_CALL = 5.0
"""Seconds beyond which a call is not made, judged from the one before it at quadratic growth in T."""
WRONG = 0.1
"""Error of an output, relative to the greatest value, from which on its time is not worth taking."""
WRONG_GRADIENT = 0.5
"""The same for gradients, where half precision adds up over the tokens."""
ALL = Shape(0, 0, 0, 0)
"""Stands for all shapes in the row of what was not run."""
Errors = tuple[float | None, float | None]
"""Of the output, and the worst of the gradients."""


@dataclass
class Row:
    """One measurement, or the reason why there is none."""

    operation: str
    variant: str
    backend: str
    """One of ours, or a peer."""
    peer: bool
    batch: int
    length: int
    heads: int
    dim: int
    dtype: str
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_ktok_s: float | None = None
    both_ktok_s: float | None = None
    rate: float | None = None
    unit: str = ""
    error: float | None = None
    gradient_error: float | None = None
    forward_ratio: float | None = None
    """A peer's time over that of our fastest backend, or the fastest peer's over ours: see `add_ratios`."""
    both_ratio: float | None = None
    exponent: float | None = None
    note: str = ""

    def record(self, forward: float, both: float | None, work: float) -> None:
        """Fill in the times (seconds) and what follows from them."""
        tokens = self.batch * self.length
        self.forward_ms, self.forward_ktok_s = forward * 1e3, tokens / forward / 1e3
        self.rate = work / forward / 1e9
        if both is not None:
            self.both_ms, self.both_ktok_s = both * 1e3, tokens / both / 1e3


@dataclass(frozen=True)
class Task:
    """Something to measure: one of our backends, or a peer, on one variant of an operation."""

    operation: Operation
    variant: str
    backend: str
    peer: Peer | None = None

    @property
    def title(self) -> str:
        """What the progress bar says, and what tells tasks apart."""
        return f"{self.operation.name} {self.variant} {self.backend}"

    def bind(self) -> Call:
        """Return the function of the inputs that is timed."""
        call = None if self.peer is None else self.peer.find(self.operation.name, self.variant)
        return self.operation.bind(self.variant, self.backend) if call is None else call

    @property
    def checked(self) -> bool:
        """Whether its output has to be the reference's."""
        return self.peer is None or self.peer.same


def _resolve(operation: Operation, backend: str, device: torch.device) -> str:
    """Name the backend that ``auto`` is on ``device``."""
    if backend != "auto":
        return backend
    fast = "triton" if device.type == "cuda" else "cpu"
    return fast if offers(operation.folder, fast) else "chunked"


def tasks_of(
    operations: Sequence[tuple[Operation, str]],
    backends: Sequence[str],
    peers: Sequence[str],
    device: torch.device,
) -> list[Task]:
    """List what is measured: for each operation and variant our backends, then its peers."""
    tasks = []
    for operation, variant in operations:
        ours = dict.fromkeys(_resolve(operation, backend, device) for backend in backends)
        tasks += [Task(operation, variant, backend) for backend in ours]
        tasks += [
            Task(operation, variant, peer.name, peer)
            for peer in PEERS
            if peer.name in peers and peer.find(operation.name, variant) is not None
        ]
    return tasks


def usual_variant(operation: Operation) -> str:
    """The variant that stands for the operation where one is enough."""
    return "token" if "token" in operation.variants else operation.variants[0]


Clock = Callable[..., float]


@dataclass
class Bench:
    """Everything that stays the same between the rows of one run."""

    shapes: Sequence[Shape]
    dtype: torch.dtype
    device: torch.device
    threads: int
    seconds: float
    clock: Clock = seconds_per_call
    rows: list[Row] = field(default_factory=list)
    shared: dict[tuple[str, Shape], tuple[float, float | None]] = field(default_factory=dict)
    """Times of peers whose calls are the same for several operations."""

    def row(self, task: Task, shape: Shape) -> Row:
        """Start a row of the table."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(
            task.operation.name, task.variant, task.backend, task.peer is not None, *shape, dtype=dtype
        )

    def not_run(self, task: Task, reason: str, shape: Shape = ALL) -> None:
        """Add a row that says why there is no measurement; the shape of zeros means all of them."""
        row = self.row(task, shape)
        row.note = f"not run: {reason}"
        self.rows.append(row)


def run(bench: Bench, tasks: Sequence[Task]) -> Iterator[str]:
    """Fill the rows; yields the title of each task that is done."""
    for task in tasks:
        reason = _why_not(bench, task)
        if reason is None:
            _measure(bench, task)
        else:
            bench.not_run(task, reason)
        yield task.title


def _why_not(bench: Bench, task: Task) -> str | None:
    if task.variant == "complex" and bench.dtype in (torch.bfloat16, torch.float16):
        return f"there are no complex numbers in {str(bench.dtype).removeprefix('torch.')}"
    if task.peer is not None:
        return task.peer.missing(bench.device)
    return why_not(task.operation.folder, task.backend, bench.device)


def _measure(bench: Bench, task: Task) -> None:
    """Check the results at every head size, then time the shapes whose results are right."""
    call, first = task.bind(), len(bench.rows)
    errors: dict[int, Errors] = {}
    dims = dict.fromkeys(shape.dim for shape in bench.shapes)
    for dim in dims:
        shapes = [shape for shape in bench.shapes if shape.dim == dim]
        errors[dim], reason = _check(bench, task, call, shapes) if task.checked else ((None, None), None)
        if reason is not None:
            del errors[dim]
            for shape in shapes if len(dims) > 1 else [ALL]:
                bench.not_run(task, reason, shape)
    _time_shapes(bench, task, call, [shape for shape in bench.shapes if shape.dim in errors])
    for row in bench.rows[first:]:
        row.error, row.gradient_error = errors.get(row.dim, (None, None))


def _check(bench: Bench, task: Task, call: Call, shapes: Sequence[Shape]) -> tuple[Errors, str | None]:
    """Return the errors, and why its time is not worth taking where they are too large."""
    try:
        errors = _errors(bench, task, call, max(shapes, key=lambda shape: shape.length))
    except Exception as problem:  # of whoever wrote it: the others are still to be measured
        return (None, None), _first_line(problem)
    for name, error, limit in zip(("output", "gradient"), errors, (WRONG, WRONG_GRADIENT)):
        if error is not None and not error < limit:
            return errors, f"its {name} is off by {error:.0e}"
    return errors, None


def _first_line(problem: Exception) -> str:
    first = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    expected = isinstance(problem, (RuntimeError, ValueError)) and first
    return first if expected else f"{type(problem).__name__}: {first}"


def _inputs(bench: Bench, task: Task, shape: Shape) -> Inputs:
    torch.manual_seed(0)
    with bench.device:  # where random numbers are drawn
        return cast(task.operation.inputs(task.variant, shape), bench.dtype, bench.device)


def forward_backward(call: Call, inputs: Inputs, given: Tensor) -> list[Tensor | None]:
    """Run forward and backward; returns the output and the gradients of every input that has one."""
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    output = call(inputs)
    # Some peers take a decay a head as a constant.
    return [output.detach(), *torch.autograd.grad(output, leaves, given, allow_unused=True)]


def _errors(bench: Bench, task: Task, call: Call, shape: Shape) -> Errors:
    """Greatest error of the output and of any gradient, relative to the greatest value of the reference."""
    small = Shape(1, min(ERROR_LENGTH, shape.length), min(ERROR_HEADS, shape.heads), shape.dim)
    inputs = _inputs(bench, task, small)
    exact = {
        name: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        for name, tensor in inputs.items()
    }
    reference = task.operation.bind(task.variant, "reference")
    if not task.operation.differentiable:
        return _relative_error(call(inputs), reference(exact)), None
    with torch.no_grad():
        given = torch.randn_like(call(inputs))
    found = forward_backward(call, inputs, given)
    wanted = forward_backward(reference, exact, given.to(next(iter(exact.values())).dtype))
    errors = [
        _relative_error(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None
    ]
    return errors[0], max(errors[1:])


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    scale = wanted.abs().max().clamp_min(1e-30)
    return float(((found.to(wanted.dtype) - wanted).abs().max() / scale).item())


def _cost(shape: Shape) -> float:
    return float(shape.length) ** 2 * shape.batch * shape.channels


def _time_shapes(bench: Bench, task: Task, call: Call, shapes: Sequence[Shape]) -> None:
    """Add a row for every shape, until a call would take too long."""
    before: tuple[float, float] | None = None
    for shape in shapes:
        expected = before[1] * _cost(shape) / before[0] if before else 0.0
        if task.backend == "reference" and shape.length > REFERENCE_LENGTH:
            bench.not_run(task, f"timed only up to T={REFERENCE_LENGTH}", shape)
            continue
        if expected > LONGEST_CALL:
            bench.not_run(task, f"one call might take {expected:.0f} s", shape)
            continue
        try:
            forward, both = _time(bench, task, shape, call)
        except Exception as problem:  # out of memory, most often
            bench.not_run(task, _first_line(problem), shape)
            continue
        row = bench.row(task, shape)
        row.unit = task.operation.unit
        row.record(forward, both, task.operation.work(task.variant, shape))
        bench.rows.append(row)
        before = _cost(shape), both or forward


def _time(bench: Bench, task: Task, shape: Shape, call: Call) -> tuple[float, float | None]:
    key = (task.backend, shape)
    if task.peer is not None and task.peer.shared and key in bench.shared:
        return bench.shared[key]
    inputs = _inputs(bench, task, shape)

    def seconds(timed: Callable[[], object]) -> float:
        return bench.clock(timed, bench.device, threads=bench.threads, limit=bench.seconds)

    with torch.no_grad():
        forward = seconds(lambda: call(inputs))
        given = torch.randn_like(call(inputs)) if task.operation.differentiable else None
    both = None
    if given is not None:
        both = seconds(lambda: forward_backward(call, inputs, given))
    bench.shared[key] = forward, both
    return forward, both


def add_ratios(rows: Sequence[Row]) -> None:
    """Say how many times faster ours is: than each peer, our fastest backend; than the fastest peer, each of
    ours.
    """

    def place(row: Row) -> tuple[str, str, int, int, int, int]:
        return row.operation, row.variant, row.batch, row.length, row.heads, row.dim

    for _, group in groupby(sorted(rows, key=place), place):
        measured = [row for row in group if not row.note]
        ours = [row for row in measured if not row.peer and row.backend != "reference"]
        peers = [row for row in measured if row.peer]
        for row in measured:
            others = ours if row.peer else peers
            forward = min((other.forward_ms for other in others if other.forward_ms), default=None)
            both = min((other.both_ms for other in others if other.both_ms), default=None)
            row.forward_ratio = _faster(row, row.forward_ms, forward)
            row.both_ratio = _faster(row, row.both_ms, both)


def _faster(row: Row, time: float | None, other: float | None) -> float | None:
    if not time or not other:
        return None
    return time / other if row.peer else other / time
