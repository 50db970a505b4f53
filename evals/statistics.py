"""Statistics of evaluations: intervals, paired tests, pass@k. Pure functions of numpy arrays.

The unit of observation is the *problem*, not the sample: several samples of one problem are
correlated, so every interval and test here works on one number per problem (its mean over its
samples), and more samples per problem only make that number less noisy. Everything random takes
a seed and gives the same answer every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]

# Sign flips are enumerated up to this many non-zero differences (2^18 sums) and drawn beyond.
MAX_ENUMERATED = 18
# Cells of one random matrix, which bounds the memory of the resampling loops.
_CHUNK_CELLS = 2_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval. `low` and `high` are NaN where there is too little to tell.

    n: observations behind it (problems); method: how the interval was made, for people.
    """

    value: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Second minus first on the same problems, its interval and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    test: str


def problem_means(
    values: npt.ArrayLike, problems: Sequence[object]
) -> tuple[npt.NDArray[np.object_], FloatArray, npt.NDArray[np.int64]]:
    """One mean per problem, in order of first appearance.

    Returns:
        the problems, the mean of `values` in each, and how many values each had.
    """
    index: dict[object, int] = {}
    rows = np.array([index.setdefault(problem, len(index)) for problem in problems], dtype=np.int64)
    counts = np.bincount(rows, minlength=len(index))
    sums = np.bincount(rows, weights=_vector(values), minlength=len(index))
    names = np.empty(len(index), dtype=object)
    names[:] = list(index)
    return names, sums / counts, counts


def wilson_interval(share: float, n: float, critical: float) -> tuple[float, float]:
    """Wilson's score interval for a proportion.

    (p + c^2/2n -+ c sqrt(p(1-p)/n + c^2/4n^2)) / (1 + c^2/n), Wilson (1927). Unlike p -+ c se, it
    stays inside [0, 1] and has a width at p = 0 and p = 1.

    Args:
        share: the observed proportion p.
        n: trials, or the effective number of them.
        critical: the quantile c, 1.96 for 95%.
    """
    square = critical**2 / n
    half = critical * float(np.sqrt(share * (1 - share) / n + square / (4 * n))) / (1 + square)
    middle = (share + square / 2) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def proportion_estimate(shares: npt.ArrayLike, *, draws: int, confidence: float = 0.95) -> Estimate:
    """Mean of per-problem shares in [0, 1], with an interval that respects clustering.

    One sample per problem (`draws` equals the number of problems K): Wilson's interval. More:
    Wilson's interval at the effective sample size p(1-p)/V, where V = s^2/K is the variance of
    the mean over problems (the cluster-robust variance of equal clusters), with Student's t of
    K - 1 degrees of freedom as the critical value; after Korn and Graubard (1998). The effective
    size is at most `draws`; where every share is 0, or every share is 1, V says nothing and K
    stands in for it, as if each problem had been sampled once.

    Args:
        shares: `[K]`, one share per problem.
        draws: samples behind all the shares together.
    """
    per_problem = _vector(shares)
    n_problems = len(per_problem)
    if n_problems == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, "no problems")
    mean = float(per_problem.mean())
    normal = _normal_quantile(confidence)
    if draws == n_problems:
        low, high = wilson_interval(mean, n_problems, normal)
        return Estimate(mean, low, high, n_problems, "Wilson")
    if n_problems == 1 or mean in (0.0, 1.0):
        return _one_trial_per_problem(mean, n_problems, confidence)
    variance = float(per_problem.var(ddof=1)) / n_problems
    return _clustered_wilson(mean, variance, n_problems, draws, confidence)


