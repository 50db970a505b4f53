"""What PPO's updates read: the constants of a rollout, and the minibatches it is divided into."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.modeling.scorer import completion_tensor
from alignment.trainers.experience import Experience
from alignment.types import Sample


@dataclass(frozen=True, slots=True)
class Targets:
    """What the updates of a step learn from: constants, `[N, T]` on the CPU, one row a sample."""

    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    mask: Tensor

    def mean_advantages(self) -> list[float]:
        """One number a sample, for the record."""
        counts = self.mask.sum(dim=1).clamp(min=1)
        means: list[float] = (self.advantages.sum(dim=1) / counts).tolist()
        return means


@dataclass(frozen=True, slots=True)
class Minibatch:
    """A part of a rollout that one update is made on.

    rows:     which of this rank's samples.
    n_tokens: tokens in the loss, over all ranks.
    """

    step: int
    experience: Experience
    targets: Targets
    rows: Sequence[int]
    n_tokens: float

    @property
    def samples(self) -> list[Sample]:
        return [self.experience.samples[row] for row in self.rows]

    def where(self, batch: Sequence[int]) -> list[int]:
        """Where in the rollout the samples of a micro-batch of this minibatch stand."""
        return [self.rows[i] for i in batch]

    def take(self, constants: Tensor, batch: Sequence[int], like: Tensor) -> Tensor:
        """A micro-batch of the constants `[N, T]`, in the shape and place of `like`."""
        return constants[self.where(batch), : like.shape[1]].to(like.device)


def loss_mask(samples: Sequence[Sample]) -> Tensor:
    """The tokens that count, `[N, T]`; `[0, 1]` on a rank without a sample."""
    if not samples:
        return torch.zeros(0, 1, dtype=torch.bool)
    mask: Tensor = completion_tensor([sample.loss_mask for sample in samples], torch.bool, "cpu")
    return mask


def shuffled_rows(
    own: Sequence[int], everyones: Sequence[int], n_parts: int, group_size: int, key: int
) -> list[list[int]]:
    """This rank's rows of each of `n_parts` minibatches of shuffled groups (prompts).

    The minibatches depend on the groups and on `key` alone, not on which rank holds which group.

    Args:
        own: prompt index of each of this rank's groups, in the order of its rows.
        everyones: those of all ranks, in any order.
    """
    order = sorted(everyones)
    random.Random(key).shuffle(order)
    part_of = {group: i * n_parts // len(order) for i, group in enumerate(order)}
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    for i, group in enumerate(own):
        parts[part_of[group]].extend(range(i * group_size, (i + 1) * group_size))
    return parts
