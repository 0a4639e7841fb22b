"""What `test_every_operation` has to know of an operation, and on what it runs it.

To have an operation tested, write ``cases/<folder>.py`` with a list ``CASES`` of `Case`, one for each form of
the operation that takes another path through its kernels (a decay a head, a decay a channel, …):

    from operation_case import Case, Inputs

    def make(B: int, T: int, sequences: int | None) -> Inputs:
        states = B if sequences is None else sequences
        shapes = {"a": (B, T, 5), "b": (B, T, 5), "initial_state": (states, 5)}
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}

    CASES = [
        Case(
            name="elementwise_scan",
            operation="elementwise_scan",
            folder="scan",
            make=make,
            timed=("a", "b"),
            step="elementwise_scan_step",
            hostile={"zeros": lambda: {name: 0 * x for name, x in make(1, 70, None).items()}},
        )
    ]

That is all: the file is found by itself, every backend that has a file in the operation's folder is run, and
which of ``cu_seqlens``, ``initial_state`` and ``reverse`` there are is read off the operation's signature.
Keep the sizes of ``make`` small, odd and different from each other, and its values such that the recurrence
is stable. ``pytest tests/kernels -k <name>`` runs one case. What is particular to the operation (its own
errors, a module of another library that it equals) goes into ``test_<operation>.py``.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from mainstem import kernels
from mainstem.kernels import dispatch

Inputs = dict[str, Tensor]


def _whole(state: Tensor) -> tuple[Tensor, ...]:
    return (state,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One form of one operation.

    Attributes:
        name: unique, beginning with the operation: ``"delta_rule-channel"``.
        operation: public function of `mainstem.kernels`.
        folder: of the operation in ``kernels/``.
        make: ``make(B, T, sequences)`` draws float64 or complex128 tensors by argument name. Its
            ``initial_state`` has a state for each of the ``sequences``, or each row where that is ``None``.
        timed: names of the arguments whose dimension 1 is time.
        keywords: further arguments, the same in every call.
        step: name of the function that advances the operation by one token.
        sizes: inputs by label, short ones: head sizes.
        hostile: inputs by label: decays of 0, −20 and −inf, identical keys, zeros, 1e4. Gradients of those
            whose label begins with "strong" are compared on their own scale, however small they are.
        long: ``long(T)`` draws a single sequence whose gradients are compared at T = 100,000.
        differentiable: whether the operation has gradients.
        readings: what of a final state is compared, for a state that can be written in several ways.
    """

    name: str
    operation: str
    folder: str
    make: Callable[[int, int, int | None], Inputs]
    timed: tuple[str, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    step: str | None = None
    sizes: Mapping[str, Callable[[], Inputs]] = field(default_factory=dict)
    hostile: Mapping[str, Callable[[], Inputs]] = field(default_factory=dict)
    long: Callable[[int], Inputs] | None = None
    differentiable: bool = True
    readings: Callable[[Tensor], tuple[Tensor, ...]] = _whole

    @property
    def function(self) -> Callable[..., Any]:
        """The operation itself."""
        found: Callable[..., Any] = getattr(kernels, self.operation)
        return found

    def takes(self, argument: str) -> bool:
        """Whether the operation has an argument of that name."""
        return argument in inspect.signature(self.function).parameters

    @property
    def stateful(self) -> bool:
        """Whether a state goes in and comes out."""
        return self.takes("initial_state")

    def __call__(self, inputs: Mapping[str, Tensor | None], **how: Any) -> tuple[Tensor, ...]:
        """Return the output, and the final state's readings where there is one."""
        if not self.stateful:
            return (self.function(**inputs, **self.keywords, **how),)
        o, state = self.function(**inputs, **self.keywords, **how, return_final_state=True)
        return (o, *self.readings(state))


@dataclass(frozen=True)
class Layout:
    """Batch, length and bounds of a call, and whether a state comes in."""

    batch: int
    length: int
    bounds: tuple[int, ...] | None = None
    state: bool = True

    @property
    def sequences(self) -> int | None:
        """Number of packed sequences."""
        return None if self.bounds is None else len(self.bounds) - 1

    def cu_seqlens(self, device: str = "cpu") -> Tensor | None:
        """The bounds in int32; in int64, which is accepted too, where no state comes in."""
        dtype = torch.int32 if self.state else torch.int64
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=dtype, device=device)


