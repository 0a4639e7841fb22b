"""The measurements of `mainstem bench`: one row for every operation, variant, backend and length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.dispatch import why_not
from .measure import seconds_per_call
from .operations import OPERATIONS, Call, Inputs, Operation, Shape, cast, sdpa_causal

ERROR_LENGTH = 256
"""Tokens of the call that is compared with the float64 reference, which runs one token at a time."""
REFERENCE_LENGTH = 2048
"""Longest sequence on which the reference itself is timed: it keeps every state of the sequence."""
REFUSALS = (RuntimeError, ValueError, NotImplementedError)
"""What a backend raises that cannot do a call, out of memory included; the row gives the reason."""
LONGEST_CALL = 20.0
"""Seconds beyond which a call is not made, judged from the one before it at quadratic growth."""


@dataclass
class Row:
    """One measurement, or the reason why there is none."""

    operation: str
    variant: str
    backend: str
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


@dataclass
class Bench:
    """Everything that stays the same between the rows of one run."""

    shape: Shape
    lengths: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    threads: int
    seconds: float
    rows: list[Row] = field(default_factory=list)

    def row(self, operation: str, variant: str, backend: str, length: int) -> Row:
        """Start a row of the table."""
        batch, _, heads, dim = self.shape
        return Row(
            operation, variant, backend, batch, length, heads, dim, str(self.dtype).removeprefix("torch.")
        )

    def not_run(self, operation: str, variant: str, backend: str, reason: str, length: int = 0) -> None:
        """Add a row that says why there is no measurement; length 0 means all of them."""
        row = self.row(operation, variant, backend, length)
        row.note = f"not run: {reason}"
        self.rows.append(row)


def run_plan(bench: Bench, plan: Sequence[tuple[Operation, str, str]], peer: bool) -> Iterator[str]:
    """Fill the rows; yields a title after each group of rows."""
    if peer:
        _time_peer(bench)
        yield "torch SDPA causal"
    peers = {row.length: row for row in bench.rows}
    for operation, variant, backend in plan:
        reason = why_not(operation.folder, backend, bench.device) or _unsupported(variant, bench.dtype)
        if reason is None:
            first = len(bench.rows)
            _time_operation(bench, operation, variant, backend)
            for row in bench.rows[first:]:
                _compare(row, peers.get(row.length))
        else:
            bench.not_run(operation.name, variant, backend, reason)
        yield f"{operation.name} {variant} {backend}"


def _unsupported(variant: str, dtype: torch.dtype) -> str | None:
    if variant == "complex" and dtype in (torch.bfloat16, torch.float16):
        return f"there are no complex numbers in {str(dtype).removeprefix('torch.')}"
    return None


def _compare(row: Row, peer: Row | None) -> None:
    if peer is not None and row.forward_ms and peer.forward_ms:
        row.forward_ratio = peer.forward_ms / row.forward_ms
        if row.both_ms and peer.both_ms:
            row.both_ratio = peer.both_ms / row.both_ms


def _time_peer(bench: Bench) -> None:
    attention = OPERATIONS["attention"]
    _time_lengths(bench, attention, "causal", "torch SDPA", sdpa_causal)


def _time_operation(bench: Bench, operation: Operation, variant: str, backend: str) -> None:
    call = operation.bind(variant, backend)
    first = len(bench.rows)
    try:
        errors = _errors(bench, operation, variant, call)
    except REFUSALS as problem:
        bench.not_run(operation.name, variant, backend, _first_line(problem))
        return
    _time_lengths(bench, operation, variant, backend, call)
    for row in bench.rows[first:]:
        row.error, row.gradient_error = errors


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _inputs(bench: Bench, operation: Operation, variant: str, length: int) -> Inputs:
    torch.manual_seed(0)
    return cast(operation.inputs(variant, bench.shape._replace(length=length)), bench.dtype, bench.device)


def _forward_backward(call: Call, inputs: Inputs, given: Tensor) -> list[Tensor]:
    """Run forward and backward; returns the output and the gradients of every input."""
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    output = call(inputs)
    return [output.detach(), *torch.autograd.grad(output, leaves, given)]


def _errors(bench: Bench, operation: Operation, variant: str, call: Call) -> tuple[float, float | None]:
    """Greatest error of the output and of any gradient, relative to the greatest value of the reference."""
    inputs = _inputs(bench, operation, variant, min(ERROR_LENGTH, max(bench.lengths)))
    exact = {
        name: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        for name, tensor in inputs.items()
    }
    reference = operation.bind(variant, "reference")
    if not operation.differentiable:
        return _relative_error(call(inputs), reference(exact)), None
    with torch.no_grad():
        given = torch.randn_like(call(inputs))
    found = _forward_backward(call, inputs, given)
    wanted = _forward_backward(reference, exact, given.to(next(iter(exact.values())).dtype))
    errors = [_relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    return errors[0], max(errors[1:])


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    scale = wanted.abs().max().clamp_min(1e-30)
    return float(((found.to(wanted.dtype) - wanted).abs().max() / scale).item())


def _time_lengths(bench: Bench, operation: Operation, variant: str, backend: str, call: Call) -> None:
    """Add a row for every length, from the shortest on, until a call would take too long."""
    before: tuple[int, float] | None = None
    for length in bench.lengths:
        expected = before[1] * (length / before[0]) ** 2 if before else 0.0
        if backend == "reference" and length > REFERENCE_LENGTH:
            bench.not_run(operation.name, variant, backend, f"timed only up to T={REFERENCE_LENGTH}", length)
            continue
        if expected > LONGEST_CALL:
            bench.not_run(operation.name, variant, backend, f"one call might take {expected:.0f} s", length)
            continue
        try:
            forward, both = _time(bench, operation, variant, length, call, warm=expected < bench.seconds)
        except REFUSALS as problem:
            bench.not_run(operation.name, variant, backend, _first_line(problem), length)
            continue
        row = bench.row(operation.name, variant, backend, length)
        row.unit = operation.unit
        row.record(forward, both, operation.work(variant, bench.shape._replace(length=length)))
        bench.rows.append(row)
        before = length, both or forward


def _time(
    bench: Bench, operation: Operation, variant: str, length: int, call: Call, *, warm: bool
) -> tuple[float, float | None]:
    inputs = _inputs(bench, operation, variant, length)

    def seconds(timed: Callable[[], object]) -> float:
        again = warm or bench.device.type == "cuda"
        return seconds_per_call(timed, bench.device, threads=bench.threads, limit=bench.seconds, warm=again)

    with torch.no_grad():
        forward = seconds(lambda: call(inputs))
        if not operation.differentiable:
            return forward, None
        given = torch.randn_like(call(inputs))
    return forward, seconds(lambda: _forward_backward(call, inputs, given))
