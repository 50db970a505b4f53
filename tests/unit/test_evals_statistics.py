"""Statistics against closed forms, hand-worked numbers and scipy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evals.statistics import (
    MAX_ENUMERATED,
    bootstrap_interval,
    holm,
    mcnemar_test,
    mean_estimate,
    paired_difference,
    pass_at_k,
    problem_means,
    proportion_estimate,
    ratio_estimate,
    sign_flip_test,
    wilson_interval,
)


def test_problem_means_keeps_first_appearance_order_and_mixed_ids() -> None:
    problems, means, counts = problem_means([1, 0, 1, 1], ["b", 7, "b", 7])
    assert list(problems) == ["b", 7]
    np.testing.assert_allclose(means, [1.0, 0.5])
    assert counts.tolist() == [2, 2]


@pytest.mark.parametrize(("solved", "n"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_one_sample_per_problem_is_wilsons_interval(solved: int, n: int) -> None:
    shares = [1.0] * solved + [0.0] * (n - solved)
    estimate = proportion_estimate(shares, draws=n)
    expected = stats.binomtest(solved, n).proportion_ci(0.95, method="wilson")
    assert estimate.value == pytest.approx(solved / n, abs=1e-15)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert estimate.method == "Wilson"


def test_wilson_interval_by_hand() -> None:
    # p = 1/2, n = 4, c = 2: (0.5 + 0.5 -+ 2 sqrt(1/16 + 1/16)) / 2 = 0.5 -+ sqrt(1/8)
    low, high = wilson_interval(0.5, 4, 2.0)
    assert (low, high) == pytest.approx((0.5 - math.sqrt(1 / 8), 0.5 + math.sqrt(1 / 8)), abs=1e-15)


def test_clustered_interval_by_hand() -> None:
    # Shares 1/4, 1/2, 3/4 and 1/2: mean 1/2, s^2 = (1/16 + 1/16)/3 = 1/24, V = 1/96,
    # effective size (1/4)/(1/96) = 24, t of 3 degrees.
    estimate = proportion_estimate([0.25, 0.5, 0.75, 0.5], draws=32)
    t = stats.t.ppf(0.975, 3)
    half = t * math.sqrt(1 / 96 + t**2 / (4 * 24**2)) / (1 + t**2 / 24)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


def test_identical_samples_add_no_information() -> None:
    shares = [1.0] * 12 + [0.0] * 18
    one = proportion_estimate(shares, draws=30)
    eight = proportion_estimate(shares, draws=240)
    assert eight.high - eight.low >= one.high - one.low


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_equal_outcomes_count_problems_not_samples(share: float) -> None:
    clustered = proportion_estimate([share] * 10, draws=80)
    single = proportion_estimate([share] * 10, draws=10)
    assert (clustered.low, clustered.high) == (single.low, single.high)


def test_effective_size_is_at_most_the_draws() -> None:
    estimate = proportion_estimate([0.5] * 10, draws=40)  # no spread between problems
    t = float(stats.t.ppf(0.975, 9))
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(0.5, 40, t), abs=1e-12)


def test_nothing_to_estimate() -> None:
    assert math.isnan(proportion_estimate([], draws=0).value)
    assert math.isnan(mean_estimate([]).value)
    assert mean_estimate([3.0]).value == 3.0
    assert math.isnan(mean_estimate([3.0]).low)


def test_clustered_interval_covers_and_a_naive_one_does_not() -> None:
    rng = np.random.default_rng(3)
    n_problems, n_samples, rounds = 30, 8, 400
    truth, hits, naive_hits = 0.4, 0, 0
    for _ in range(rounds):
        skill = rng.beta(0.8, 1.2, n_problems)  # mean 0.4
        solved = rng.binomial(n_samples, skill)
        draws = n_problems * n_samples
        estimate = proportion_estimate(solved / n_samples, draws=draws)
        hits += estimate.low <= truth <= estimate.high
        naive = wilson_interval(solved.sum() / draws, draws, 1.96)
        naive_hits += naive[0] <= truth <= naive[1]
    # 400 rounds of 0.95 have a standard error of 0.011.
    assert 0.92 <= hits / rounds <= 0.98
    assert naive_hits / rounds < 0.75


def test_mean_estimate_is_students_interval() -> None:
    values = np.array([0.3, -1.2, 2.5, 0.9, 0.1])
    estimate = mean_estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_ratio_estimate_by_hand() -> None:
    # Totals 2 and 2 over 1 and 3 tokens: R = 1, residuals 1 and -1, V = 2/1 * 2 / 16 = 1/4.
    estimate = ratio_estimate([2.0, 2.0], [1.0, 3.0])
    half = stats.t.ppf(0.975, 1) * 0.5
    assert estimate.value == pytest.approx(1.0, abs=1e-15)
    assert (estimate.low, estimate.high) == pytest.approx((1 - half, 1 + half), abs=1e-9)


def _enumerated_p(differences: Iterable[float]) -> float:
    values = list(differences)
    observed = abs(sum(values))
    flips = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in flips]
    return sum(total >= observed - 1e-9 for total in sums) / len(sums)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 2)), min_size=1, max_size=8))
def test_sign_flip_test_equals_a_second_enumeration(differences: list[float]) -> None:
    p_value, test = sign_flip_test(differences)
    assert test == "sign flips, exact"
    assert p_value == pytest.approx(_enumerated_p(differences), abs=1e-12)


def test_sign_flip_test_equals_scipys_permutation_test() -> None:
    differences = np.array([0.25, -0.125, 0.5, 0.375, 0.0, 0.125, 0.25])
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(differences)[0] == pytest.approx(expected.pvalue, abs=1e-12)


def test_drawn_sign_flips_are_close_to_exact_ones_and_never_zero() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.3, 1.0, MAX_ENUMERATED)
    exact, _ = sign_flip_test(differences)
    padded = np.concatenate([differences, np.full(3, 1e-7)])  # too many to enumerate
    drawn, test = sign_flip_test(padded, draws=20_000)
    assert test == "sign flips, 20000 draws"
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flip_test(np.ones(50), draws=999)[0] == pytest.approx(1 / 1000, abs=1e-15)
    assert sign_flip_test(padded, draws=500)[0] == sign_flip_test(padded, draws=500)[0]


def test_sign_flip_p_values_are_valid_under_the_null() -> None:
    rng = np.random.default_rng(1)
    p_values = [sign_flip_test(rng.normal(size=8))[0] for _ in range(500)]
    for level in (0.05, 0.2, 0.5):
        share = float(np.mean(np.array(p_values) <= level))
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 500)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (7, 2), (3, 3), (9, 1)])
def test_mcnemar_is_the_binomial_test_and_the_sign_flip_test(gained: int, lost: int) -> None:
    first = [False] * gained + [True] * lost + [True, False]
    second = [True] * gained + [False] * lost + [True, False]
    p_value = mcnemar_test(first, second)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert p_value == pytest.approx(expected, abs=1e-12)
    differences = np.array(second, float) - np.array(first, float)
    assert p_value == pytest.approx(sign_flip_test(differences)[0], abs=1e-12)


def test_bootstrap_interval_is_close_to_students_for_normal_data() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(1.0, 2.0, 60)
    low, high = bootstrap_interval(values, seed=5)
    expected = stats.t.interval(0.95, 59, loc=values.mean(), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.06)
    assert (low, high) == bootstrap_interval(values, seed=5)
    assert all(math.isnan(end) for end in bootstrap_interval([1.0]))


def test_bootstrap_interval_covers_for_few_problems() -> None:
    rng = np.random.default_rng(4)
    rounds, hits = 300, 0
    for seed in range(rounds):
        low, high = bootstrap_interval(rng.normal(0.0, 1.0, 8), resamples=600, seed=seed)
        hits += low <= 0.0 <= high
    assert 0.91 <= hits / rounds <= 0.985


def test_paired_difference_by_hand() -> None:
    result = paired_difference([0.0, 0.25, 0.5], [0.5, 0.5, 0.5])
    assert result.difference == pytest.approx(0.25, abs=1e-15)
    assert result.p_value == pytest.approx(2 / 4, abs=1e-15)  # ++ and -- of 4 sign patterns
    assert result.n == 3
    weighted = paired_difference([0.0, 0.0], [1.0, 0.0], weights=[3.0, 1.0])
    assert weighted.difference == pytest.approx(0.75, abs=1e-15)


def test_paired_difference_swaps_sign() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.random(25), rng.random(25)
    forward, back = paired_difference(a, b), paired_difference(b, a)
    assert forward.difference == pytest.approx(-back.difference, abs=1e-12)
    assert forward.p_value == pytest.approx(back.p_value, abs=1e-12)
    assert (forward.low, forward.high) == pytest.approx((-back.high, -back.low), abs=1e-12)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (8, 8), (10, 3), (6, 0)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int) -> None:
    outcomes = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(outcomes, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k([n], [c], k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@4"):
        pass_at_k([8, 3], [1, 1], 4)
    np.testing.assert_allclose(pass_at_k([10_000], [1], 100), [0.01], atol=1e-12)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5 become 0.04, 0.06, max(0.06, 0.06), 0.5.
    np.testing.assert_allclose(holm([0.02, 0.5, 0.01, 0.03]), [0.06, 0.5, 0.04, 0.06], atol=1e-15)
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])
    assert holm([]).tolist() == []
