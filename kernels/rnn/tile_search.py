"""Choosing sizes of tiles: integers from small sets, under constraints, the best first.

After the idea of ConstrINT in Pöppel, Beck and Hochreiter, *FlashRNN* (2024), arXiv:2412.07752: what a kernel
needs (divisibility, registers, shared memory) is written down as constraints, and a search finds the sizes.
Here every term is a product of powers of positive variables, so that the bounds of the variables bound it,
and a bound that cannot be met strikes values out before anything is tried.

>>> tile, count = Variable("tile", (16, 32, 64)), Variable("count", range(1, 9))
>>> problem = Problem(
...     (tile, count),
...     (Equal("whole", product(tile, count), 96), AtMost("registers", product(tile, coefficient=4), 200)),
...     product(tile),
... )
>>> solve(problem).values
{'tile': 32, 'count': 3}
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

Domains = dict[str, tuple[int, ...]]


class NoTiles(ValueError):
    """No choice of sizes meets all constraints; the message names the one that left nothing."""


@dataclass(frozen=True, init=False)
class Variable:
    """A positive integer and the values that it may have, in rising order."""

    name: str
    values: tuple[int, ...]

    def __init__(self, name: str, values: Iterable[int]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", tuple(sorted(set(values))))
        if not self.values or self.values[0] < 1:
            raise ValueError(f"{name} needs at least one value, and all of them positive, got {self.values}")


@dataclass(frozen=True)
class Product:
    """``coefficient · Π variable^power``; a negative power divides."""

    coefficient: float
    powers: tuple[tuple[str, int], ...]

    def between(self, low: Mapping[str, int], high: Mapping[str, int]) -> tuple[float, float]:
        """Bounds of the term where every variable lies between ``low`` and ``high``."""
        first = prod(float((low if p > 0 else high)[name]) ** p for name, p in self.powers)
        last = prod(float((high if p > 0 else low)[name]) ** p for name, p in self.powers)
        a, b = self.coefficient * first, self.coefficient * last
        return min(a, b), max(a, b)


def product(
    *variables: Variable, coefficient: float = 1, over: tuple[Variable, ...] = ()
) -> tuple[Product, ...]:
    """``coefficient · Π variables / Π over`` as a sum of one term; sums are written with ``+``."""
    return (Product(coefficient, tuple([(v.name, 1) for v in variables] + [(v.name, -1) for v in over])),)


Sum = tuple[Product, ...]


def _between(terms: Sum, low: Mapping[str, int], high: Mapping[str, int]) -> tuple[float, float]:
    bounds = [term.between(low, high) for term in terms]
    return sum(a for a, _ in bounds), sum(b for _, b in bounds)


def _names(*sums: Sum) -> set[str]:
    return {name for terms in sums for term in terms for name, _ in term.powers}


@dataclass(frozen=True)
class AtMost:
    """``terms ≤ limit``."""

    name: str
    terms: Sum
    limit: float

    def possible(self, low: Mapping[str, int], high: Mapping[str, int]) -> bool:
        """Whether the constraint can hold for variables between ``low`` and ``high``."""
        return _between(self.terms, low, high)[0] <= self.limit

    def variables(self) -> set[str]:
        """Names of the variables that it binds."""
        return _names(self.terms)


@dataclass(frozen=True)
class Equal:
    """``terms = value``."""

    name: str
    terms: Sum
    value: float

    def possible(self, low: Mapping[str, int], high: Mapping[str, int]) -> bool:
        """Whether the constraint can hold for variables between ``low`` and ``high``."""
        a, b = _between(self.terms, low, high)
        return a <= self.value <= b

    def variables(self) -> set[str]:
        """Names of the variables that it binds."""
        return _names(self.terms)


@dataclass(frozen=True)
class Divides:
    """``terms`` is a whole multiple of ``by``."""

    name: str
    terms: Sum
    by: Sum

    def possible(self, low: Mapping[str, int], high: Mapping[str, int]) -> bool:
        """Whether the constraint can hold for variables between ``low`` and ``high``."""
        a, b = _between(self.terms, low, high)
        c, d = _between(self.by, low, high)
        if a == b and c == d:
            return a % c == 0
        # Some multiple k · [c, d] must reach into [a, b].
        return b >= c

    def variables(self) -> set[str]:
        """Names of the variables that it binds."""
        return _names(self.terms, self.by)


Constraint = AtMost | Equal | Divides


@dataclass(frozen=True)
class Problem:
    """Variables, constraints, and what is to be as large as possible.

    Of several best choices the one with the larger value of an earlier variable wins.
    """

    variables: tuple[Variable, ...]
    constraints: tuple[Constraint, ...]
    objective: Sum


@dataclass(frozen=True)
class Solution:
    """The values found, and how many partial choices were looked at."""

    values: dict[str, int]
    nodes: int


def solve(problem: Problem) -> Solution:
    """Find the best values, the same ones every time.

    Raises:
        NoTiles: nothing meets all constraints.
    """
    search = _Search(problem)
    search.visit({v.name: v.values for v in problem.variables})
    if search.best is None:
        raise NoTiles(f"no tile sizes fit: {search.blame or 'the constraints together'} leaves no choice")
    return Solution(search.best, search.nodes)


class _Search:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best: dict[str, int] | None = None
        self.height = float("-inf")
        self.nodes = 0
        self.blame = ""
        # Which of the constraints went the deepest into the search before it failed says most.
        self.depth = -1

    def visit(self, domains: Domains) -> None:
        self.nodes += 1
        narrowed = self._propagate(domains)
        if narrowed is None:
            return
        low, high = _ends(narrowed)
        if _between(self.problem.objective, low, high)[1] <= self.height:
            return
        open_ = [v.name for v in self.problem.variables if len(narrowed[v.name]) > 1]
        if not open_:
            self.best, self.height = low, _between(self.problem.objective, low, low)[0]
            return
        name = open_[0]
        for value in reversed(narrowed[name]):
            self.visit({**narrowed, name: (value,)})

    def _propagate(self, domains: Domains) -> Domains | None:
        """Strike out values that no constraint allows, until nothing changes; ``None`` if none is left."""
        domains = dict(domains)
        changed = set(domains)
        while changed:
            again: set[str] = set()
            for constraint in self.problem.constraints:
                names = constraint.variables()
                if names and not names & changed:
                    continue
                if not names and not constraint.possible({}, {}):
                    self._note(constraint, domains)
                    return None
                for name in sorted(names):
                    left = tuple(_supported(constraint, name, domains))
                    if not left:
                        self._note(constraint, domains)
                        return None
                    if len(left) < len(domains[name]):
                        domains[name] = left
                        again.add(name)
            changed = again
        return domains

    def _note(self, constraint: Constraint, domains: Domains) -> None:
        depth = sum(len(values) == 1 for values in domains.values())
        if depth > self.depth:
            self.depth, self.blame = depth, constraint.name


def _ends(domains: Domains) -> tuple[dict[str, int], dict[str, int]]:
    return {n: values[0] for n, values in domains.items()}, {n: values[-1] for n, values in domains.items()}


def _supported(constraint: Constraint, name: str, domains: Domains) -> Iterator[int]:
    """Values of ``name`` for which the constraint can still hold within the others' bounds."""
    low, high = _ends(domains)
    for value in domains[name]:
        low[name] = high[name] = value
        if constraint.possible(low, high):
            yield value
