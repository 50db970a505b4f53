"""Running evaluation tasks: during training, and on a finished run or any model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.config.load import load_recipe
from alignment.config.options import resolve, validate_options
from alignment.config.schema import Recipe, ReferenceConfig, TaskConfig
from alignment.distributed import Distributed
from alignment.modeling.policy import PolicyWithReference
from alignment.rollout.engine import RolloutEngine
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.trainers.context import TrainingContext
from alignment.trainers.sampling import sampling_params
from alignment.trainers.setup import assemble, load_parts
from alignment.types import (
    Completion,
    Prompt,
    RewardedCompletion,
    Sample,
    SamplingParams,
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
    factory = resolve("task", config.type)
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
    raise UserInputError(
        "the task grades completions, but the run's recipe has no rewards; evaluate the run with "
        "a recipe that has some: align eval RUN --task TASK --recipe RECIPE"
    )


def evaluate_model(
    recipe: Recipe, model_path: str, tasks: Sequence[TaskConfig], *, seed: int
) -> dict[str, Any]:
    """Run tasks on any model, with a recipe's held-out data, rewards and sampling.

    Args:
        recipe: where data, rewards and sampling come from; its own model is replaced.
        model_path: catalogue name, directory or hub id.
        seed: of the samples; the same seed gives every model the same random numbers.

    Returns:
        task name -> result.
    """
    settings = recipe.model.model_copy(
        update={"path": model_path, "lora": None, "reference": ReferenceConfig(mode="none")}
    )
    recipe = recipe.model_copy(update={"model": settings})
    events = EventLog(os.devnull)
    context = assemble(load_parts(recipe), Distributed(), events)
    view = replace(eval_context(context), seed=seed)
    try:
        return {task.name or task.type: make_task(task).run(view) for task in tasks}
    finally:
        if context.rewards is not None:
            context.rewards.close()


def evaluate_command(
    target: str, tasks: Sequence[TaskConfig], *, data_from: Recipe | None = None
) -> dict[str, Any]:
    """What `align eval` runs: tasks on a finished run's model, or on a model with a recipe's data.

    Args:
        target: a run folder, or a model path with `data_from`.
        data_from: recipe for data, rewards and sampling; by default the run's own.

    Raises:
        UserInputError: neither is given.
    """
    path = Path(target)
    model = target
    if (path / "recipe.yaml").is_file():
        own = load_recipe(path / "recipe.yaml")
        if not isinstance(own, Recipe):
            raise UserInputError(
                f"{target} is a pipeline; name one of its stages: {target}/stages/"
            )
        data_from = data_from or own
        model = str(RunDirectory.open(path).model_dir)
    if data_from is None:
        raise UserInputError(
            f"{target} is not a run, so there is no data to evaluate on; add --recipe RECIPE"
        )
    return evaluate_model(data_from, model, tasks, seed=data_from.run.seed)
