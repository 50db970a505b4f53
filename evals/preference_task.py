"""Task `preference`: how well a model ranks held-out pairs, and whether it knows how well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.types import AlignmentError, Outcome, PairBatch, UserInputError
from evals.calibration import (
    BINS,
    LengthBias,
    ReliabilityBin,
    brier_terms,
    expected_calibration_error,
    length_bias,
    preference_probabilities,
    reliability_bins,
)
from evals.context import TaskContext, nothing_held_out
from evals.results import EvalRecord, EvalResult
from evals.statistics import (
    Estimate,
    FloatArray,
    clustered_proportion,
    problem_means,
    ratio_estimate,
)
from evals.summary import Intervals, Metrics

TASK = "preference"


@dataclass(frozen=True, slots=True)
class PreferenceTask:
    """Score held-out preference pairs."""

    pairs: int | None

    def run(self, context: TaskContext) -> EvalResult:
        """Accuracy, margin, calibration and length correlation.

        | metric | meaning |
        |---|---|
        | `accuracy` | share of pairs whose chosen side has the higher score; a tie is no hit |
        | `ties` | share of pairs scored alike |
        | `margin` | mean of chosen minus rejected score |
        | `ece` | `evals.calibration.expected_calibration_error` of p = sigmoid(margin), 10 bins |
        | `brier` | mean of (1 - p)^2 |
        | `length_correlation` | Pearson, of score difference with length difference in tokens |
        | `length_rank_correlation` | the same, Spearman |
        | `longer_wins`, `longer_chosen` | as in `evals.calibration.LengthBias` |
        | `pairs` | how many |

        There is no `ece` and no `brier` where p is no probability that the model was trained for:
        of a policy whose loss is not logistic (`alignment.losses.LOGISTIC_KINDS`).

        Intervals are clustered by prompt: pairs of one prompt are not independent. A record is a
        pair; its outcome is `correct` or `wrong`, its reward the margin, and `values` holds both
        scores and lengths.
        """
        pairs = self._pairs(context)
        _require_scores(context.pair_scores is not None)
        assert context.pair_scores is not None
        chosen, rejected = context.pair_scores(pairs)
        if not len(chosen) == len(rejected) == len(pairs):
            raise AlignmentError(
                f"{len(pairs)} pairs got {len(chosen)} chosen and {len(rejected)} rejected scores"
            )
        probabilities = preference_probabilities(chosen, rejected)  # refuses what is not finite
        records = _records(pairs, chosen, rejected)
        metrics, intervals = _summarize(records, _prompts(pairs))
        if context.pair_scores_are_logits:
            found = _calibration(probabilities, _prompts(pairs))
            metrics, intervals = metrics | found[0], intervals | found[1]
        return EvalResult(TASK, records, metrics, intervals)

    def check_needs(
        self, *, rewards: Sequence[str], held_out: int, reference: bool, ranks_alone: bool
    ) -> None:
        """See `evals.context.Task`."""
        if not held_out:
            raise UserInputError(_NO_PAIRS)
        _require_scores(reference or ranks_alone)

    def _pairs(self, context: TaskContext) -> PairBatch:
        pairs = context.pairs
        if pairs is None or len(pairs) == 0:
            raise nothing_held_out(
                context,
                "pairs",
                _NO_PAIRS,
            )
        n = self.pairs
        return PairBatch(pairs.chosen[:n], pairs.rejected[:n], pairs.margins[:n])


_NO_PAIRS = (
    f"task '{TASK}' has no held-out preference pairs; give the run's data pairs and a held-out part"
)


def _require_scores(there_are_some: bool) -> None:
    if not there_are_some:
        raise UserInputError(
            f"task '{TASK}' needs a model that scores pairs: a reward model, or a policy with "
            "a reference to compare with, unless it learned by a loss without one (simpo, cpo, "
            "orpo); give align eval a --reference MODEL, the recipe a model.reference, or a "
            "pipeline a compare.reference"
        )


def preference(pairs: int | None = None) -> PreferenceTask:
    """Accuracy, calibration and length correlation on held-out preference pairs.

    Args:
        pairs: use only the first so many held-out pairs.

    Raises:
        UserInputError: `pairs` is below one.
    """
    if pairs is not None and pairs < 1:
        raise UserInputError(f"task '{TASK}': pairs is {pairs}; it must be at least 1")
    return PreferenceTask(pairs)


def result_bins(result: EvalResult, *, bins: int = BINS) -> list[ReliabilityBin]:
    """The reliability bins of a saved result of this task; none where it has no pairs."""
    margins = [record.reward for record in result.records if record.reward is not None]
    return reliability_bins(preference_probabilities(margins, [0.0] * len(margins)), bins=bins)


def _prompts(pairs: PairBatch) -> list[tuple[int, ...]]:
    return [sample.prompt_ids for sample in pairs.chosen]


def _records(
    pairs: PairBatch, chosen: Sequence[float], rejected: Sequence[float]
) -> tuple[EvalRecord, ...]:
    records = []
    for index, (winner, loser) in enumerate(zip(pairs.chosen, pairs.rejected, strict=True)):
        lengths = len(winner.completion_ids), len(loser.completion_ids)
        values = {
            "score/chosen": float(chosen[index]),
            "score/rejected": float(rejected[index]),
            "length/chosen": float(lengths[0]),
            "length/rejected": float(lengths[1]),
        }
        records.append(
            EvalRecord(
                problem_id=index,
                sample_index=0,
                outcome=Outcome.CORRECT if chosen[index] > rejected[index] else Outcome.WRONG,
                reward=float(chosen[index]) - float(rejected[index]),
                prompt_text="",
                completion_text="",
                n_tokens=sum(lengths),
                stop_reason=None,
                values=values,
            )
        )
    return tuple(records)


def _summarize(
    records: Sequence[EvalRecord], prompts: Sequence[object]
) -> tuple[Metrics, Intervals]:
    margins = np.array([record.reward for record in records], dtype=np.float64)
    hits = (margins > 0).astype(np.float64)
    estimates = {
        "accuracy": clustered_proportion(hits, prompts),
        "margin": _mean(margins, prompts),
    }
    metrics, intervals = _values(estimates)
    metrics["ties"] = float(np.mean(margins == 0))
    metrics |= _length_metrics(records, margins)
    metrics["pairs"] = float(len(records))
    return metrics, intervals


def _calibration(probabilities: FloatArray, prompts: Sequence[object]) -> tuple[Metrics, Intervals]:
    metrics, intervals = _values({"brier": _mean(brier_terms(probabilities), prompts)})
    metrics["ece"] = expected_calibration_error(reliability_bins(probabilities))
    return metrics, intervals


def _values(estimates: Mapping[str, Estimate]) -> tuple[Metrics, Intervals]:
    metrics: Metrics = {name: one.value for name, one in estimates.items()}
    intervals: Intervals = {
        name: (one.low, one.high) for name, one in estimates.items() if math.isfinite(one.low)
    }
    return metrics, intervals


def _mean(values: FloatArray, prompts: Sequence[object]) -> Estimate:
    """Mean over pairs with an interval clustered by prompt."""
    _, means, counts = problem_means(values, prompts)
    return ratio_estimate(means * counts, counts)


def _length_metrics(records: Sequence[EvalRecord], margins: FloatArray) -> Metrics:
    lengths = [r.values["length/chosen"] - r.values["length/rejected"] for r in records]
    bias: LengthBias = length_bias(margins, lengths)
    found = {
        "length_correlation": bias.pearson,
        "length_rank_correlation": bias.spearman,
        "longer_wins": bias.longer_wins,
        "longer_chosen": bias.longer_chosen,
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}
