"""From prompts to graded completions: one rollout, groups that teach nothing replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from alignment.rollout.engine import RolloutEngine
from alignment.types import Completion, Prompt, RewardedCompletion, Rollout, SamplingParams

Grade = Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step trains on, and what it took to get it.

    rollout:        the groups kept, prompt-major.
    sampled:        all completions sampled, discarded ones included, in order.
    n_rounds:       rounds of sampling.
    """

    rollout: Rollout
    sampled: tuple[RewardedCompletion, ...]
    n_rounds: int


def collect(
    engine: RolloutEngine,
    grade: Grade,
    draw: Callable[[int], Sequence[Prompt]],
    n_prompts: int,
    sampling: SamplingParams,
    *,
    keep: Callable[[Sequence[RewardedCompletion]], bool] = lambda group: True,
    max_rounds: int = 1,
) -> Collected:
    """Sample and grade groups of `sampling.n` completions until `n_prompts` groups are kept.

    Args:
        draw: gives the next so many prompts.
        keep: whether a group is kept (dynamic sampling keeps those whose rewards differ; DAPO,
            Yu et al. 2025, section 3.2). Groups dropped are replaced in up to `max_rounds` rounds;
            after that the step goes on with what there is.
    """
    kept: list[RewardedCompletion] = []
    sampled: list[RewardedCompletion] = []
    n_rounds = 0
    while len(kept) < n_prompts * sampling.n and n_rounds < max_rounds:
        prompts = draw(n_prompts - len(kept) // sampling.n)
        n_rounds += 1
        if not prompts:
            break
        graded = sample_and_grade(engine, grade, prompts, sampling)
        sampled.extend(graded)
        for start in range(0, len(graded), sampling.n):
            group = graded[start : start + sampling.n]
            if keep(group):
                kept.extend(group)
    rollout = Rollout(tuple(kept), group_size=sampling.n, step=sampling.step)
    return Collected(rollout, tuple(sampled), n_rounds)


def sample_and_grade(
    engine: RolloutEngine, grade: Grade, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[RewardedCompletion]:
    """One graded completion for each (prompt, sample), prompt-major."""
    completions = engine.generate(prompts, sampling)
    owners = [prompt for prompt in prompts for _ in range(sampling.n)]
    return grade(list(zip(owners, completions, strict=True)))


def has_spread(group: Sequence[RewardedCompletion]) -> bool:
    """True where the rewards of a group differ, so that comparing its members teaches something."""
    return len({item.reward for item in group if item.reward is not None}) > 1


def with_reward(item: RewardedCompletion, reward: float) -> RewardedCompletion:
    """The same completion with another reward (shaping)."""
    return replace(item, reward=reward)
