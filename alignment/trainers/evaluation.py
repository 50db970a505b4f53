"""Running evaluation tasks: during training, and on a finished run or any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import registry
from alignment.config.options import validate_options
from alignment.config.schema import TaskConfig
from alignment.modeling.policy import PolicyWithReference
from alignment.rollout.engine import RolloutEngine
from alignment.trainers.context import TrainingContext
from alignment.trainers.sampling import sampling_params
from alignment.types import (
    AlignmentError,
    Completion,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per sample, one entry per completion token: log-probability, and whether it is the argmax."""

    logprobs: list[list[float]]
    greedy_correct: list[list[bool]]


@dataclass(frozen=True, slots=True)
class EvalContext:
    """What a task may use; the protocol it satisfies is the tasks'."""

    engine: RolloutEngine
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    grade: Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]]
    sampling: SamplingParams
    seed: int
    score: Callable[[Sequence[Sample]], TokenScores]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The tasks of a recipe, run on the current policy; results are saved in the run directory."""

    context: TrainingContext
    directory: Path

    def run(self, step: int) -> dict[str, float]:
        """Evaluate, save `<task>-step-NNNNNN`, and return `eval/<task>/<metric>`.

        Evaluation draws no random number that training uses: sampling is counter-based.
        """
        metrics: dict[str, float] = {}
        if not self.context.distributed.is_main:
            return metrics
        for config in self.context.recipe.eval.tasks:
            name = config.name or config.type
            result = make_task(config).run(eval_context(self.context))
            result.save(self.directory / f"{name}-step-{step:06d}.json")
            metrics |= {f"eval/{name}/{key}": value for key, value in result.metrics.items()}
        return metrics


def make_task(config: TaskConfig) -> Any:
    """The task of a recipe's entry."""
    factory = registry.get("task", config.type)
    return factory(**validate_options(factory, config.options))


def eval_context(context: TrainingContext) -> EvalContext:
    """What tasks see of a run."""
    recipe = context.recipe
    if recipe.rollout is None:
        sampling = SamplingParams(max_new_tokens=1)
    else:
        sampling = sampling_params(recipe.rollout, n=1, seed=recipe.run.seed, step=0)
    budget = recipe.optim.micro_batch_tokens
    return EvalContext(
        engine=context.engine,
        prompts=context.held_out_prompts,
        samples=context.held_out_samples,
        grade=context.rewards.grade if context.rewards is not None else _no_rewards,
        sampling=sampling,
        seed=recipe.run.seed,
        score=lambda samples: token_scores(context.policy, samples, budget),
    )


def token_scores(
    policy: PolicyWithReference, samples: Sequence[Sample], token_budget: int
) -> TokenScores:
    """Log-probabilities and greedy hits of given samples under the policy."""
    logprobs: list[list[float]] = [[] for _ in samples]
    greedy: list[list[bool]] = [[] for _ in samples]
    for scores, batch in policy.score_all(samples, token_budget, greedy=True):
        assert scores.greedy is not None
        for row, i in enumerate(batch):
            length = len(samples[i].completion_ids)
            logprobs[i] = scores.logprobs[row, :length].tolist()
            greedy[i] = scores.greedy[row, :length].tolist()
    return TokenScores(logprobs, greedy)


def _no_rewards(_: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
    raise AlignmentError(
        "the task grades completions, but the recipe has no rewards; list the verifier under "
        "rewards"
    )