# Sequences of no, one and a few tokens, of a chunk of 64 and of one more.
LAYOUTS = {
    "batch": Layout(3, 64),
    "no_tokens": Layout(2, 0),
    "one_token": Layout(1, 1),
    "packed": Layout(1, 79, (0, 0, 1, 1, 66, 79, 79)),
    "packed_without_state": Layout(1, 20, (0, 17, 17, 20), state=False),
    "packed_nothing": Layout(1, 0, (0, 0, 0)),
}
# The interpreter takes its time over every token.
SHORT_LAYOUTS = LAYOUTS | {"batch": Layout(1, 5), "packed": Layout(1, 69, (0, 0, 1, 66, 69))}


@dataclass(frozen=True)
class Target:
    """A backend and the device it runs on."""

    backend: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """Whether this is Triton on a CPU."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layouts that are run on it."""
        return SHORT_LAYOUTS if self.interpreted else LAYOUTS

    def dtypes(self, wide: torch.dtype) -> tuple[torch.dtype, ...]:
        """The types that are run on it, the most precise first; complex ones where ``wide`` is complex."""
        single, double = (torch.float32, torch.float64)
        if wide.is_complex:
            single, double = (torch.complex64, torch.complex128)
        if self.interpreted:  # products of bfloat16 are garbage there
            return (single,)
        halves = () if wide.is_complex else (torch.bfloat16, torch.float16)
        return (single, *halves) if self.device == "cuda" else (double, single, *halves)

    @property
    def marks(self) -> tuple[pytest.MarkDecorator, ...]:
        """What keeps pytest from running it on this machine."""
        marks: list[pytest.MarkDecorator] = [pytest.mark.gpu] if self.device == "cuda" else []
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            marks.append(pytest.mark.skip(reason="triton is not installed"))
        elif self.interpreted and torch.cuda.is_available():
            marks.append(pytest.mark.skip(reason="a CUDA device is there: -m gpu runs Triton on it"))
        return tuple(marks)


@cache
def every_case() -> tuple[Case, ...]:
    """The cases of all files in ``cases/``.

    Raises:
        ValueError: two cases have one name.
    """
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(cases.__path__, "cases."):
        for case in importlib.import_module(module.name).CASES:
            if case.name in found:
                raise ValueError(f"{module.name}: there is another case of the name {case.name!r}")
            found[case.name] = case
    return tuple(found.values())


def targets(case: Case) -> Iterator[Target]:
    """Every backend but the reference that the operation's folder has a file for, on every device."""
    for backend in ("chunked", "cpu", "triton"):
        if dispatch.offers(case.folder, backend):
            yield Target(backend)
            if backend != "cpu":
                yield Target(backend, "cuda")


def backends(folder: str) -> list[Any]:
    """Parameters of a test that runs every backend of a folder on the CPU, the reference among them."""
    offered = [Target(backend) for backend in dispatch.BACKENDS if dispatch.offers(folder, backend)]
    return [pytest.param(target.backend, id=str(target), marks=target.marks) for target in offered]


def first_cases() -> tuple[Case, ...]:
    """One case of every operation, for what does not depend on the form."""
    return tuple({case.operation: case for case in reversed(every_case())}.values())[::-1]


Labelled = Iterator[tuple[str, tuple[Any, ...]]]


def every_form(case: Case, target: Target) -> Labelled:
    """One test for each case and target."""
    yield "", ()


def one_form(case: Case, target: Target) -> Labelled:
    """The same, but one case of an operation is enough for the interpreter, which takes its time."""
    if not target.interpreted or case in first_cases():
        yield "", ()


# Head sizes and hostile numbers that the interpreter runs in the fast suite; `make test-all` runs the rest.
TELLING = ("60", "mixed", "-inf", "strong", "beta 2", "1e4", "zeros", "far", "nothing", "empty", "N3")


def _marks(target: Target, label: str, labelled: Collection[str]) -> tuple[pytest.MarkDecorator, ...]:
    rest = target.interpreted and label in labelled and not any(word in label for word in TELLING)
    return (*target.marks, pytest.mark.slow) if rest else target.marks


def runs(
    more: Callable[[Case, Target], Labelled] = every_form, only: Callable[[Case], bool] = lambda case: True
) -> list[Any]:
    """Parameters ``(case, target, *rest)`` of a test, for every target of every case.

    Args:
        more: ``more(case, target)`` gives the label and the rest, once for each test.
        only: which cases.
    """
    return [
        pytest.param(
            case,
            target,
            *rest,
            id="-".join(filter(None, (case.name, str(target), label.replace(" ", "_")))),
            marks=_marks(target, label, (*case.sizes, *case.hostile)),
        )
        for case in every_case()
        if only(case)
        for target in targets(case)
        for label, rest in more(case, target)
    ]
