"""What every method that samples begins a step with: prompts, completions, grades."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from alignment.rollout.collect import Complete, Grade, collect, graded
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.experience import minibatch_slices
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.sampling import sampling_params
from alignment.types import (
    Completion,
    Prompt,
    RewardedCompletion,
    Rollout,
    SamplingParams,
    UserInputError,
)


class Sampler:
    """Draws the next prompts of the run, samples groups of completions, and grades them.

    Args:
        context: of the run.
        group_size: completions of each prompt.
        monitor: is shown all that is sampled.

    Raises:
        UserInputError: there are no rewards, or no prompts.
    """

    def __init__(
        self, context: TrainingContext, *, group_size: int, monitor: RolloutMonitor
    ) -> None:
        if context.rewards is None and context.recorded is None:
            raise UserInputError("rewards: the method learns from rewards; list at least one")
        if not context.train.prompts:
            raise UserInputError("data: there is no prompt to sample from")
        assert context.recipe.rollout is not None  # a recipe whose method samples has one
        self._context = context
        self._complete = completer(context, context.rewards.grade if context.rewards else None)
        self._config = context.recipe.rollout
        self._group_size = group_size
        self._monitor = monitor

    def __call__(
        self,
        step: int,
        n_prompts: int,
        metrics: MetricSums,
        *,
        policy_version: int = 0,
        keep: Callable[[Sequence[RewardedCompletion]], bool] = lambda group: True,
        max_rounds: int = 1,
    ) -> Rollout:
        """This rank's part of a rollout of `n_prompts` groups; the options are those of `collect`.

        Args:
            policy_version: updates behind the weights, which the engine is told of first.
        """
        if self._context.recorded is None:
            self._context.engine.weights_updated(policy_version)
        collected = collect(
            self._complete,
            self._draw,
            n_prompts,
            self.params(step),
            keep=keep,
            max_rounds=max_rounds,
            over_ranks=lambda count: int(self._context.distributed.sum([count])[0]),
        )
        self._monitor.sampled(collected, metrics)
        return collected.rollout

    def params(self, step: int) -> SamplingParams:
        """How the completions of a step are drawn."""
        seed = self._context.recipe.run.seed
        return sampling_params(self._config, n=self._group_size, seed=seed, step=step)

    def parts(self, rollout: Rollout, n_parts: int) -> list[slice]:
        """This rank's rows of each of `n_parts` minibatches."""
        own = [item.prompt.index for item in rollout.items[:: rollout.group_size]]
        everyones = self._context.distributed.gather(own)
        return minibatch_slices(own, everyones, n_parts, rollout.group_size)

    def _draw(self, n_prompts: int) -> list[Prompt]:
        """This rank's share of the next `n_prompts` prompts of all ranks."""
        context = self._context
        mine = context.distributed.deal(context.order.take(n_prompts))
        return [replace(context.train.prompts[row], index=index) for index, row in mine]


def completer(context: TrainingContext, grade: Grade | None) -> Complete:
    """What gives a method its graded completions: the recorded ones, where the run has such; else
    the engine and `grade`, which then cannot be None."""
    if context.recorded is not None:
        return context.recorded
    assert grade is not None

    def complete(prompts: Sequence[Prompt], params: SamplingParams) -> list[RewardedCompletion]:
        return graded(grade, prompts, generate(context, prompts, params), params.n)

    return complete


def generate(
    context: TrainingContext, prompts: Sequence[Prompt], params: SamplingParams
) -> list[Completion]:
    """Completions of the policy as it is. Whatever a method trains on is sampled here.

    Sharded weights are whole for that long, on each rank, which then samples at its own pace;
    a server has its own.
    """
    rollout = context.recipe.rollout
    served = rollout is not None and rollout.server is not None
    with nullcontext() if served else context.policy.gathered():
        return context.engine.generate(prompts, params) if prompts else []
