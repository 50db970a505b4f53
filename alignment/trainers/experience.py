"""What a policy-gradient update reads: samples and the constants recorded before the update."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignment.config.methods.sections import OverlongConfig
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.scorer import completion_tensor
from alignment.rewards.shaping import soft_overlong_penalty
from alignment.types import Rollout, Sample, SamplingParams, StopReason


@dataclass(frozen=True, slots=True)
class Experience:
    """A rollout as training rows, in its order.

    samples:           `N` rows; those left out of the loss have an all-False mask.
    sampling_logprobs: ragged, from the engine.
    old_logprobs:      ragged, of the policy before this rollout's updates; None where one update
                       is made, so that they equal the current ones.
    ref_logprobs:      ragged, of the reference; None where there is none.
    """

    samples: Sequence[Sample]
    sampling_logprobs: Sequence[Sequence[float]]
    old_logprobs: Sequence[Tensor] | None
    ref_logprobs: Sequence[Tensor] | None


def training_samples(rollout: Rollout, *, mask_truncated: bool) -> list[Sample]:
    """The rollout's sampled ids, never re-tokenized; what has no reward is masked out of the loss.

    Args:
        mask_truncated: leave completions cut off at the limit out of the loss too (DAPO's
            overlong filtering); their rewards still count in their group's baseline.
    """
    samples = []
    for item in rollout.items:
        cut_off = item.completion.stop_reason is StopReason.LENGTH
        counts = item.reward is not None and not (mask_truncated and cut_off)
        ids = item.completion.token_ids
        samples.append(Sample(item.prompt.token_ids, ids, (counts,) * len(ids)))
    return samples


def shaped_rewards(
    rollout: Rollout,
    *,
    max_new_tokens: int,
    overlong: OverlongConfig | None = None,
    cut_off_penalty: float | None = None,
) -> Tensor:
    """Rewards `[B]` after what the recipe does about long and cut-off completions.

    NaN where a grader failed: such a row has no advantage and no loss.
    """
    rewards = []
    for item in rollout.items:
        reward = float("nan") if item.reward is None else item.reward
        if overlong is not None:
            reward += overlong.penalty * soft_overlong_penalty(
                len(item.completion.token_ids), max_length=max_new_tokens, buffer=overlong.buffer
            )
        cut_off = item.completion.stop_reason is StopReason.LENGTH
        if cut_off and cut_off_penalty is not None:
            reward -= cut_off_penalty
        rewards.append(reward)
    return torch.tensor(rewards)


def record_experience(
    policy: PolicyWithReference,
    rollout: Rollout,
    samples: Sequence[Sample],
    parts: Sequence[slice],
    token_budget: int,
    sampling: SamplingParams,
    *,
    old: bool,
    reference: bool,
) -> Experience:
    """Score the rollout before any update.

    Each part (minibatch) is scored by itself, so that the same rows share a forward pass here and
    in the update: the first ratio is then exactly one in low precision too.
    """

    def logprobs(of_reference: bool) -> list[Tensor]:
        return [
            row
            for part in parts
            for row in policy.logprobs(
                samples[part], token_budget, of_reference=of_reference, sampling=sampling
            )
        ]

    return Experience(
        samples=samples,
        sampling_logprobs=[item.completion.sampling_logprobs for item in rollout.items],
        old_logprobs=logprobs(of_reference=False) if old else None,
        ref_logprobs=logprobs(of_reference=True) if reference else None,
    )


def minibatch_slices(
    own: Sequence[int], everyones: Sequence[int], n_parts: int, group_size: int
) -> list[slice]:
    """This rank's rows of each of `n_parts` minibatches.

    All ranks' groups, in the order they were drawn, are split into contiguous parts as even as
    groups allow, so that the minibatches do not depend on which rank holds which group.

    Args:
        own: prompt index of each of this rank's groups, ascending.
        everyones: those of all ranks, in any order.
    """
    groups = sorted(everyones)
    inner = [groups[len(groups) * part // n_parts] for part in range(1, n_parts) if groups]
    edges = [0, *(bisect_left(own, first) for first in inner), len(own)]
    return [slice(a * group_size, b * group_size) for a, b in pairwise(edges)]


def aligned(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Ragged rows as `[B, T]`, zero where there is no token."""
    out = torch.zeros_like(like)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def aligned_floats(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Ragged rows of numbers as `[B, T]`."""
    return completion_tensor(rows, torch.float32, like.device)


def pick(items: Sequence[Tensor], start: int, rows: Sequence[int]) -> list[Tensor]:
    """`items[start + i]` for each row of a minibatch that begins at `start`."""
    return [items[start + i] for i in rows]
