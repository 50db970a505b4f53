"""Running evaluation tasks: during training, and on a finished run or any model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alignment.activity import doing
from alignment.config.methods.base import DataForm
from alignment.config.model import ReferenceConfig
from alignment.config.options import resolve, validate_options
from alignment.config.schema import Recipe, TaskConfig
from alignment.distributed import Distributed
from alignment.modeling.heads import ScalarModel
from alignment.modeling.load import load_causal_lm
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.reference import Fixed, FrozenCopy
from alignment.modeling.scorer import choose_layout
from alignment.rollout.engine import RolloutEngine
from alignment.runs.events import EventLog
from alignment.trainers.context import TrainingContext
from alignment.trainers.sampling import sampling_params
from alignment.trainers.setup import assemble, in_process, load_parts
from alignment.types import (
    Completion,
    PairBatch,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
    SteppedSample,
    UserInputError,
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
    reference_score: Callable[[Sequence[Sample]], TokenScores] | None
    pairs: PairBatch | None
    pair_scores: Callable[[PairBatch], tuple[list[float], list[float]]] | None
    steps: Sequence[SteppedSample]
    step_scores: Callable[[Sequence[SteppedSample]], list[list[float]]] | None
    why_not: Mapping[DataForm, str]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The tasks of a recipe, run on the current policy; results are saved in the run directory."""

    context: TrainingContext
    directory: Path

    @doing("evaluation")
    def run(self, step: int) -> dict[str, float]:
        """Evaluate, save `<task>-step-NNNNNN`, and return `eval/<task>/<metric>`.

        Evaluation draws no random number that training uses: sampling is counter-based; and
        rewards keep nothing of it. Rank 0 evaluates alone; sharded weights are whole for that long.
        """
        tasks = self.context.recipe.eval.tasks
        if not tasks:
            return {}
        model = self.context.trained.model
        scalar = isinstance(model, ScalarModel)
        rewards = self.context.rewards
        if self.context.sampler is not None:
            self.context.sampler.weights_updated(step)
        with (
            model.gathered() if scalar else self.context.policy.gathered(reference=True),
            nullcontext() if rewards is None else rewards.unchanged(),
        ):
            return self._run(step) if self.context.distributed.is_main else {}

    def _run(self, step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for config in self.context.recipe.eval.tasks:
            name = config.name or config.type
            result = make_task(config).run(eval_context(self.context))
            result.save(self.directory / f"{name}-step-{step:06d}.json")
            metrics |= {f"eval/{name}/{key}": value for key, value in result.metrics.items()}
        return metrics


def make_task(config: TaskConfig) -> Any:
    """The task of a recipe's entry."""
    factory = resolve("task", config.type)
    return factory(**validate_options(factory, config.options))


def eval_context(context: TrainingContext) -> EvalContext:
    """What tasks see of a run."""
    recipe = context.recipe
    if recipe.rollout is None:
        sampling = SamplingParams(max_new_tokens=1)
    else:
        sampling = sampling_params(recipe.rollout, n=1, seed=recipe.run.seed, step=0)
    scoring = _scoring_of_scalar(context) if _is_scalar(context) else _scoring_of_policy(context)
    held_out = context.held_out
    return EvalContext(
        engine=context.sampler or _NoEngine(),
        prompts=held_out.prompts,
        samples=held_out.samples,
        grade=context.rewards.grade if context.rewards is not None else _no_rewards,
        sampling=sampling,
        seed=recipe.run.seed,
        pairs=held_out.pairs if len(held_out.pairs) else None,
        steps=held_out.steps,
        why_not=held_out.why_not,
        **scoring,
    )


def token_scores(
    policy: PolicyWithReference,
    samples: Sequence[Sample],
    token_budget: int,
    *,
    of_reference: bool = False,
) -> TokenScores:
    """Log-probabilities and greedy hits of given samples under the policy, or its reference."""
    logprobs: list[list[float]] = [[] for _ in samples]
    greedy: list[list[bool]] = [[] for _ in samples]
    for scores, batch in policy.score_all(
        samples, token_budget, of_reference=of_reference, greedy=True
    ):
        assert scores.greedy is not None
        for row, i in enumerate(batch):
            length = len(samples[i].completion_ids)
            logprobs[i] = scores.logprobs[row, :length].tolist()
            greedy[i] = scores.greedy[row, :length].tolist()
    return TokenScores(logprobs, greedy)


def _is_scalar(context: TrainingContext) -> bool:
    return isinstance(context.trained.model, ScalarModel)


def _scoring_of_policy(context: TrainingContext) -> dict[str, Any]:
    policy, budget = context.policy, context.recipe.optim.micro_batch_tokens
    # What a method that learns from pairs multiplies log-ratios by, to call them rewards.
    beta = getattr(getattr(context.recipe.algorithm, "loss", None), "beta", 1.0)

    def log_ratios(samples: Sequence[Sample]) -> list[float]:
        own = policy.logprobs(samples, budget)
        reference = policy.logprobs(samples, budget, of_reference=True)
        return [beta * float((a - b).sum()) for a, b in zip(own, reference, strict=True)]

    has_reference = policy.reference is not None
    return {
        "score": lambda samples: token_scores(policy, samples, budget),
        "reference_score": (
            (lambda samples: token_scores(policy, samples, budget, of_reference=True))
            if has_reference
            else None
        ),
        "pair_scores": _both_sides(log_ratios) if has_reference else None,
        "step_scores": None,
    }


def _scoring_of_scalar(context: TrainingContext) -> dict[str, Any]:
    model, budget = context.scalar_model, context.recipe.optim.micro_batch_tokens

    def step_scores(stepped: Sequence[SteppedSample]) -> list[list[float]]:
        samples = [one.sample for one in stepped]
        rows = model.values(samples, budget, reads="after")
        return [
            row[torch.tensor(sample.loss_mask)].tolist()
            for row, sample in zip(rows, samples, strict=True)
        ]

    return {
        "score": _no_policy,
        "reference_score": None,
        "pair_scores": _both_sides(lambda samples: model.scores(samples, budget)),
        "step_scores": step_scores,
    }


def _both_sides(
    score: Callable[[Sequence[Sample]], list[float]],
) -> Callable[[PairBatch], tuple[list[float], list[float]]]:
    """Scores of both sides of each pair, which are scored next to each other: they share a
    prompt."""

    def score_pairs(pairs: PairBatch) -> tuple[list[float], list[float]]:
        sides = zip(pairs.chosen, pairs.rejected, strict=True)
        scores = score([sample for pair in sides for sample in pair])
        return scores[::2], scores[1::2]

    return score_pairs


class _NoEngine:
    """In place of an engine where there is no policy."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        raise UserInputError(_NO_POLICY)

    def weights_updated(self, version: int) -> None:
        raise UserInputError(_NO_POLICY)


_NO_POLICY = (
    "the task samples or scores text, but this run trains a model with a scalar head, which does "
    "neither; use a task that scores pairs or steps (preference, process)"
)


def _no_policy(_: Sequence[Sample]) -> TokenScores:
    raise UserInputError(_NO_POLICY)


def _no_rewards(_: Sequence[tuple[Prompt, Completion]]) -> list[RewardedCompletion]:
    raise UserInputError(
        "the task grades completions, but the run's recipe has no rewards; evaluate the run with "
        "a recipe that has some: align eval RUN --task TASK --recipe RECIPE"
    )


def evaluate_model(
    recipe: Recipe,
    model_path: str,
    tasks: Sequence[TaskConfig],
    *,
    seed: int,
    reference: str | None = None,
) -> dict[str, Any]:
    """Run tasks on any model, with a recipe's held-out data, rewards and sampling.

    Args:
        recipe: where data, rewards and sampling come from; its own model is replaced.
        model_path: catalogue name, directory or hub id.
        seed: of the samples; the same seed gives every model the same random numbers.
        reference: model that the divergence of the policy is measured from; None for none.

    Returns:
        task name -> result.
    """
    settings = recipe.model.model_copy(
        update={"path": model_path, "lora": None, "reference": ReferenceConfig(mode="none")}
    )
    # Another model than a server has, or one that is in training there.
    recipe = recipe.model_copy(update={"model": settings, "rollout": in_process(recipe.rollout)})
    if getattr(recipe.algorithm, "critic", None) is not None:
        without_critic = recipe.algorithm.model_copy(update={"critic": None})
        recipe = recipe.model_copy(update={"algorithm": without_critic})
    events = EventLog(os.devnull)
    loaded = load_parts(recipe)
    with tempfile.TemporaryDirectory() as cache:
        context = assemble(loaded, Distributed(), events, cache=Path(cache), for_training=False)
        if reference is not None:
            other = load_causal_lm(
                reference, dtype=settings.dtype, attention=settings.attention
            ).to(context.policy.device)
            compared = Fixed("frozen_copy", FrozenCopy(other))
            with compared.backbone() as backbone:
                choose_layout(backbone)
            context.policy.reference = compared
        if context.sampler is not None:
            context.sampler.weights_updated(0)
        view = replace(eval_context(context), seed=seed)
        try:
            return {task.name or task.type: make_task(task).run(view) for task in tasks}
        finally:
            if context.rewards is not None:
                context.rewards.close()
