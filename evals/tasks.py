"""The tasks that grade sampled completions and measure the loss on held-out samples.

Tasks are plug-ins of kind "task": a factory takes the options as keyword arguments and makes an
object whose `run(context)` returns an `EvalResult`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from alignment.types import Outcome, Sample, SamplingParams, UserInputError
from evals.context import Task, TaskContext, TokenScores, nothing_held_out
from evals.results import EvalRecord, EvalResult
from evals.sampled import graded_record, require_prompts, require_rewards, sample_and_grade
from evals.statistics import ratio_estimate
from evals.summary import summarize_graded

__all__ = [
    "HeldOutLossTask",
    "Task",
    "TaskContext",
    "TokenScores",
    "VerifiableTask",
    "held_out_loss",
    "verifiable",
]


@dataclass(frozen=True, slots=True)
class VerifiableTask:
    """Sample held-out prompts and grade the completions with the run's rewards."""

    samples: int
    ks: tuple[int, ...]
    temperature: float | None
    max_new_tokens: int | None
    prompts: int | None

    def run(self, context: TaskContext) -> EvalResult:
        """Metrics as in `evals.summary.summarize_graded`.

        The sampling seed is the evaluation's and the step counter is 0, whatever the training step:
        base, tuned and trained models are compared with the same random numbers.
        """
        prompts = list(context.prompts)[: self.prompts]
        require_prompts("verifiable", len(prompts), context.why_not.get("prompts"))
        params = self.sampling(context)
        records = tuple(graded_record(item) for item in sample_and_grade(context, prompts, params))
        metrics, intervals = summarize_graded(records, self.ks)
        return EvalResult("verifiable", records, metrics, intervals)

    def check_needs(
        self, *, rewards: Sequence[str], held_out: int, reference: bool, ranks_alone: bool
    ) -> None:
        """See `evals.context.Task`."""
        require_prompts("verifiable", held_out)
        require_rewards("verifiable", rewards)

    def sampling(self, context: TaskContext) -> SamplingParams:
        """The run's sampling with this task's overrides and fixed random counters."""
        base = context.sampling
        return replace(
            base,
            n=self.samples,
            temperature=base.temperature if self.temperature is None else self.temperature,
            max_new_tokens=self.max_new_tokens or base.max_new_tokens,
            seed=context.seed,
            step=0,
        )


def verifiable(
    samples: int = 8,
    ks: Sequence[int] = (1,),
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    prompts: int | None = None,
) -> VerifiableTask:
    """Accuracy, pass@k and reward of sampled completions on the held-out prompts.

    Args:
        samples: completions per prompt.
        ks: the k of each pass@k to report, none above `samples`.
        temperature: overrides the run's.
        max_new_tokens: overrides the run's.
        prompts: use only the first so many held-out prompts.

    Raises:
        UserInputError: options that contradict each other.
    """
    at_least_one = {"samples": samples, "max_new_tokens": max_new_tokens, "prompts": prompts}
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserInputError(f"task 'verifiable': {name} is {value}; it must be at least 1")
    for k in ks:
        if not 1 <= k <= samples:
            raise UserInputError(
                f"task 'verifiable': pass@{k} needs 1 <= k <= samples, and samples is {samples}; "
                f"raise samples or take {k} out of ks"
            )
    if temperature is not None and temperature < 0:
        raise UserInputError(
            f"task 'verifiable': temperature is {temperature}; give 0 (greedy) or more"
        )
    if temperature == 0 and samples > 1:
        raise UserInputError(
            f"task 'verifiable': temperature 0 makes the {samples} samples of a prompt equal; "
            "set samples: 1 or a higher temperature"
        )
    return VerifiableTask(samples, tuple(ks), temperature, max_new_tokens, prompts)


_NO_SAMPLES = (
    "task 'held_out_loss' has no held-out samples with completion tokens to predict; give the "
    "run's data a held-out part"
)


@dataclass(frozen=True, slots=True)
class HeldOutLossTask:
    """Loss, perplexity and token accuracy on the held-out supervised samples."""

    limit: int | None

    def check_needs(
        self, *, rewards: Sequence[str], held_out: int, reference: bool, ranks_alone: bool
    ) -> None:
        """See `evals.context.Task`."""
        if not held_out:
            raise UserInputError(_NO_SAMPLES)

    def run(self, context: TaskContext) -> EvalResult:
        """Global means over the tokens that `loss_mask` counts, in nats per token.

        perplexity = exp(loss). Intervals are clustered by sample. Each record's `reward` is the
        mean log-probability per token of that sample, and its `n_tokens` the tokens that count.
        """
        samples = list(context.samples)[: self.limit]
        if not any(sample.n_loss_tokens for sample in samples):
            raise nothing_held_out(
                context,
                "samples",
                _NO_SAMPLES,
            )
        scores = context.score(samples)
        rows = [
            _token_sums(sample, logprobs, hits)
            for sample, logprobs, hits in zip(
                samples, scores.logprobs, scores.greedy_correct, strict=True
            )
        ]
        records = tuple(
            _loss_record(index, total, tokens)
            for index, (total, _, tokens) in enumerate(rows)
            if tokens
        )
        metrics, intervals = _summarize_tokens(rows)
        return EvalResult("held_out_loss", records, metrics, intervals)


def held_out_loss(samples: int | None = None) -> HeldOutLossTask:
    """Loss, perplexity and token accuracy on the held-out samples.

    Args:
        samples: use only the first so many held-out samples.

    Raises:
        UserInputError: `samples` is below one.
    """
    if samples is not None and samples < 1:
        raise UserInputError(f"task 'held_out_loss': samples is {samples}; it must be at least 1")
    return HeldOutLossTask(samples)


def _token_sums(
    sample: Sample, logprobs: Sequence[float], greedy_correct: Sequence[bool]
) -> tuple[float, int, int]:
    """Sum of log-probabilities, greedy hits and number of the tokens that count."""
    counted = list(zip(logprobs, greedy_correct, sample.loss_mask, strict=True))
    total = math.fsum(logprob for logprob, _, counts in counted if counts)
    return total, sum(bool(hit) for _, hit, counts in counted if counts), sample.n_loss_tokens


def _loss_record(index: int, total: float, tokens: int) -> EvalRecord:
    return EvalRecord(
        problem_id=index,
        sample_index=0,
        outcome=Outcome.SCORED,
        reward=total / tokens,
        prompt_text="",
        completion_text="",
        n_tokens=tokens,
        stop_reason=None,
    )


def _summarize_tokens(
    rows: Sequence[tuple[float, int, int]],
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    tokens = [count for _, _, count in rows]
    loss = ratio_estimate([-total for total, _, _ in rows], tokens)
    hits = ratio_estimate([hit for _, hit, _ in rows], tokens)
    metrics = {
        "loss": loss.value,
        "perplexity": math.exp(min(loss.value, 700.0)),
        "token_accuracy": hits.value,
        "samples": float(len(rows)),
        "tokens": float(sum(tokens)),
    }
    intervals = {}
    if math.isfinite(loss.low):
        intervals = {
            "loss": (loss.low, loss.high),
            "perplexity": (math.exp(min(loss.low, 700.0)), math.exp(min(loss.high, 700.0))),
            "token_accuracy": (max(hits.low, 0.0), min(hits.high, 1.0)),
        }
    return metrics, intervals
