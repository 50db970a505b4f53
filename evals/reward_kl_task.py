"""Task `reward_kl`: what a policy earns, and how far it went from the reference for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from alignment.types import (
    AlignmentError,
    RewardedCompletion,
    Sample,
    SamplingParams,
    UserInputError,
)
from evals.best_of import best_of_kl_bound, best_of_mean
from evals.context import TaskContext
from evals.results import EvalRecord, EvalResult
from evals.sampled import graded_record, require_prompts, require_rewards, sample_and_grade
from evals.statistics import Estimate, FloatArray, mean_estimate
from evals.summary import Intervals, Metrics, by_problem, summarize_graded

TASK = "reward_kl"
PART = "reward/"
"""Prefix of a reward's name among a result's metrics and a record's values."""
BEST_OF = "best_of/"


@dataclass(frozen=True, slots=True)
class RewardKLTask:
    """Sample held-out prompts, grade the completions, and compare with the reference."""

    samples: int
    best_of: tuple[int, ...]
    select_by: str | None
    gold: str | None
    max_new_tokens: int | None
    prompts: int | None

    def run(self, context: TaskContext) -> EvalResult:
        """Rewards, KL(policy || reference), and what best-of-n of the same samples would earn.

        | metric | meaning |
        |---|---|
        | `reward` | mean over prompts of the weighted sum of rewards |
        | `reward/<name>` | the same of one reward, before its weight |
        | `reward_std`, `reward_std/<name>` | their standard deviations over all completions |
        | `kl` | KL(policy || reference) of a whole completion, nats: mean of the summed k1 |
        | `kl_k3` | the same from the summed k3, which has less variance |
        | `sqrt_kl` | square root of `kl`, 0 where the estimate is negative |
        | `distinct_2` | distinct token bigrams of a prompt's completions, as a share of all of \
them; mean over prompts. Falls with `samples` |
        | `best_of/<n>/reward/<name>` | expected reward of the best of n by `select_by` |
        | `best_of/<n>/kl_bound` | upper bound of its KL from the policy sampled, nats |
        | `best_of/<n>/problems` | prompts with at least n completions that every reward scored |

        and those of `evals.summary.summarize_graded`. With d = log p - log p_ref of a token, k1 is
        d and k3 is exp(-d) - 1 + d; both sums are unbiased, because completions are drawn from the
        policy itself: at temperature 1 and from the whole distribution, whatever the run's
        sampling. Every prompt weighs the same, and intervals are over prompts. The sampling seed is
        the evaluation's and the step counter 0, so that models are compared on the same random
        numbers.

        Records hold each reward, `kl` and `kl_k3` in `values`. Labels: `gold` and `proxy`, the
        metrics of the rewards `gold` and `select_by`.

        Raises:
            UserInputError: no held-out prompts, no reference, or no reward of a given name.
        """
        prompts = list(context.prompts)[: self.prompts]
        require_prompts(TASK, len(prompts), context.why_not.get("prompts"))
        _require_reference(context.reference_score is not None)
        graded = sample_and_grade(context, prompts, self.sampling(context))
        parts = _part_names(graded)
        proxy, gold = self._proxy(parts), self._gold(parts)
        ratios = _log_ratios(context, graded)
        records = tuple(_record(*row) for row in zip(graded, ratios, strict=True))
        metrics, intervals = summarize_graded(records, ks=())
        for found in (
            _part_metrics(records, parts),
            _divergence_metrics(records),
            _diversity_metrics(graded),
            _best_of_metrics(records, parts, proxy, self.best_of),
        ):
            metrics |= found[0]
            intervals |= found[1]
        labels = {"proxy": proxy, "gold": gold}
        named = {label: PART + name for label, name in labels.items() if name is not None}
        return EvalResult(TASK, records, metrics, intervals, named)

    def check_needs(
        self, *, rewards: Sequence[str], held_out: int, reference: bool, ranks_alone: bool
    ) -> None:
        """See `evals.context.Task`."""
        require_prompts(TASK, held_out)
        _require_reference(reference)
        require_rewards(TASK, rewards)
        self._proxy(rewards)
        self._gold(rewards)

    def sampling(self, context: TaskContext) -> SamplingParams:
        """The run's lengths and stop strings; the policy's own distribution; fixed counters."""
        return replace(
            context.sampling,
            n=self.samples,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            max_new_tokens=self.max_new_tokens or context.sampling.max_new_tokens,
            seed=context.seed,
            step=0,
        )

    def _proxy(self, parts: Sequence[str]) -> str | None:
        """The reward to select by; a single one needs no naming."""
        if self.select_by is not None:
            return _known("select_by", self.select_by, parts)
        if self.best_of and len(parts) != 1:
            raise UserInputError(
                f"task '{TASK}': best_of needs select_by where there are several rewards; set it "
                f"to one of {', '.join(parts)}"
            )
        return parts[0] if self.best_of else None

    def _gold(self, parts: Sequence[str]) -> str | None:
        return None if self.gold is None else _known("gold", self.gold, parts)


