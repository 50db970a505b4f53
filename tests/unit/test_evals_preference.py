"""Calibration, length correlation, best-of-n and the tasks of preference learning, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alignment.config.methods.base import DataForm
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    PairBatch,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
    Score,
    SteppedSample,
    StopReason,
    UserInputError,
)
from evals.best_of import best_of_kl_bound, best_of_mean, best_of_weights
from evals.calibration import (
    brier_terms,
    expected_calibration_error,
    length_bias,
    preference_probabilities,
    reliability_bins,
)
from evals.compare import compare
from evals.preference_task import preference, result_bins
from evals.process_task import area_under_curve, process
from evals.reliability import reliability_charts
from evals.results import EvalResult
from evals.reward_kl_task import reward_kl
from evals.rundata import EvalSummary
from evals.statistics import average_ranks, clustered_proportion

# ---------------------------------------------------------------------------------- calibration


def test_probabilities_are_the_sigmoid_of_the_difference_and_do_not_overflow() -> None:
    found = preference_probabilities([2.0, 0.0, 800.0, -800.0], [0.0, 0.0, -800.0, 800.0])
    assert found == pytest.approx([1 / (1 + math.exp(-2)), 0.5, 1.0, 0.0], abs=1e-15)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_not_finite_or_do_not_pair_are_named(broken: float) -> None:
    with pytest.raises(AlignmentError, match="rejected side of pair 1"):
        preference_probabilities([0.0, 0.0], [0.0, broken])
    with pytest.raises(AlignmentError, match="2 chosen and 1 rejected"):
        preference_probabilities([0.0, 0.0], [0.0])


def test_reliability_bins_by_hand() -> None:
    # Confidences .52 (right), .53 (wrong), .72 (right), .97 (right), 1 (wrong), and a tie.
    bins = reliability_bins([0.52, 0.47, 0.72, 0.97, 0.0, 0.5])
    assert [(round(b.low, 2), round(b.high, 2), b.count) for b in bins] == [
        (0.5, 0.55, 3),
        (0.7, 0.75, 1),
        (0.95, 1.0, 2),
    ]
    assert [b.confidence for b in bins] == pytest.approx([1.55 / 3, 0.72, 0.985], abs=1e-12)
    assert [b.accuracy for b in bins] == pytest.approx([1.5 / 3, 1.0, 0.5], abs=1e-12)
    by_hand = (3 * abs(0.5 - 1.55 / 3) + 1 * abs(1 - 0.72) + 2 * abs(0.5 - 0.985)) / 6
    assert expected_calibration_error(bins) == pytest.approx(by_hand, abs=1e-12)


def test_a_bin_has_wilsons_interval() -> None:
    (one,) = reliability_bins([0.72] * 8 + [0.28] * 2)
    oracle = stats.binomtest(8, 10).proportion_ci(0.95, method="wilson")
    assert (one.accuracy_low, one.accuracy_high) == pytest.approx((oracle.low, oracle.high))


def test_bins_touch_and_cover_everything() -> None:
    edges = np.linspace(0.5, 1.0, 11)
    bins = reliability_bins(edges)
    assert sum(one.count for one in bins) == 11
    assert [one.count for one in bins] == [1] * 9 + [2]  # left-closed; the last one has its end


def test_calibrated_scores_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    rng = np.random.default_rng(0)
    margin = np.abs(rng.normal(0, 1.5, size=40_000))
    right = rng.random(40_000) < 1 / (1 + np.exp(-margin))
    signed = np.where(right, margin, -margin)
    calibrated = reliability_bins(preference_probabilities(signed, np.zeros_like(signed)))
    assert expected_calibration_error(calibrated) < 0.01
    loud = reliability_bins(preference_probabilities(4 * signed, np.zeros_like(signed)))
    assert expected_calibration_error(loud) > 0.1


def test_nothing_to_calibrate_is_nan() -> None:
    assert reliability_bins([]) == []
    assert math.isnan(expected_calibration_error([]))


def test_brier_terms_by_hand() -> None:
    assert brier_terms([1.0, 0.5, 0.2]) == pytest.approx([0.0, 0.25, 0.64], abs=1e-15)


def test_length_bias_by_hand_and_against_scipy() -> None:
    scores, lengths = [2.0, -1.0, 0.5, 0.0, 1.0], [10, -4, -3, 5, 0]
    bias = length_bias(scores, lengths)
    # Of pairs 0, 1, 2 the longer side scores higher in 0 and 1; it was chosen in 0 and 3 of four.
    assert bias.longer_wins == pytest.approx(2 / 3, abs=1e-12)
    assert bias.longer_chosen == pytest.approx(2 / 4, abs=1e-12)
    assert bias.pearson == pytest.approx(stats.pearsonr(scores, lengths).statistic, abs=1e-12)
    assert bias.spearman == pytest.approx(stats.spearmanr(scores, lengths).statistic, abs=1e-12)


def test_length_bias_that_does_not_exist_is_nan() -> None:
    bias = length_bias([1.0, 2.0], [3, 3])
    assert math.isnan(bias.pearson) and math.isnan(bias.spearman)
    same = length_bias([0.0, 0.0], [0, 0])
    assert math.isnan(same.longer_wins) and math.isnan(same.longer_chosen)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_average_ranks_are_scipys(values: list[int]) -> None:
    assert average_ranks(values) == pytest.approx(stats.rankdata(values))


def test_clustered_proportion_is_wilson_alone_and_wider_where_pairs_share_prompts() -> None:
    hits = [1, 1, 1, 0] * 10
    alone = clustered_proportion(hits, range(40))
    oracle = stats.binomtest(30, 40).proportion_ci(0.95, method="wilson")
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.75, oracle.low, oracle.high))
    sorted_hits = sorted(hits)
    together = clustered_proportion(sorted_hits, [i // 4 for i in range(40)])
    assert together.value == pytest.approx(0.75, abs=1e-12)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    # Every observation weighs the same: 3 of 4, not the mean of 1 and 2/3.
    assert clustered_proportion([1, 1, 1, 0], "abbb").value == pytest.approx(0.75, abs=1e-12)


# ------------------------------------------------------------------------------------ best of n


def brute_force(proxy: Sequence[float], values: Sequence[float], n: int) -> float:
    """The mean over all subsets of the mean value of those that share the highest proxy."""
    kept = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        winners = [values[i] for i in subset if proxy[i] == best]
        kept.append(sum(winners) / len(winners))
    return sum(kept) / len(kept)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_best_of_equals_all_subsets(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 7))
    n = data.draw(st.integers(1, size))
    proxy = data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))  # ties abound
    values = data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))
    expected = brute_force(proxy, values, n)
    assert best_of_mean(proxy, values, n) == pytest.approx(expected, abs=1e-12)


def test_best_of_weights_by_hand_and_in_any_order() -> None:
    # Of the C(4, 2) = 6 pairs, the smallest is the best of none, then of 1, 2 and 3.
    assert best_of_weights([0.3, 0.1, 0.9, 0.5], 2) == pytest.approx([1 / 6, 0, 3 / 6, 2 / 6])
    assert best_of_weights([1.0, 1.0, 0.0], 2) == pytest.approx([0.5, 0.5, 0.0])
    assert best_of_weights([5.0, 2.0], 1) == pytest.approx([0.5, 0.5])
    assert best_of_weights(np.arange(200.0), 100).sum() == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ValueError, match="best of 3"):
        best_of_weights([1.0, 2.0], 3)


def test_the_bound_holds_the_exact_divergence_of_best_of_n() -> None:
    assert best_of_kl_bound(1) == 0.0
    assert best_of_kl_bound(4) == pytest.approx(math.log(4) - 0.75, abs=1e-15)
    for size, n in ((2, 2), (5, 4), (1000, 4)):  # a uniform choice of `size`, ranked
        ranks = np.arange(1, size + 1) / size
        chosen = ranks**n - (ranks - 1 / size) ** n
        exact = float(np.sum(chosen * np.log(np.maximum(chosen, 1e-300) * size)))
        assert exact <= best_of_kl_bound(n) + 1e-12
    assert exact == pytest.approx(best_of_kl_bound(4), abs=0.01)  # many outcomes: tight


# ---------------------------------------------------------------------------------- the context


@dataclass(frozen=True)
class Scores:
    logprobs: Sequence[Sequence[float]]
    greedy_correct: Sequence[Sequence[bool]] = ()


def absent(*_: object) -> None:
    raise AssertionError("this task does not ask for that")


SAMPLING = SamplingParams(32, temperature=0.7, top_k=5, stop=("#",), step=9)


@dataclass
class Context:
    """A run that has only what a test gives it. As an engine, it says `texts` in turn."""

    prompts: Sequence[Prompt] = ()
    samples: Sequence[Sample] = ()
    sampling: SamplingParams = SAMPLING
    seed: int = 3
    grade: Callable[..., list[RewardedCompletion]] = absent
    score: Callable[[Sequence[Sample]], Scores] = absent
    reference_score: Callable[[Sequence[Sample]], Scores] | None = None
    pairs: PairBatch | None = None
    pair_scores: Callable[[PairBatch], tuple[list[float], list[float]]] | None = None
    pair_scores_are_logits: bool = True
    steps: Sequence[SteppedSample] = ()
    step_scores: Callable[[Sequence[SteppedSample]], list[list[float]]] | None = None
    why_not: Mapping[DataForm, str] = field(default_factory=dict)
    tokens: Sequence[tuple[int, ...]] = ((4, 5, 4, 5),)
    params: SamplingParams | None = None

    @property
    def engine(self) -> Context:
        return self

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        self.params = params
        return [
            Completion(p.index, i, ids, (-1.0,) * len(ids), StopReason.STOP, 0, "text")
            for p in prompts
            for i, ids in zip(range(params.n), itertools.cycle(self.tokens), strict=False)
        ]


# --------------------------------------------------------------------------------- preference


def sample(length: int, prompt: int = 0) -> Sample:
    return Sample((1, prompt), tuple(range(2, 2 + length)), (True,) * length)


PAIRS = PairBatch(
    chosen=(sample(6), sample(2, 1), sample(3, 2), sample(5, 3)),
    rejected=(sample(2), sample(5, 1), sample(3, 2), sample(1, 3)),
)


def scored(pairs: PairBatch) -> tuple[list[float], list[float]]:
    assert len(pairs) == 4
    return [2.0, 0.5, 1.0, -0.2], [0.0, 1.0, 1.0, -0.7]


def test_preference_by_hand() -> None:
    result = preference().run(Context(pairs=PAIRS, pair_scores=scored))
    margins = [2.0, -0.5, 0.0, 0.5]
    p = [1 / (1 + math.exp(-m)) for m in margins]
    assert result.metrics["accuracy"] == pytest.approx(2 / 4, abs=1e-12)  # a tie is no hit
    assert result.metrics["ties"] == pytest.approx(1 / 4, abs=1e-12)
    assert result.metrics["margin"] == pytest.approx(0.5, abs=1e-12)
    assert result.metrics["brier"] == pytest.approx(sum((1 - x) ** 2 for x in p) / 4, abs=1e-12)
    # Bins: the tie alone; the two margins of 1/2 (one right); the margin of 2 (right).
    half, two = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2))
    ece = (0 + 2 * abs(0.5 - half) + 1 * (1 - two)) / 4
    assert result.metrics["ece"] == pytest.approx(ece, abs=1e-12)
    lengths = [4, -3, 0, 4]
    oracle = stats.pearsonr(margins, lengths).statistic
    assert result.metrics["length_correlation"] == pytest.approx(oracle, abs=1e-12)
    assert result.metrics["longer_wins"] == 1.0
    assert result.metrics["longer_chosen"] == pytest.approx(2 / 3, abs=1e-12)
    low, high = result.intervals["accuracy"]
    oracle_interval = stats.binomtest(2, 4).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((oracle_interval.low, oracle_interval.high))
    assert [r.outcome for r in result.records] == [
        Outcome.CORRECT,
        Outcome.WRONG,
        Outcome.WRONG,
        Outcome.CORRECT,
    ]
    assert dict(result.records[0].values) == {
        "score/chosen": 2.0,
        "score/rejected": 0.0,
        "length/chosen": 6.0,
        "length/rejected": 2.0,
    }


def test_scores_that_are_no_logits_are_not_judged_as_probabilities(tmp_path: Path) -> None:
    logits = preference().run(Context(pairs=PAIRS, pair_scores=scored))
    plain = preference().run(Context(pairs=PAIRS, pair_scores=scored, pair_scores_are_logits=False))
    assert logits.metrics.keys() - plain.metrics.keys() == {"ece", "brier"}
    assert logits.intervals.keys() - plain.intervals.keys() == {"brier"}
    assert {name: logits.metrics[name] for name in plain.metrics} == plain.metrics
    charts = {}
    for name, result in (("logits", logits), ("plain", plain)):
        path = tmp_path / f"{name}-step-000001.json"
        result.save(path)
        metrics = dict(result.metrics)
        summary = EvalSummary(path, name, "preference", 1, metrics, {})
        charts[name] = list(reliability_charts([summary], []))
    assert len(charts["logits"]) == 1 and charts["plain"] == []
    with pytest.raises(AlignmentError, match="chosen side of pair 1 was scored nan"):
        preference().run(
            Context(
                pairs=PAIRS,
                pair_scores=lambda pairs: ([1.0, math.nan, 0.0, 0.0], [0.0] * 4),
                pair_scores_are_logits=False,
            )
        )


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    same = tuple(replace(one, prompt_ids=(1, i // 2)) for i, one in enumerate(PAIRS.chosen))
    together = preference().run(Context(pairs=replace(PAIRS, chosen=same), pair_scores=scored))
    apart = preference().run(Context(pairs=PAIRS, pair_scores=scored))
    assert together.metrics == apart.metrics
    assert together.intervals["accuracy"] != apart.intervals["accuracy"]


def test_reward_models_compare_by_accuracy_and_keep_their_bins(tmp_path: object) -> None:
    first = preference().run(Context(pairs=PAIRS, pair_scores=scored))
    better = preference().run(
        Context(pairs=PAIRS, pair_scores=lambda pairs: ([1.0] * 4, [0.0] * 4))
    )
    comparison = compare({"first": first, "better": better})
    assert comparison.metric == "accuracy"
    assert comparison.changes[0].difference == pytest.approx(0.5, abs=1e-12)
    first.save(f"{tmp_path}/saved")
    bins = result_bins(EvalResult.load(f"{tmp_path}/saved"))
    assert expected_calibration_error(bins) == pytest.approx(first.metrics["ece"], abs=1e-12)


def test_a_limit_takes_the_first_pairs() -> None:
    margins = replace(PAIRS, margins=(1.0, 2.0, 3.0, 4.0))
    seen: list[PairBatch] = []

    def score(pairs: PairBatch) -> tuple[list[float], list[float]]:
        seen.append(pairs)
        return [1.0] * len(pairs), [0.0] * len(pairs)

    result = preference(pairs=2).run(Context(pairs=margins, pair_scores=score))
    assert result.metrics["pairs"] == 2.0 and seen[0].margins == (1.0, 2.0)


def test_what_a_preference_evaluation_lacks_is_named() -> None:
    with pytest.raises(UserInputError, match="no held-out preference pairs"):
        preference().run(Context(pair_scores=scored))
    with pytest.raises(UserInputError, match="no held-out preference pairs"):
        preference().run(Context(pairs=PairBatch((), ()), pair_scores=scored))
    with pytest.raises(UserInputError, match=r"no held-out preference pairs.*row 2 has no margin"):
        preference().run(Context(why_not={"pairs": "row 2 has no margin", "steps": "others"}))
    with pytest.raises(UserInputError, match="a model that scores pairs"):
        preference().run(Context(pairs=PAIRS))
    with pytest.raises(UserInputError, match="pairs is 0"):
        preference(pairs=0)
    with pytest.raises(AlignmentError, match="4 pairs got 1 chosen"):
        preference().run(Context(pairs=PAIRS, pair_scores=lambda pairs: ([1.0], [0.0])))


# ------------------------------------------------------------------------------------- process


def stepped(*labels: float) -> SteppedSample:
    n = 2 * len(labels)
    mask = tuple(i % 2 == 1 for i in range(n))
    return SteppedSample(Sample((1,), tuple(range(2, 2 + n)), mask), labels)


STEPS = (stepped(1, 1, 0), stepped(1, 1), stepped(0, 1, 0), stepped(0.9, 0.1))
LOGITS = [[2.0, -1.0, -2.0], [1.0, 0.5], [-1.0, -1.0, 3.0], [0.4, -0.4]]


def test_process_by_hand() -> None:
    result = process().run(Context(steps=STEPS, step_scores=lambda samples: LOGITS))
    # Judged: +--, ++, --+, +-. Labelled: ++-, ++, -+-, +-.
    assert result.metrics["step_accuracy"] == pytest.approx(7 / 10, abs=1e-12)
    assert result.metrics["good_steps"] == pytest.approx(6 / 10, abs=1e-12)
    # First errors: 1 for 2 (missed), none (right), 0 (right), 1 (right).
    assert result.metrics["first_error_accuracy"] == pytest.approx(3 / 4, abs=1e-12)
    assert result.metrics["first_error_erroneous"] == pytest.approx(2 / 3, abs=1e-12)
    assert result.metrics["first_error_correct"] == 1.0
    assert result.metrics["first_error_f1"] == pytest.approx(0.8, abs=1e-12)
    # Good: 2, -1, 1, .5, -1, .4. Bad: -2, -1, 3, -.4. Couples won: 3 + 1.5 + 3 + 3 + 1.5 + 3.
    wins = 3 + (1 + 0.5) + 3 + 3 + (1 + 0.5) + 3
    assert result.metrics["step_auc"] == pytest.approx(wins / 24, abs=1e-12)
    assert [record.reward for record in result.records] == pytest.approx([2 / 3, 1, 1 / 3, 1])
    assert compare({"a": result, "b": result}).metric == "first_error_accuracy"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=15))
def test_area_under_curve_counts_couples(rows: list[tuple[int, bool]]) -> None:
    good, bad = [s for s, g in rows if g], [s for s, g in rows if not g]
    found = area_under_curve([s for s, _ in rows], [g for _, g in rows])
    if not good or not bad:
        assert math.isnan(found)
    else:
        wins = sum((a > b) + 0.5 * (a == b) for a in good for b in bad)
        assert found == pytest.approx(wins / (len(good) * len(bad)), abs=1e-12)


def test_solutions_without_errors_leave_no_f1() -> None:
    result = process().run(Context(steps=STEPS[1:2], step_scores=lambda samples: LOGITS[1:2]))
    assert result.metrics["first_error_correct"] == 1.0
    assert result.metrics.keys().isdisjoint({"first_error_f1", "first_error_erroneous", "step_auc"})


def test_what_a_process_evaluation_lacks_is_named() -> None:
    with pytest.raises(UserInputError, match="no held-out samples with labelled steps"):
        process().run(Context(step_scores=lambda samples: LOGITS))
    with pytest.raises(UserInputError, match="a model that scores steps"):
        process().run(Context(steps=STEPS))
    with pytest.raises(AlignmentError, match="one per labelled step"):
        process().run(Context(steps=STEPS, step_scores=lambda samples: [[1.0]] * 4))
    broken = [[2.0, math.nan, -2.0], *LOGITS[1:]]
    with pytest.raises(AlignmentError, match="sample 0 was scored"):
        process().run(Context(steps=STEPS, step_scores=lambda samples: broken))
    with pytest.raises(UserInputError, match="samples is 0"):
        process(samples=0)


# ------------------------------------------------------------------------------------ reward_kl

PROMPTS = (Prompt((1, 2), "a", 7), Prompt((1, 3), "b", 8))
PROXY = {(7, 0): 1.0, (7, 1): 3.0, (7, 2): 2.0, (8, 0): 0.0, (8, 1): 5.0, (8, 2): 4.0}
GOLD = {(7, 0): 0.5, (7, 1): -0.5, (7, 2): 0.1, (8, 0): 0.2, (8, 1): 0.4, (8, 2): None}
LOGPROBS = [[-1.0, -2.0, -0.5, -0.1]] * 6
REF_LOGPROBS = [[-1.5, -1.0, -0.5, -0.2]] * 3 + [[-2.0, -2.0, -0.5, -0.1]] * 3


def grade(pairs: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
    graded = []
    for prompt, completion in pairs:
        key = prompt.index, completion.sample_index
        gold = GOLD[key]
        second = Score(gold) if gold is not None else Score(None, Outcome.TIMEOUT)
        parts = {"rm": Score(PROXY[key]), "sentiment": second}
        graded.append(
            RewardedCompletion(prompt, completion, 0.5 * PROXY[key], Outcome.SCORED, parts)
        )
    return graded


def policy(**changes: object) -> Context:
    context = Context(
        prompts=PROMPTS,
        grade=grade,
        score=lambda samples: Scores(LOGPROBS),
        reference_score=lambda samples: Scores(REF_LOGPROBS),
    )
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def test_reward_kl_by_hand() -> None:
    context = policy(tokens=((4, 5, 4, 5), (4, 5, 6, 7), (9, 9, 9, 9)))
    result = reward_kl(samples=3, best_of=[1, 2], select_by="rm", gold="sentiment").run(context)
    metrics = result.metrics
    assert metrics["reward/rm"] == pytest.approx((2 + 3) / 2, abs=1e-12)
    # The sample whose grader failed is in no mean.
    assert metrics["reward/sentiment"] == pytest.approx((0.1 / 3 + 0.6 / 2) / 2, abs=1e-12)
    assert metrics["reward"] == pytest.approx((1 + 1.5) / 2, abs=1e-12)
    assert metrics["reward_std/rm"] == pytest.approx(np.std([1, 3, 2, 0, 5, 4], ddof=1), abs=1e-12)
    # Summed log-ratios: 0.5 - 1 + 0 + 0.1 for the first prompt, 1 for the second.
    assert metrics["kl"] == pytest.approx((-0.4 + 1.0) / 2, abs=1e-12)
    assert metrics["sqrt_kl"] == pytest.approx(math.sqrt(0.3), abs=1e-12)

    def k3(*ratios: float) -> float:
        return sum(math.exp(-d) - 1 + d for d in ratios)

    assert metrics["kl_k3"] == pytest.approx((k3(0.5, -1, 0, 0.1) + k3(1, 0, 0, 0)) / 2, abs=1e-12)
    half = stats.t.ppf(0.975, 1) * 1.4 / 2  # the interval of two prompts, each counted once
    assert result.intervals["kl"] == pytest.approx((0.3 - half, 0.3 + half), abs=1e-9)
    # Bigrams of a prompt: 45 54 45, 45 56 67, 99 99 99: five of nine.
    assert metrics["distinct_2"] == pytest.approx(5 / 9, abs=1e-12)
    assert metrics["length"] == 4.0
    # Best of two: all pairs of the first prompt; of the second only samples 0 and 1 are scored.
    assert metrics["best_of/2/reward/rm"] == pytest.approx(((3 + 3 + 2) / 3 + 5) / 2, abs=1e-12)
    best = ((-0.5 - 0.5 + 0.1) / 3 + 0.4) / 2
    assert metrics["best_of/2/reward/sentiment"] == pytest.approx(best, abs=1e-12)
    assert metrics["best_of/2/kl_bound"] == pytest.approx(math.log(2) - 0.5, abs=1e-12)
    assert metrics["best_of/1/reward/rm"] == pytest.approx((2 + 2.5) / 2, abs=1e-12)
    assert result.labels == {"proxy": "reward/rm", "gold": "reward/sentiment"}
    assert result.records[0].values == pytest.approx(
        {"reward/rm": 1.0, "reward/sentiment": 0.5, "kl": -0.4, "kl_k3": k3(0.5, -1, 0, 0.1)}
    )
    assert "reward/sentiment" not in result.records[-1].values


def test_prompts_with_too_few_scored_samples_leave_best_of_n() -> None:
    result = reward_kl(samples=3, best_of=[3], select_by="rm").run(policy())
    assert result.metrics["best_of/3/problems"] == 1.0
    assert result.metrics["best_of/3/reward/sentiment"] == pytest.approx(-0.5, abs=1e-12)


def test_completions_are_drawn_from_the_policy_itself_whatever_the_runs_sampling() -> None:
    context = policy()
    reward_kl(samples=3, max_new_tokens=5).run(context)
    assert context.params == SamplingParams(5, n=3, stop=("#",), seed=3, step=0)
    assert context.params is not None and not context.params.truncates_support


def test_the_scorer_sees_the_sampled_ids_and_empty_completions_count_nothing() -> None:
    seen: list[Sequence[Sample]] = []

    def score(samples: Sequence[Sample]) -> Scores:
        seen.append(samples)
        return Scores([[-1.0] * len(s.completion_ids) for s in samples])

    def reference(samples: Sequence[Sample]) -> Scores:
        return Scores([[-2.0] * len(s.completion_ids) for s in samples])

    context = policy(tokens=((4, 5), ()), score=score, reference_score=reference)
    result = reward_kl(samples=2).run(context)
    assert seen == [[Sample((1, 2), (4, 5), (True,) * 2), Sample((1, 3), (4, 5), (True,) * 2)]]
    assert [record.values["kl"] for record in result.records] == [2.0, 0.0, 2.0, 0.0]


def test_policies_compare_by_gold_on_the_same_prompts(tmp_path: object) -> None:
    task = reward_kl(samples=3, select_by="rm", gold="sentiment")
    first = task.run(policy())
    second = replace(
        first,
        records=tuple(
            replace(
                r, values={k: v + 0.25 * (k == "reward/sentiment") for k, v in r.values.items()}
            )
            for r in first.records
        ),
        metrics={**first.metrics, "reward/sentiment": first.metrics["reward/sentiment"] + 0.25},
    )
    comparison = compare({"sft": first, "ppo": second})
    assert comparison.metric == "reward/sentiment"
    assert comparison.changes[0].difference == pytest.approx(0.25, abs=1e-12)
    assert comparison.changes[0].p_value == pytest.approx(0.5, abs=1e-12)  # two prompts: 2 of 4
    assert comparison.models[0].samples == 5
    first.save(f"{tmp_path}/one")
    assert EvalResult.load(f"{tmp_path}/one") == first
    unlabelled = {name: replace(one, labels={}) for name, one in (("a", first), ("b", second))}
    assert compare(unlabelled).metric == "reward"


def test_what_a_reward_kl_evaluation_lacks_is_named() -> None:
    with pytest.raises(UserInputError, match="no held-out prompts"):
        reward_kl().run(policy(prompts=()))
    with pytest.raises(UserInputError, match=r"compare\.reference"):
        reward_kl().run(policy(reference_score=None))
    with pytest.raises(UserInputError, match="gold is 'sentimint'"):
        reward_kl(samples=3, gold="sentimint").run(policy())
    with pytest.raises(UserInputError, match="select_by is 'x'"):
        reward_kl(samples=3, select_by="x").run(policy())
    with pytest.raises(UserInputError, match="best_of needs select_by"):
        reward_kl(samples=3, best_of=[2]).run(policy())
    with pytest.raises(UserInputError, match="best of 9"):
        reward_kl(samples=8, best_of=[9])
    with pytest.raises(UserInputError, match="samples is 0"):
        reward_kl(samples=0)
    infinite = Scores([[-1.0, -2.0, -math.inf, -0.1]] * 6)
    with pytest.raises(AlignmentError, match="prompt 7, sample 0"):
        reward_kl(samples=3).run(policy(reference_score=lambda samples: infinite))
