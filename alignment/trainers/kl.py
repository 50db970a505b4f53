"""The KL term of methods that sample: where it acts, how it is estimated, what its weight is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.sections import KLConfig
from alignment.distributed import Distributed
from alignment.losses import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    kl_estimate,
)
from alignment.modeling.scorer import Scores
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import Experience, aligned, pick
from alignment.trainers.update import record_masked
from alignment.types import UserInputError


class KLTerm:
    """The pull towards the reference: in the reward or in the loss, never in both.

    Without a coefficient the divergence is measured only, where there is a reference.
    """

    def __init__(self, kl: KLConfig, *, samples_per_step: int, has_reference: bool) -> None:
        if kl.coef and not has_reference:
            raise UserInputError(
                "algorithm.kl.coef is set but model.reference is none; choose a reference mode, "
                "or set the coefficient to 0"
            )
        self._estimator = kl.estimator
        self._measures = has_reference
        self.in_reward = kl.placement == "reward" and kl.coef > 0
        self._in_loss = kl.placement == "loss" and kl.coef > 0
        self._controller: KLController
        if kl.controller == "adaptive":
            assert kl.target is not None and kl.horizon is not None
            self._controller = AdaptiveKLController(
                kl.coef, target=kl.target, gain=samples_per_step / kl.horizon
            )
        else:
            self._controller = FixedKLController(kl.coef)

    @property
    def is_full(self) -> bool:
        """True where the exact divergence over the vocabulary is wanted in the loss."""
        return self._estimator == "full" and self._measures

    @property
    def needs_reference_logprobs(self) -> bool:
        return self._measures and not self.is_full

    def penalty(self, experience: Experience) -> Tensor:
        """Subtracted from the rewards `[B]`: coef * sum over tokens of the estimate."""
        if not self.in_reward:
            return torch.zeros(len(experience.samples))
        return torch.stack([row.sum() for row in self.token_penalties(experience)])

    def token_penalties(self, experience: Experience) -> list[Tensor]:
        """Subtracted from the reward of each token: coef * its estimate, ragged, on the CPU."""
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        return [
            self._controller.coef * self._estimate(own[None], reference[None])[0].cpu()
            for own, reference in zip(experience.old_logprobs, experience.ref_logprobs, strict=True)
        ]

    def measure(self, experience: Experience, metrics: MetricSums) -> None:
        """The divergence of the policy that sampled, before any update."""
        if experience.old_logprobs is None or experience.ref_logprobs is None:
            return
        sides = zip(experience.old_logprobs, experience.ref_logprobs, strict=True)
        for sample, (own, reference) in zip(experience.samples, sides, strict=True):
            mask = torch.tensor([sample.loss_mask], device=own.device)
            _measure(self._estimate(own[None], reference[None]), mask, metrics)

    def loss(
        self,
        scores: Scores,
        experience: Experience,
        start: int,
        rows: list[int],
        metrics: MetricSums | None,
    ) -> Tensor:
        """coef * KL per token `[B, T]` where it acts in the loss, else zero.

        Args:
            start: where the minibatch begins in the experience; `rows` count from there.
            metrics: takes the divergence of this update; None where it was measured before.
        """
        if not self._measures or (metrics is None and not self._in_loss):
            return torch.zeros_like(scores.logprobs)
        if scores.full_kl is not None:
            kl = scores.full_kl
        else:
            assert experience.ref_logprobs is not None
            reference = aligned(pick(experience.ref_logprobs, start, rows), scores.logprobs)
            kl = self._estimate(scores.logprobs, reference)
        if metrics is not None:
            _measure(kl, scores.mask, metrics)
        return self._controller.coef * kl if self._in_loss else torch.zeros_like(kl)

    def after_step(self, metrics: MetricSums, distributed: Distributed) -> None:
        """Move the coefficient by the KL of this step over all ranks, in nats per sequence."""
        total, count = metrics.means.get("kl/sequence", (0.0, 0.0))
        total, count = distributed.sum([total, count])
        if count and math.isfinite(total):  # else the updates were skipped
            self._controller.update(total / count)
        if distributed.is_main and self._measures:
            metrics.add("kl/coef", self._controller.coef)

    def _estimate(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        # In the reward `full` is refused by the recipe's check, so a named estimator is left.
        name = "k3" if self._estimator == "full" else self._estimator
        return kl_estimate(logprobs, reference, estimator=name)

    def state_dict(self) -> dict[str, Any]:
        return self._controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._controller.load_state_dict(state)


def _measure(kl: Tensor, mask: Tensor, metrics: MetricSums) -> None:
    """Take the divergence `[B, T]` in, per token and per sequence.

    A row that is masked out as a whole (its grader failed) is no sequence of divergence 0.
    """
    record_masked(metrics, "kl/mean", kl, mask)
    total = torch.where(mask, kl.detach(), 0.0).sum()
    metrics.add("kl/sequence", float(total), float(mask.any(dim=1).sum()))
