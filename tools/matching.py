"""Give every mixer of a comparison the same number of parameters, by the width of the channel mixer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

TOLERANCE = 0.03
"""How far from the reference a matched model may be."""

Count = Callable[[int, int], int]
"""Parameters of the whole model at a ``dim`` and a SwiGLU width."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of one mixer's model and how near it came."""

    dim: int
    hidden: int | None
    parameters: int
    target: int

    @property
    def deviation(self) -> float:
        """Relative difference from the reference."""
        return self.parameters / self.target - 1

    @property
    def matched(self) -> bool:
        """Whether it lies within `TOLERANCE`."""
        return abs(self.deviation) <= TOLERANCE


def match(count: Count, target: int, *, dim: int, heads: int) -> Size:
    """Find the size with ``target`` parameters by the SwiGLU width or, if that fails, by another ``dim``.

    Where neither can, the nearest found is returned and its ``matched`` is False.

    Args:
        count: parameters of the whole model; raises ``ValueError`` for a size that the mixer cannot have.
        target: parameters of the reference.
        dim: width of the reference.
        heads: ``dim`` stays a multiple of it.
    """
    sizes = []
    for width in _widths(dim, heads):
        try:
            size = _match_hidden(count, target, width)
        except ValueError:
            if width == dim:
                raise
            continue
        if size.matched:
            return size
        sizes.append(size)
    return min(sizes, key=lambda size: abs(size.deviation))


def _widths(dim: int, heads: int) -> Iterator[int]:
    """Yield ``dim``, then its neighbours, from the nearest to half and twice of it; head sizes stay even."""
    yield dim
    step = 2 * heads
    for distance in range(1, dim // step + 1):
        for width in (dim - distance * step, dim + distance * step):
            if width >= max(step, dim // 2):
                yield width


def _match_hidden(count: Count, target: int, dim: int) -> Size:
    """Solve for the width, in which the count is linear; without a channel mixer it has no effect."""
    small, large = count(dim, 8), count(dim, 16)
    per_unit = (large - small) / 8
    if per_unit == 0:
        return Size(dim=dim, hidden=None, parameters=small, target=target)
    hidden = max(1, round(8 + (target - small) / per_unit))
    return Size(dim=dim, hidden=hidden, parameters=count(dim, hidden), target=target)
