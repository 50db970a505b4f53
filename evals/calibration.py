"""Whether preference probabilities mean what they say. Pure functions of numpy arrays.

A pair is scored twice; p = sigmoid(chosen - rejected) is the probability given to the preference
that was labelled (Bradley and Terry 1952). The predicted winner is the side with the higher score,
and the confidence is max(p, 1 - p), from 0.5 (cannot tell) to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from alignment.types import AlignmentError
from evals.statistics import FloatArray, average_ranks, wilson_interval

BINS = 10
_CRITICAL = 1.959963984540054  # the normal quantile of a 95% interval


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The pairs whose confidence lies in [low, high), or [low, 1] for the last bin.

    accuracy_low, accuracy_high: Wilson's 95% interval of the accuracy, pairs taken as independent.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How far length alone tells which side a scorer prefers.

    pearson, spearman: correlation over pairs of (chosen - rejected score) with
        (chosen - rejected length); NaN where one of the two does not vary.
    longer_wins: among pairs of unequal length and unequal score, the share in which the longer side
        has the higher score; NaN where there are none.
    longer_chosen: among pairs of unequal length, the share in which the chosen side is the longer
        one: what `longer_wins` is for a scorer that is always right.
    """

    pearson: float
    spearman: float
    longer_wins: float
    longer_chosen: float


def preference_probabilities(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> FloatArray:
    """sigmoid(chosen - rejected), `[N]`, the probability of the labelled preference.

    Raises:
        AlignmentError: the scores do not pair, or one is not finite.
    """
    first, second = _finite("chosen", chosen), _finite("rejected", rejected)
    if first.shape != second.shape:
        raise AlignmentError(
            f"{len(first)} chosen and {len(second)} rejected scores do not pair; give two per pair"
        )
    probabilities: FloatArray = special.expit(first - second)
    return probabilities


def brier_terms(probabilities: npt.ArrayLike) -> FloatArray:
    """(1 - p)^2 of each pair, `[N]`. Their mean is the Brier (1950) score of the labelled
    preferences: 0 at best, 0.25 for a scorer that cannot tell, 1 at worst."""
    terms: FloatArray = np.square(1 - np.asarray(probabilities, dtype=np.float64))
    return terms


def reliability_bins(probabilities: npt.ArrayLike, *, bins: int = BINS) -> list[ReliabilityBin]:
    """Pairs by confidence, in `bins` bins of equal width over [0.5, 1]; empty bins are left out.

    A pair counts as right where p > 1/2, and as half right where p = 1/2, which is what flipping a
    coin would give.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, p > 0.5)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1)
    found = []
    for index in range(bins):
        inside = place == index
        count = int(np.count_nonzero(inside))
        if count:
            accuracy = float(right[inside].mean())
            low, high = wilson_interval(accuracy, count, _CRITICAL)
            mean = float(confidence[inside].mean())
            ends = float(edges[index]), float(edges[index + 1])
            found.append(ReliabilityBin(*ends, count, mean, accuracy, low, high))
    return found


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """sum over bins of (count / N) |accuracy - mean confidence|. Guo et al. (2017), equation 5.

    With their equal-width bins, which cover [0.5, 1] here, since the confidence in the winner of
    two is never lower. Biased upwards on few pairs: even a calibrated scorer's bins miss their
    confidence by chance.
    """
    total = sum(one.count for one in bins)
    if not total:
        return float("nan")
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / total


def length_bias(score_differences: npt.ArrayLike, length_differences: npt.ArrayLike) -> LengthBias:
    """Correlation of score with length over pairs, both as chosen minus rejected, `[N]` each."""
    scores = np.asarray(score_differences, dtype=np.float64)
    lengths = np.asarray(length_differences, dtype=np.float64)
    agree = np.sign(scores) * np.sign(lengths)
    longer = np.sign(lengths[lengths != 0])
    return LengthBias(
        pearson=pearson_correlation(scores, lengths),
        spearman=pearson_correlation(average_ranks(scores), average_ranks(lengths)),
        longer_wins=_share(agree[agree != 0] > 0),
        longer_chosen=_share(longer > 0),
    )


def pearson_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Pearson's r; NaN where one of the two does not vary. On average ranks it is Spearman's."""
    first, second = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if len(first) < 2 or np.all(first == first[0]) or np.all(second == second[0]):
        return float("nan")
    a, b = first - first.mean(), second - second.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _share(hits: npt.NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _finite(side: str, scores: npt.ArrayLike) -> FloatArray:
    values = np.atleast_1d(np.asarray(scores, dtype=np.float64))
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise AlignmentError(
            f"the {side} side of pair {broken[0]} was scored {values[broken[0]]} (and "
            f"{len(broken) - 1} more are not finite); the model or its head is broken"
        )
    return values
