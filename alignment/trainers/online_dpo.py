"""Online direct preference optimization: the policy's own completions, paired by their rewards.

DPO on fixed pairs learns from answers that the policy may no longer give. Here each step samples
some for every prompt, scores them by any reward, and makes pairs of them (Guo et al. 2024); the
loss is that of `alignment.trainers.dpo`. With a reference that is synced every so many steps, this
is iterative DPO (Xu et al. 2023; Yuan et al. 2024).

Log-probabilities in the loss are those of the model itself, at whatever temperature it was sampled:
temperature explores, and what is trained is the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from alignment.config.methods.online_dpo import OnlineDPOConfig
from alignment.modeling.scorer import completion_tensor
from alignment.rollout.sampling import row_key
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import (
    minibatch_slices,
    shaped_rewards,
    training_samples,
)
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.preference import PairLearner, interleaved
from alignment.trainers.sampler import Sampler
from alignment.trainers.update import Updater, timed
from alignment.types import (
    RewardedCompletion,
    Rollout,
    Sample,
)

Group = Sequence[int]
"""The scored completions of one prompt, by their place in the rollout."""

Compare = Callable[[Group, Sequence[float], random.Random], Iterator[tuple[int, int]]]
"""(group, rewards of the rollout, random numbers) to the pairs to compare, in any order."""


def _best_worst(
    group: Group, rewards: Sequence[float], _: random.Random
) -> Iterator[tuple[int, int]]:
    """The first of the best and the first of the worst."""
    yield max(group, key=lambda i: rewards[i]), min(group, key=lambda i: rewards[i])


def _random_pair(
    group: Group, _: Sequence[float], draw: random.Random
) -> Iterator[tuple[int, int]]:
    one, other = draw.sample(group, 2)
    yield one, other


def _all_pairs(group: Group, _: Sequence[float], __: random.Random) -> Iterator[tuple[int, int]]:
    yield from combinations(group, 2)


COMPARISONS: Mapping[str, Compare] = {
    "best_worst": _best_worst,
    "random_pair": _random_pair,
    "all_pairs": _all_pairs,
}
"""Which completions of a prompt are compared."""


@dataclass(frozen=True, slots=True)
class Paired:
    """The pairs of one prompt: (chosen, rejected), by their places in the rollout.

    n_tied:   comparisons without a winner (equal rewards, or equal completions).
    n_failed: completions without a reward, which are in no comparison.
    """

    pairs: Sequence[tuple[int, int]]
    n_tied: int
    n_failed: int


def pair_up(
    items: Sequence[RewardedCompletion],
    first: int,
    rewards: Sequence[float],
    kind: str,
    draw: random.Random,
) -> Paired:
    """Pair the completions of one prompt.

    Args:
        items: the group.
        first: the place of its first completion in the rollout.
        rewards: of the rollout; NaN where a grader failed.
        kind: a name in `COMPARISONS`.
        draw: random numbers of this group's own.
    """
    scored = [first + i for i in range(len(items)) if rewards[first + i] == rewards[first + i]]
    compared = list(COMPARISONS[kind](scored, rewards, draw)) if len(scored) > 1 else []
    pairs = []
    for one, other in compared:
        ids = [items[i - first].completion.token_ids for i in (one, other)]
        if rewards[one] != rewards[other] and ids[0] != ids[1]:
            pairs.append((one, other) if rewards[one] > rewards[other] else (other, one))
    return Paired(pairs, len(compared) - len(pairs), len(items) - len(scored))


class OnlineDPOTrainer:
    """One step: prompts, rollout, rewards, pairs, reference log-probabilities, loss, updates."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, OnlineDPOConfig)
        assert context.recipe.rollout is not None
        self.config = config
        self.rollout_config = context.recipe.rollout
        self.context = context
        self.policy = context.policy
        self.distributed = context.distributed
        self.token_budget = context.recipe.optim.micro_batch_tokens
        self.total_steps = config.steps
        self.update = Updater(context, total_steps=config.steps)
        self.learn = PairLearner(context, config.loss, self.update)
        self.monitor = RolloutMonitor(context)
        self.sampler = Sampler(context, group_size=config.group_size, monitor=self.monitor)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        with timed(metrics, "rollout"):
            rollout = self.collect(step, metrics)
        rewards = shaped_rewards(
            rollout,
            max_new_tokens=self.rollout_config.max_new_tokens,
            cut_off_penalty=self.config.truncation_penalty,
        )
        self.monitor.rewards(rollout, rewards, metrics)
        parts = self.pairs(rollout, rewards.tolist(), metrics)
        with timed(metrics, "record"):
            self.measure_gap(step, rollout, metrics)
            references = [self.learn.reference(samples) for samples in parts]
        for samples, reference in zip(parts, references, strict=True):
            with timed(metrics, "update"):
                self.learn(step, samples, reference, metrics)
        self.monitor.learned(step, metrics)
        self.learn.after_step(step, metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        return StepResult(metrics, rollout)

    def collect(self, step: int, metrics: MetricSums) -> Rollout:
        """Sample groups for the next prompts, and grade them."""
        version = self.update.policy_version
        return self.sampler(step, self.config.prompts_per_step, metrics, policy_version=version)

    def pairs(
        self, rollout: Rollout, rewards: Sequence[float], metrics: MetricSums
    ) -> list[list[Sample]]:
        """This rank's interleaved pairs of each update of the step: the sampled ids themselves."""
        size = rollout.group_size
        groups = [rollout.items[i : i + size] for i in range(0, len(rollout.items), size)]
        own = [group[0].prompt.index for group in groups]
        made = []
        for number, group in enumerate(groups):
            # A counter that no sampled token uses: sample_index ends below group_size.
            key = row_key(self.context.recipe.run.seed, rollout.step, own[number], size)
            kind = self.config.pairs
            made.append(pair_up(group, number * size, rewards, kind, random.Random(key)))
        n_compared = sum(len(one.pairs) + one.n_tied for one in made)
        metrics.add("pairs/per_prompt", sum(len(one.pairs) for one in made), len(made))
        metrics.add("pairs/tied", sum(one.n_tied for one in made), n_compared)
        metrics.add("pairs/failed", sum(one.n_failed for one in made), len(rollout.items))
        samples = training_samples(rollout, mask_truncated=False)
        everyones = self.distributed.gather(own)
        parts = []
        for part in minibatch_slices(own, everyones, self.config.updates_per_step, 1):
            pairs = [pair for one in made[part] for pair in one.pairs]
            parts.append(
                interleaved((samples[i] for i, _ in pairs), (samples[i] for _, i in pairs))
            )
        return parts

    def measure_gap(self, step: int, rollout: Rollout, metrics: MetricSums) -> None:
        """Compare the engine's log-probabilities with the policy's, under the sampling they are
        of."""
        samples = training_samples(rollout, mask_truncated=False)
        for scores, rows in self.policy.score_all(
            samples, self.token_budget, sampling=self.sampler.params(step)
        ):
            sampled = completion_tensor(
                [rollout.items[i].completion.sampling_logprobs for i in rows],
                torch.float32,
                scores.logprobs.device,
            )
            self.monitor.engine_gap(step, sampled, scores.logprobs, scores.mask, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.context.order.state_dict(),
            "update": self.update.state_dict(),
            "learn": self.learn.state_dict(),
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.context.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        self.learn.load_state_dict(state["learn"])
        self.monitor.load_state_dict(state["monitor"])