def reward_kl(
    samples: int = 8,
    best_of: Sequence[int] = (),
    select_by: str | None = None,
    gold: str | None = None,
    max_new_tokens: int | None = None,
    prompts: int | None = None,
) -> RewardKLTask:
    """Rewards of sampled completions against their KL from the reference.

    Args:
        samples: completions per prompt.
        best_of: the n of each best-of-n to estimate from the same samples, none above `samples`.
        select_by: name of the reward that best-of-n selects by and that training went by: the
            proxy.
        gold: name of the reward that is really wanted; models are compared by it. The weighted sum
            of rewards where it is not given.
        max_new_tokens: overrides the run's.
        prompts: use only the first so many held-out prompts.

    Raises:
        UserInputError: options that contradict each other.
    """
    at_least_one = {"samples": samples, "max_new_tokens": max_new_tokens, "prompts": prompts}
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserInputError(f"task '{TASK}': {name} is {value}; it must be at least 1")
    for n in best_of:
        if not 1 <= n <= samples:
            raise UserInputError(
                f"task '{TASK}': best of {n} needs 1 <= n <= samples, and samples is {samples}; "
                f"raise samples or take {n} out of best_of"
            )
    return RewardKLTask(samples, tuple(best_of), select_by, gold, max_new_tokens, prompts)


def deviation_of(metric: str) -> str:
    """The name of the standard deviation of a reward metric."""
    return metric.replace("reward", "reward_std", 1)


def _require_reference(there_is_one: bool) -> None:
    if not there_is_one:
        raise UserInputError(
            f"task '{TASK}' measures the distance from a reference and there is none; set "
            "compare.reference in a pipeline, a model.reference other than none in a run, or name "
            "one by align eval --reference MODEL"
        )


def _known(option: str, name: str, parts: Sequence[str]) -> str:
    if name not in parts:
        raise UserInputError(
            f"task '{TASK}': {option} is {name!r}, and the run's rewards are {', '.join(parts)}; "
            "name one of them"
        )
    return name


def _part_names(graded: Sequence[RewardedCompletion]) -> list[str]:
    return list(dict.fromkeys(name for item in graded for name in item.parts))


def _log_ratios(context: TaskContext, graded: Sequence[RewardedCompletion]) -> list[FloatArray]:
    """log p - log p_ref of every token of every completion, nats."""
    assert context.reference_score is not None
    samples = [
        Sample(item.prompt.token_ids, item.completion.token_ids, (True,) * n)
        for item in graded
        if (n := len(item.completion.token_ids))
    ]
    logprobs = context.score(samples).logprobs
    ref_logprobs = context.reference_score(samples).logprobs
    scored = iter(
        np.asarray(own, dtype=np.float64) - np.asarray(ref, dtype=np.float64)
        for own, ref in zip(logprobs, ref_logprobs, strict=True)
    )
    ratios = [next(scored) if item.completion.token_ids else np.zeros(0) for item in graded]
    for item, ratio in zip(graded, ratios, strict=True):
        if not np.isfinite(ratio).all():
            raise AlignmentError(
                f"a token of prompt {item.prompt.index}, sample {item.completion.sample_index} has "
                "no finite log-probability under the policy or the reference"
            )
    return ratios


