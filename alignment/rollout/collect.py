"""From prompts to graded completions: one rollout, groups that teach nothing replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignment.types import Completion, Prompt, RewardedCompletion, Rollout, SamplingParams

Grade = Callable[[Sequence[tuple[Prompt, Completion]]], list[RewardedCompletion]]

Complete = Callable[[Sequence[Prompt], SamplingParams], list[RewardedCompletion]]
"""Prompts to graded completions, `n` of each prompt, prompt-major. Every rank calls it equally
often, also with no prompts."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step trains on, and what it took to get it, on this rank.

    rollout:        the groups kept, prompt-major, in the order they were drawn, and those dropped.
    sampled:        all completions sampled, discarded ones included, in order.
    n_rounds:       rounds of sampling, the same on every rank.
    """

    rollout: Rollout
    sampled: tuple[RewardedCompletion, ...]
    n_rounds: int


def collect(
    complete: Complete,
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
        complete: samples and grades.
        draw: told how many prompts all ranks together want next, gives this rank's share of them,
            which may be none. It is called equally often on every rank.
        n_prompts: groups to keep, over all ranks.
        keep: whether a group is kept (dynamic sampling keeps those whose rewards differ; DAPO,
            Yu et al. 2025, section 3.2). Groups dropped are replaced in up to `max_rounds` rounds;
            after that the step goes on with what there is.
        over_ranks: sums a count over all ranks.
    """
    kept: list[RewardedCompletion] = []
    dropped: list[RewardedCompletion] = []
    sampled: list[RewardedCompletion] = []
    n_rounds = 0
    missing = n_prompts
    while missing > 0 and n_rounds < max_rounds:
        prompts = draw(missing)
        n_rounds += 1
        graded = complete(prompts, sampling)
        sampled.extend(graded)
        for start in range(0, len(graded), sampling.n):
            group = graded[start : start + sampling.n]
            (kept if keep(group) else dropped).extend(group)
        missing = n_prompts - over_ranks(len(kept) // sampling.n)
    rollout = Rollout(tuple(kept), sampling.n, sampling.step, tuple(dropped))
    return Collected(rollout, tuple(sampled), n_rounds)


def graded(
    grade: Grade, prompts: Sequence[Prompt], completions: Sequence[Completion], n: int
) -> list[RewardedCompletion]:
    """The `n` completions of each prompt, prompt-major, with their grades."""
    owners = [prompt for prompt in prompts for _ in range(n)]
    return grade(list(zip(owners, completions, strict=True))) if prompts else []


def has_spread(group: Sequence[RewardedCompletion]) -> bool:
    """True where the rewards of a group differ, so that comparing its members teaches something."""
    return len({item.reward for item in group if item.reward is not None}) > 1
