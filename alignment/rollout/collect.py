"""From prompts to graded completions: one rollout, groups that teach nothing replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignment.rollout.engine import RolloutEngine
from alignment.types import Completion, Prompt, RewardedCompletion, Rollout, SamplingParams

Grade = Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step trains on, and what it took to get it, on this rank.

    rollout:        the groups kept, prompt-major, in the order they were drawn.
    sampled:        all completions sampled, discarded ones included, in order.
    n_rounds:       rounds of sampling, the same on every rank.
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
    over_ranks: Callable[[int], int] = lambda count: count,
) -> Collected:
    """Sample and grade groups of `sampling.n` completions until `n_prompts` groups are kept.

    Args:
        draw: told how many prompts all ranks together want next, gives this rank's share of them,
            which may be none. It is called equally often on every rank.
        n_prompts: groups to keep, over all ranks.
        keep: whether a group is kept (dynamic sampling keeps those whose rewards differ; DAPO,
            Yu et al. 2025, section 3.2). Groups dropped are replaced in up to `max_rounds` rounds;
            after that the step goes on with what there is.
        over_ranks: sums a count over all ranks.
    """
    kept: list[RewardedCompletion] = []
    sampled: list[RewardedCompletion] = []
    n_rounds = 0
    missing = n_prompts
    while missing > 0 and n_rounds < max_rounds:
        prompts = draw(missing)
        n_rounds += 1
        graded = sample_and_grade(engine, grade, prompts, sampling) if prompts else []
        sampled.extend(graded)
        for start in range(0, len(graded), sampling.n):
            group = graded[start : start + sampling.n]
            if keep(group):
                kept.extend(group)
        missing = n_prompts - over_ranks(len(kept) // sampling.n)
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