def _record(item: RewardedCompletion, ratio: FloatArray) -> EvalRecord:
    parts = {PART + name: score.value for name, score in item.parts.items()}
    values = {name: value for name, value in parts.items() if value is not None}
    values["kl"] = float(ratio.sum())
    values["kl_k3"] = float((np.expm1(-ratio) + ratio).sum())
    return replace(graded_record(item), values=values)


def _summary(estimates: Mapping[str, Estimate]) -> tuple[Metrics, Intervals]:
    """Those of the estimates that exist."""
    metrics = {name: one.value for name, one in estimates.items() if math.isfinite(one.value)}
    intervals = {
        name: (one.low, one.high) for name, one in estimates.items() if math.isfinite(one.low)
    }
    return metrics, intervals


def _mean_of(records: Sequence[EvalRecord], name: str) -> Estimate:
    """Mean over prompts of the mean of one of the records' values."""
    return mean_estimate(by_problem(records, lambda record: record.values.get(name))[1])


def _part_metrics(records: Sequence[EvalRecord], parts: Sequence[str]) -> tuple[Metrics, Intervals]:
    metrics, intervals = _summary({PART + name: _mean_of(records, PART + name) for name in parts})
    columns = {name: [record.values.get(name) for record in records] for name in metrics}
    columns["reward"] = [record.reward for record in records]
    for name, column in columns.items():
        values = [value for value in column if value is not None]
        if len(values) > 1:
            metrics[deviation_of(name)] = float(np.std(values, ddof=1))
    return metrics, intervals


def _divergence_metrics(records: Sequence[EvalRecord]) -> tuple[Metrics, Intervals]:
    metrics, intervals = _summary({name: _mean_of(records, name) for name in ("kl", "kl_k3")})
    metrics["sqrt_kl"] = math.sqrt(max(metrics["kl"], 0.0))
    return metrics, intervals


def _diversity_metrics(graded: Sequence[RewardedCompletion]) -> tuple[Metrics, Intervals]:
    """After the distinct-2 of Li et al. (2016), by token ids and inside one prompt."""
    bigrams: dict[int, list[tuple[int, int]]] = {}
    for item in graded:
        bigrams.setdefault(item.prompt.index, []).extend(pairwise(item.completion.token_ids))
    shares = [len(set(found)) / len(found) for found in bigrams.values() if found]
    return _summary({"distinct_2": mean_estimate(shares)} if shares else {})


def _best_of_metrics(
    records: Sequence[EvalRecord], parts: Sequence[str], proxy: str | None, ns: Sequence[int]
) -> tuple[Metrics, Intervals]:
    """Expected rewards of best-of-n, over the prompts with at least n fully scored samples."""
    metrics: Metrics = {}
    intervals: Intervals = {}
    names = [PART + name for name in parts]
    by_prompt: dict[object, list[EvalRecord]] = {}
    for record in records:
        if all(name in record.values for name in names):
            by_prompt.setdefault(record.problem_id, []).append(record)
    for n in ns if proxy is not None else ():
        enough = [group for group in by_prompt.values() if len(group) >= n]
        metrics[f"{BEST_OF}{n}/problems"] = float(len(enough))
        metrics[f"{BEST_OF}{n}/kl_bound"] = best_of_kl_bound(n)
        estimates = {
            f"{BEST_OF}{n}/{name}": mean_estimate(
                [
                    best_of_mean(
                        [one.values[f"{PART}{proxy}"] for one in group],
                        [one.values[name] for one in group],
                        n,
                    )
                    for group in enough
                ]
            )
            for name in names
        }
        found = _summary(estimates)
        metrics |= found[0]
        intervals |= found[1]
    return metrics, intervals
