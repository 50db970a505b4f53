"""Task `process`: how well a process reward model judges the steps of held-out solutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from alignment.types import GOOD_STEP, AlignmentError, Outcome, SteppedSample, UserInputError
from evals.context import TaskContext, nothing_held_out
from evals.results import EvalRecord, EvalResult
from evals.statistics import Estimate, average_ranks, clustered_proportion
from evals.summary import Intervals, Metrics

TASK = "process"


_NO_SCORES = f"task '{TASK}' needs a model that scores steps; evaluate a process reward model"


@dataclass(frozen=True, slots=True)
class ProcessTask:
    """Score the steps of held-out solutions."""

    samples: int | None

    def check_needs(
        self, *, rewards: Sequence[str], held_out: int, reference: bool, ranks_alone: bool
    ) -> None:
        """See `evals.context.Task`: a pipeline compares policies, which score no steps."""
        raise UserInputError(_NO_SCORES)

    def run(self, context: TaskContext) -> EvalResult:
        """Steps judged right, ranking of steps, and where the first error is found.

        | metric | meaning |
        |---|---|
        | `step_accuracy` | share of steps judged as labelled (probability from 0.5: good) |
        | `step_auc` | chance that a good step scores higher than a bad one |
        | `good_steps` | share of steps labelled good: what judging all of them good would get |
        | `first_error_accuracy` | share of solutions whose first bad step, or its absence, \
is found |
        | `first_error_erroneous`, `first_error_correct` | the same, over solutions with and \
without a bad step |
        | `first_error_f1` | harmonic mean of those two, ProcessBench (Zheng et al. 2024) |
        | `samples`, `steps` | how many |

        Intervals are over solutions. A record is a solution: `correct` where its first error was
        found, its reward the share of its steps judged right.
        """
        samples = [one for one in context.steps if one.labels][: self.samples]
        if not samples:
            raise nothing_held_out(
                context,
                "steps",
                f"task '{TASK}' has no held-out samples with labelled steps; give the run's data "
                "steps and a held-out part",
            )
        if context.step_scores is None:
            raise UserInputError(_NO_SCORES)
        logits = context.step_scores(samples)
        _check(samples, logits)
        metrics, intervals = _summarize(samples, logits)
        return EvalResult(TASK, _records(samples, logits), metrics, intervals)


def process(samples: int | None = None) -> ProcessTask:
    """Step accuracy, ranking and first-error detection of a process reward model.

    Args:
        samples: use only the first so many held-out solutions.

    Raises:
        UserInputError: `samples` is below one.
    """
    if samples is not None and samples < 1:
        raise UserInputError(f"task '{TASK}': samples is {samples}; it must be at least 1")
    return ProcessTask(samples)


def area_under_curve(scores: npt.ArrayLike, good: npt.ArrayLike) -> float:
    """Chance that a good one scores higher than a bad one, ties counting half; in [0, 1].

    The area under the ROC curve, as Mann and Whitney's U over the number of (good, bad) couples.

    Args:
        scores: `[N]`.
        good: `[N]` of bool.

    Returns:
        NaN where only one of the two classes is there.
    """
    marks = np.asarray(good, dtype=bool)
    n_good, n_bad = int(marks.sum()), int((~marks).sum())
    if not n_good or not n_bad:
        return float("nan")
    rank_sum = float(average_ranks(scores)[marks].sum())
    return (rank_sum - n_good * (n_good + 1) / 2) / (n_good * n_bad)


def first_error(good: Sequence[bool]) -> int | None:
    """Place of the first step that is not good; None where all are."""
    return next((place for place, one in enumerate(good) if not one), None)


def _check(samples: Sequence[SteppedSample], logits: Sequence[Sequence[float]]) -> None:
    wanted, got = [len(one.labels) for one in samples], [len(row) for row in logits]
    if wanted != got:
        raise AlignmentError(
            f"the model gave {got[:5]}... step scores for samples of {wanted[:5]}... steps; give "
            "one per labelled step"
        )
    for index, row in enumerate(logits):
        if not all(map(math.isfinite, row)):
            raise AlignmentError(
                f"a step of sample {index} was scored {list(row)}; the model or its head is broken"
            )


def _labelled(sample: SteppedSample) -> list[bool]:
    return [label >= GOOD_STEP for label in sample.labels]


def _judged(row: Sequence[float]) -> list[bool]:
    return [bool(special.expit(logit) >= GOOD_STEP) for logit in row]


def _records(
    samples: Sequence[SteppedSample], logits: Sequence[Sequence[float]]
) -> tuple[EvalRecord, ...]:
    records = []
    for index, (sample, row) in enumerate(zip(samples, logits, strict=True)):
        labelled, judged = _labelled(sample), _judged(row)
        found = first_error(labelled) == first_error(judged)
        records.append(
            EvalRecord(
                problem_id=index,
                sample_index=0,
                outcome=Outcome.CORRECT if found else Outcome.WRONG,
                reward=float(np.mean([a == b for a, b in zip(labelled, judged, strict=True)])),
                prompt_text="",
                completion_text="",
                n_tokens=len(sample.sample.completion_ids),
                stop_reason=None,
            )
        )
    return tuple(records)


def _summarize(
    samples: Sequence[SteppedSample], logits: Sequence[Sequence[float]]
) -> tuple[Metrics, Intervals]:
    labelled, judged = [_labelled(one) for one in samples], [_judged(row) for row in logits]
    solution = [index for index, row in enumerate(labelled) for _ in row]
    good = [label for row in labelled for label in row]
    right = [a == b for a, b in zip(good, (j for row in judged for j in row), strict=True)]
    firsts = [first_error(row) for row in labelled]
    found = [first == first_error(row) for first, row in zip(firsts, judged, strict=True)]
    estimates = {
        "step_accuracy": clustered_proportion(right, solution),
        "good_steps": clustered_proportion(good, solution),
        "first_error_accuracy": _share(found),
        "first_error_erroneous": _share(
            [f for f, p in zip(found, firsts, strict=True) if p is not None]
        ),
        "first_error_correct": _share([f for f, p in zip(found, firsts, strict=True) if p is None]),
    }
    present = {name: one for name, one in estimates.items() if one.n}
    metrics: Metrics = {name: one.value for name, one in present.items()}
    area = area_under_curve([logit for row in logits for logit in row], good)
    if math.isfinite(area):
        metrics["step_auc"] = area
    if {"first_error_erroneous", "first_error_correct"} <= present.keys():
        metrics["first_error_f1"] = _harmonic_mean(
            metrics["first_error_erroneous"], metrics["first_error_correct"]
        )
    metrics |= {"samples": float(len(samples)), "steps": float(len(good))}
    return metrics, {name: (one.low, one.high) for name, one in present.items()}


def _share(hits: Sequence[bool]) -> Estimate:
    return clustered_proportion(hits, range(len(hits)))


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
