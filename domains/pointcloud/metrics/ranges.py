"""Parts of the scene by distance from the sensor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Range:
    """Boxes whose centre is from ``low`` to less than ``high`` metres away, seen from above."""

    low: float = 0.0
    high: float = inf

    @property
    def name(self) -> str:
        """Such as ``0-30m`` or ``50-infm``."""
        return f"{self.low:g}-{self.high:g}m"

    def outside(self, boxes: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of ``boxes`` (M, 7) are not in the range: ``(M,)``."""
        distance = np.hypot(boxes[:, 0], boxes[:, 1])
        return np.asarray((distance < self.low) | (distance >= self.high))


def ranges_between(edges: Sequence[float]) -> list[Range]:
    """Ranges between neighbouring ``edges`` in metres, none for no edges.

    Raises:
        ValueError: edges that do not ascend from 0 or more, or only one.
    """
    values = [float(edge) for edge in edges]
    if len(values) == 1 or any(low >= high or low < 0 for low, high in pairwise(values)):
        raise ValueError(f"ranges: {values} m must be two or more distances in ascending order, 0 or more")
    return [Range(low, high) for low, high in pairwise(values)]


def by_range(scores: Mapping[str, Any], name: str) -> dict[Range, float]:
    """Values of the score ``name`` in each range, nearest first, from what a metric with ranges computed."""
    found = {}
    for key, value in scores.items():
        match = re.fullmatch(r"([\d.e+]+)-([\d.e+]+|inf)m/" + re.escape(name), key)
        if match:
            found[Range(float(match[1]), float(match[2]))] = float(value)
    return dict(sorted(found.items(), key=lambda item: item[0].low))
