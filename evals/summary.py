"""From graded records to metrics with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from alignment.types import Outcome, StopReason
from evals.results import EvalRecord
from evals.statistics import (
    Estimate,
    mean_estimate,
    pass_at_k,
    problem_means,
    proportion_estimate,
)

Metrics = dict[str, float]
Intervals = dict[str, tuple[float, float]]

FAILURES = tuple(outcome for outcome in Outcome if outcome.is_failure)
# Outcomes that have a notion of right and wrong.
GRADED = frozenset({Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE})


def correctness(record: EvalRecord) -> float | None:
    """1 correct, 0 wrong or unparseable, None where the grader failed or nothing is right."""
    return float(record.outcome is Outcome.CORRECT) if record.outcome in GRADED else None


def summarize_graded(
    records: Sequence[EvalRecord], ks: Sequence[int] = (1,)
) -> tuple[Metrics, Intervals]:
    """Metrics of sampled, graded completions.

    | metric | meaning |
    |---|---|
    | `accuracy` | mean over problems of the share of graded samples that are correct |
    | `pass@k` | unbiased estimate over problems with at least k graded samples |
    | `reward` | mean over problems of the mean reward of scored samples |
    | `cut_off` | share of samples stopped by the length limit |
    | `length` | mean completion tokens |
    | `outcome/<class>` | share of all samples |
    | `unscorable/<class>` | number of samples whose grader failed: in no accuracy, no reward |
    | `problems`, `samples` | counts |

    Every problem weighs the same, however many of its samples could be graded.
    """
    metrics: Metrics = {}
    intervals: Intervals = {}

    def add(name: str, estimate: Estimate) -> None:
        if math.isfinite(estimate.value):
            metrics[name] = estimate.value
        if math.isfinite(estimate.low) and math.isfinite(estimate.high):
            intervals[name] = (estimate.low, estimate.high)

    add("accuracy", _share(records, correctness))
    for k in ks:
        add(f"pass@{k}", _pass_at(records, k))
    add("reward", _mean(records, lambda record: record.reward))
    if any(record.stop_reason is not None for record in records):
        add("cut_off", _share(records, lambda r: float(r.stop_reason is StopReason.LENGTH)))
    add("length", _mean(records, lambda record: float(record.n_tokens)))
    seen = {record.outcome for record in records}
    for outcome in (outcome for outcome in Outcome if outcome in seen):
        add(f"outcome/{outcome.value}", _share(records, _is_outcome(outcome)))
    for failure in FAILURES:
        count = sum(record.outcome is failure for record in records)
        metrics[f"unscorable/{failure.value}"] = float(count)
    metrics["problems"] = float(len({record.problem_id for record in records}))
    metrics["samples"] = float(len(records))
    return metrics, intervals


Value = Callable[[EvalRecord], float | None]


def by_problem(
    records: Sequence[EvalRecord], value: Value
) -> tuple[list[object], list[float], int]:
    """Problems that have a value, the mean value of each, and how many samples had one."""
    found = [(r.problem_id, v) for r in records if (v := value(r)) is not None]
    if not found:
        return [], [], 0
    problems, means, _ = problem_means([v for _, v in found], [p for p, _ in found])
    return list(problems), [float(mean) for mean in means], len(found)


def _share(records: Sequence[EvalRecord], value: Value) -> Estimate:
    _, means, draws = by_problem(records, value)
    return proportion_estimate(means, draws=draws)


def _mean(records: Sequence[EvalRecord], value: Value) -> Estimate:
    return mean_estimate(by_problem(records, value)[1])


def _is_outcome(outcome: Outcome) -> Value:
    return lambda record: float(record.outcome is outcome)


def _pass_at(records: Sequence[EvalRecord], k: int) -> Estimate:
    graded = [(r.problem_id, v) for r in records if (v := correctness(r)) is not None]
    if not graded:
        return proportion_estimate([], draws=0)
    _, means, counts = problem_means([v for _, v in graded], [p for p, _ in graded])
    enough = counts >= k
    solved = np.rint(means * counts)
    values = pass_at_k(counts[enough], solved[enough], k)
    # k draws make one trial: with k samples per problem, each problem is one trial.
    return proportion_estimate(values, draws=int(np.sum(counts[enough] // k)))
