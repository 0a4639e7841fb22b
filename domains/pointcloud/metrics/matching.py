"""Which found box stands for which labelled one, and the curves of precision that follow."""
# Numba ships no types.
# mypy: allow-untyped-decorators

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True)(function)
    except RuntimeError:  # no directory that Numba could write its cache to
        compiled = numba.njit(function)
    return compiled


@_compiled
def true_scores(
    overlap: Floats, scores: Floats, truth_ignored: Any, found_ignored: Any, minimum: float
) -> Floats:
    """Scores of the true positives when each labelled box in turn takes the best scored box over it.

    The first pass of KITTI's and ONCE's evaluation, whose scores become the thresholds of the second.

    Args:
        overlap: ``(G, D)`` of labelled and found boxes of one class of one frame.
        scores: ``(D,)``.
        truth_ignored: ``(G,)`` booleans: neither a true positive nor missed.
        found_ignored: ``(D,)`` booleans: neither a true nor a false positive.
        minimum: overlap that a match must exceed.
    """
    taken = np.zeros(len(scores), np.bool_)
    result = np.empty(len(truth_ignored), np.float64)
    count = 0
    for i in range(len(truth_ignored)):
        best = -1
        for j in range(len(scores)):
            if not taken[j] and overlap[i, j] > minimum and (best < 0 or scores[j] > scores[best]):
                best = j
        if best >= 0:
            taken[best] = True
            if not (truth_ignored[i] or found_ignored[best]):
                result[count] = scores[best]
                count += 1
    return result[:count]


@_compiled
def count_matches(
    overlap: Floats,
    scores: Floats,
    truth_ignored: Any,
    found_ignored: Any,
    elsewhere: Any,
    similarity: Floats,
    minimum: float,
    thresholds: Floats,
    totals: Floats,
) -> None:
    """Add to ``totals`` (T, 3) the true positives, false positives and similarity of one frame.

    At each threshold every labelled box in turn takes the free found box that overlaps it most; an ignored
    one only where there is no other. The second pass of KITTI's and ONCE's evaluation.

    Args:
        overlap: ``(G, D)``.
        scores: ``(D,)``.
        truth_ignored: ``(G,)`` booleans.
        found_ignored: ``(D,)`` booleans.
        elsewhere: ``(D,)`` booleans: no false positive when it matches nothing.
        similarity: ``(G, D)``: what a true positive adds to the third total.
        minimum: overlap that a match must exceed.
        thresholds: ``(T,)`` scores that a found box must reach.
        totals: ``(T, 3)``.
    """
    taken = np.zeros(len(scores), np.bool_)
    for t in range(len(thresholds)):
        taken[:] = False
        for i in range(len(truth_ignored)):
            best = -1
            for j in range(len(scores)):
                if taken[j] or scores[j] < thresholds[t] or not overlap[i, j] > minimum:
                    continue
                replaces = best >= 0 and not found_ignored[j]
                if best < 0 or (replaces and (found_ignored[best] or overlap[i, j] > overlap[i, best])):
                    best = j
            if best >= 0:
                taken[best] = True
                if not (truth_ignored[i] or found_ignored[best]):
                    totals[t, 0] += 1
                    totals[t, 2] += similarity[i, best]
        for j in range(len(scores)):
            if not (taken[j] or found_ignored[j] or elsewhere[j]) and scores[j] >= thresholds[t]:
                totals[t, 1] += 1


@_compiled
def match_nearest(distance: Floats, limit: float) -> Any:
    """Each found box, best first, takes the nearest free labelled box closer than ``limit``.

    Args:
        distance: ``(D, G)`` of one class of one frame; rows by descending score.
        limit: in metres.

    Returns:
        ``(D,)`` place of the labelled box, −1 for none: nuScenes' matching.
    """
    result = np.full(distance.shape[0], -1)
    taken = np.zeros(distance.shape[1], np.bool_)
    for j in range(distance.shape[0]):
        best = -1
        for i in range(distance.shape[1]):
            if not taken[i] and distance[j, i] < limit and (best < 0 or distance[j, i] < distance[j, best]):
                best = i
        if best >= 0:
            taken[best] = True
            result[j] = best
    return result


def recall_thresholds(scores: Floats, count: int, steps: int, repeat: bool) -> Floats:
    """Scores at which the recall comes nearest to 0, 1/steps, 2/steps, … as far as it goes.

    Args:
        scores: of the true positives.
        count: labelled boxes.
        steps: 40 for KITTI, 50 for ONCE.
        repeat: one score may stand for several recalls, as it must where boxes are few: ONCE's way. KITTI's
            devkit goes on to the next score instead, and ends early where there are fewer boxes than steps.
    """
    thresholds: list[float] = []
    ordered = np.sort(scores)[::-1]
    last = len(ordered) - 1
    recall = 0.0  # summed up as in the devkit: where two scores are equally near, its rounding decides
    for i, score in enumerate(ordered):
        here, following = (i + 1) / count, (i + 2 if i < last else i + 1) / count
        if following - recall < recall - here and i < last:
            continue
        thresholds.append(float(score))
        recall += 1 / steps
        while repeat and here + following + 1e-6 > 2 * recall:
            thresholds.append(float(score))
            recall += 1 / steps
    return np.array(thresholds[: steps + 1])


def envelope(values: Floats) -> Floats:
    """Largest of each value and all after it: the precision that can be had at no less recall."""
    return np.maximum.accumulate(values[::-1])[::-1]


@dataclass(frozen=True)
class Case:
    """Boxes of one class of one frame, as `true_scores` and `count_matches` want them."""

    overlap: Floats
    scores: Floats
    truth_ignored: NDArray[np.bool_]
    found_ignored: NDArray[np.bool_]
    elsewhere: NDArray[np.bool_]
    similarity: Floats


def precision_curves(cases: Sequence[Case], minimum: float, steps: int, repeat: bool) -> Floats:
    """Precision, and precision weighted by similarity, at the recalls 0, 1/steps, … 1, by KITTI's two passes.

    Returns:
        ``(2, steps + 1)``, 0 where the recall is not reached; NaN without a labelled box.
    """
    count = sum(int((~case.truth_ignored).sum()) for case in cases)
    if not count:
        return np.full((2, steps + 1), np.nan)
    parts = [
        true_scores(case.overlap, case.scores, case.truth_ignored, case.found_ignored, minimum)
        for case in cases
    ]
    thresholds = recall_thresholds(np.concatenate(parts), count, steps, repeat)
    totals = np.zeros((len(thresholds), 3))
    for case in cases:
        count_matches(
            case.overlap,
            case.scores,
            case.truth_ignored,
            case.found_ignored,
            case.elsewhere,
            case.similarity,
            minimum,
            thresholds,
            totals,
        )
    right, wrong, similarity = totals.T
    curves = np.zeros((2, steps + 1))
    curves[:, : len(totals)] = np.stack([right, similarity]) / np.maximum(right + wrong, 1)
    return np.stack([envelope(curve) for curve in curves])