def clustered_proportion(
    hits: npt.ArrayLike, clusters: Sequence[object], *, confidence: float = 0.95
) -> Estimate:
    """Share of hits among all observations, where those of one cluster go together.

    Every observation weighs the same, so a large cluster weighs more (`proportion_estimate` weighs
    clusters equally). Wilson's interval; where a cluster has several observations, at the
    effective sample size of `proportion_estimate`, V being the variance of `ratio_estimate`.

    Args:
        hits: `[N]` of 0 or 1.
        clusters: `[N]`, the cluster of each, such as the prompt that two pairs share.
    """
    names, shares, counts = problem_means(hits, clusters)
    draws, n_clusters = int(counts.sum()), len(names)
    if n_clusters == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, "no observations")
    share = float(shares @ counts) / draws
    if draws == n_clusters:
        low, high = wilson_interval(share, draws, _normal_quantile(confidence))
        return Estimate(share, low, high, n_clusters, "Wilson")
    if n_clusters == 1 or share in (0.0, 1.0):
        return _one_trial_per_problem(share, n_clusters, confidence)
    variance = _ratio_variance(shares * counts, counts.astype(np.float64), share)
    return _clustered_wilson(share, variance, n_clusters, draws, confidence)


def mean_estimate(values: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of one real number per problem, with Student's t interval over problems."""
    per_problem = _vector(values)
    return ratio_estimate(per_problem, np.ones_like(per_problem), confidence=confidence)


def ratio_estimate(
    totals: npt.ArrayLike, counts: npt.ArrayLike, *, confidence: float = 0.95
) -> Estimate:
    """Global mean sum(totals) / sum(counts) where clusters differ in size, such as tokens.

    Linearised cluster-robust interval (Cochran 1977, section 6.3): with residuals
    e_i = total_i - R count_i, V = K/(K-1) sum e_i^2 / (sum counts)^2, and t of K - 1 degrees.

    Args:
        totals: `[K]`, the sum inside each cluster.
        counts: `[K]`, the terms inside each cluster.
    """
    sums, sizes = _vector(totals), _vector(counts)
    n_clusters, size = len(sums), float(sizes.sum())
    if size == 0:
        return Estimate(np.nan, np.nan, np.nan, n_clusters, "no observations")
    ratio = float(sums.sum()) / size
    if n_clusters < 2:
        return Estimate(ratio, np.nan, np.nan, n_clusters, "one problem: no interval")
    variance = _ratio_variance(sums, sizes, ratio)
    half = _t_quantile(confidence, n_clusters - 1) * float(np.sqrt(variance))
    return Estimate(ratio, ratio - half, ratio + half, n_clusters, "Student's t over problems")


def paired_difference(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Weighted mean of `second - first` over problems, its bootstrap interval and sign-flip test.

    Args:
        first, second: `[K]`, one number per problem, the same problems in the same order.
        weights: `[K]`, weight of each problem (its tokens, say); equal where None.
    """
    differences = _vector(second) - _vector(first)
    weight = np.ones_like(differences) if weights is None else _vector(weights)
    if len(differences) == 0:
        return PairedDifference(np.nan, np.nan, np.nan, np.nan, 0, "no common problems")
    p_value, test = sign_flip_test(weight * differences, draws=resamples, seed=seed)
    low, high = bootstrap_interval(
        differences, weight, confidence=confidence, resamples=resamples, seed=seed
    )
    value = float(weight @ differences / weight.sum())
    return PairedDifference(value, low, high, p_value, len(differences), test)


def sign_flip_test(
    differences: npt.ArrayLike, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, str]:
    """Two-sided p-value of "the sign of each difference is a coin flip", and how it was found.

    The statistic is the absolute sum. All 2^m sign patterns of the m non-zero differences are
    enumerated where m <= 18; beyond, `draws` patterns are drawn and p = (1 + hits) / (1 + draws),
    which keeps the test valid (Phipson and Smyth 2010). On one sample per problem the enumerated
    test is McNemar's exact test.
    """
    every = _vector(differences)
    sizes = np.abs(every[every != 0])
    # Equal sums reached in another order of addition count as equal.
    threshold = abs(float(every.sum())) - 1e-9 * float(sizes.sum())
    if len(sizes) <= MAX_ENUMERATED:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums + size, sums - size])
        return float(np.mean(np.abs(sums) >= threshold)), "sign flips, exact"
    generator = np.random.default_rng(seed)
    hits = 0
    for rows in _chunks(draws, len(sizes)):
        signs = 2.0 * generator.integers(0, 2, size=(rows, len(sizes))) - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ sizes) >= threshold))
    return (1 + hits) / (1 + draws), f"sign flips, {draws} draws"


def bootstrap_interval(
    values: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a weighted mean, resampling problems.

    The expanded percentile interval of Hesterberg (2015): quantiles at
    Phi(-+ sqrt(K/(K-1)) t_{K-1}), since plain percentiles are too narrow for few problems.

    Returns:
        (low, high); NaN where there are fewer than two problems.
    """
    data = _vector(values)
    weight = np.ones_like(data) if weights is None else _vector(weights)
    n = len(data)
    if n < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    means: list[FloatArray] = []
    for rows in _chunks(resamples, n):
        picks = generator.integers(0, n, size=(rows, n))
        means.append((weight * data)[picks].sum(axis=1) / weight[picks].sum(axis=1))
    critical = _t_quantile(confidence, n - 1) * np.sqrt(n / (n - 1))
    tail = float(special.ndtr(-critical))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar_test(first_correct: npt.ArrayLike, second_correct: npt.ArrayLike) -> float:
    """McNemar's exact two-sided p-value for one sample per problem.

    Of the problems that exactly one model solved, each model solves half by chance: binomial.
    """
    first = np.asarray(first_correct, dtype=bool)
    second = np.asarray(second_correct, dtype=bool)
    gained, lost = int(np.sum(~first & second)), int(np.sum(first & ~second))
    if gained + lost == 0:
        return 1.0
    return min(1.0, 2.0 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))


def pass_at_k(n: npt.ArrayLike, correct: npt.ArrayLike, k: int) -> FloatArray:
    """Unbiased estimate, per problem, that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k), Chen et al. (2021), equation 1, as a product of k factors.

    Args:
        n: samples per problem, each at least k.
        correct: how many of them were correct.

    Raises:
        ValueError: a problem has fewer than k samples.
    """
    samples, solved = _vector(n), _vector(correct)
    if k < 1 or np.any(samples < k):
        raise ValueError(f"pass@{k} needs k >= 1 and at least k samples of each problem")
    miss = np.ones(np.broadcast(samples, solved).shape)
    for i in range(k):
        miss = miss * np.maximum(samples - solved - i, 0.0) / (samples - i)
    return 1.0 - miss


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's (1979) step-down adjustment: reject where the result is below the level.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_(j), at most 1. It bounds the
    chance of any false rejection, whatever the dependence between the tests.
    """
    p = _vector(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def average_ranks(values: npt.ArrayLike) -> FloatArray:
    """Ranks from 1 upwards; equal values share the mean of their ranks."""
    _, place, counts = np.unique(_vector(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: FloatArray = last - (counts - 1) / 2
    return middle[place]


def _one_trial_per_problem(share: float, n_problems: int, confidence: float) -> Estimate:
    low, high = wilson_interval(share, n_problems, _normal_quantile(confidence))
    return Estimate(share, low, high, n_problems, "Wilson, one trial per problem")


def _clustered_wilson(
    share: float, variance: float, n_clusters: int, draws: int, confidence: float
) -> Estimate:
    """Wilson's interval at the sample size that `variance` is worth, at most `draws`."""
    spread = share * (1 - share)
    effective = spread / variance if variance * draws > spread else float(draws)
    low, high = wilson_interval(share, effective, _t_quantile(confidence, n_clusters - 1))
    return Estimate(share, low, high, n_clusters, "Wilson, clustered by problem")


def _ratio_variance(sums: FloatArray, sizes: FloatArray, ratio: float) -> float:
    """K/(K-1) sum (total_i - R count_i)^2 / (sum counts)^2."""
    residuals = sums - ratio * sizes
    n = len(sums)
    return n / (n - 1) * float(residuals @ residuals) / float(sizes.sum()) ** 2


def _normal_quantile(confidence: float) -> float:
    return float(special.ndtri(0.5 + confidence / 2))


def _t_quantile(confidence: float, degrees: int) -> float:
    return float(special.stdtrit(degrees, 0.5 + confidence / 2))


def _vector(values: npt.ArrayLike) -> FloatArray:
    return np.atleast_1d(np.asarray(values, dtype=np.float64))


def _chunks(rows: int, columns: int) -> list[int]:
    """Split `rows` so that a `[chunk, columns]` matrix stays small."""
    size = max(1, _CHUNK_CELLS // max(columns, 1))
    return [min(size, rows - start) for start in range(0, rows, size)]
