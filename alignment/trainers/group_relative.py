"""The pieces in which group-relative methods differ: advantages, policy losses, shaping, KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.advantages import group_relative, leave_one_out
from alignment.config.algorithms import GRPOConfig, PolicyLossConfig
from alignment.distributed import Distributed
from alignment.losses import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    TokenLoss,
    cispo_loss,
    kl_estimate,
    ppo_clip_loss,
)
from alignment.modeling.scorer import Scores
from alignment.rewards.shaping import soft_overlong_penalty
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import Experience, aligned, pick
from alignment.trainers.update import record_masked
from alignment.types import Rollout, StopReason, UserInputError

Scale = Literal["group", "batch", "none"]


def _leave_one_out(rewards: Tensor, group_ids: Tensor, scale: Scale) -> Tensor:
    if scale != "none":
        raise UserInputError(
            f"advantage: leave_one_out (RLOO) is not scaled; set advantage.scale: none, not {scale}"
        )
    return leave_one_out(rewards, group_ids)


ADVANTAGES: Mapping[str, Callable[[Tensor, Tensor, Scale], Tensor]] = {
    "group_mean": lambda rewards, group_ids, scale: group_relative(rewards, group_ids, scale=scale),
    "leave_one_out": _leave_one_out,
}
"""(rewards `[B]`, group_ids `[B]`, scale) to advantages `[B]`; NaN rewards get advantage 0."""


def _clip(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: PolicyLossConfig
) -> TokenLoss:
    assert config.clip_low is not None
    return ppo_clip_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ratio_level=config.ratio_level,
        dual_clip=config.dual_clip,
    )


def _cispo(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: PolicyLossConfig
) -> TokenLoss:
    return cispo_loss(
        logprobs, old, advantages, mask, clip_low=config.clip_low, clip_high=config.clip_high
    )


POLICY_LOSSES: Mapping[
    str, Callable[[Tensor, Tensor, Tensor, Tensor, PolicyLossConfig], TokenLoss]
] = {"clip": _clip, "cispo": _cispo}


def shaped_rewards(rollout: Rollout, config: GRPOConfig, max_new_tokens: int) -> Tensor:
    """Rewards `[B]` after what the recipe does about long and cut-off completions.

    NaN where a grader failed: such a row has no advantage and no loss.
    """
    rewards = []
    for item in rollout.items:
        reward = float("nan") if item.reward is None else item.reward
        if config.overlong is not None:
            reward += config.overlong.penalty * soft_overlong_penalty(
                len(item.completion.token_ids),
                max_length=max_new_tokens,
                buffer=config.overlong.buffer,
            )
        cut_off = item.completion.stop_reason is StopReason.LENGTH
        if cut_off and config.truncation_penalty is not None:
            reward -= config.truncation_penalty
        rewards.append(reward)
    return torch.tensor(rewards)


class KLTerm:
    """The pull towards the reference: in the reward or in the loss, never in both.

    Without a coefficient the divergence is measured only, where there is a reference.
    """

    def __init__(self, config: GRPOConfig, *, has_reference: bool) -> None:
        kl = config.kl
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
            samples = config.prompts_per_step * config.group_size
            self._controller = AdaptiveKLController(
                kl.coef, target=kl.target, gain=samples / kl.horizon
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
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        sums = [
            float(self._estimate(own[None], reference[None]).sum())
            for own, reference in zip(experience.old_logprobs, experience.ref_logprobs, strict=True)
        ]
        return self._controller.coef * torch.tensor(sums)

    def loss(
        self,
        scores: Scores,
        experience: Experience,
        start: int,
        rows: list[int],
        metrics: MetricSums,
    ) -> Tensor:
        """coef * KL per token `[B, T]` where it acts in the loss, else zero; measures it."""
        if not self._measures:
            return torch.zeros_like(scores.logprobs)
        if scores.full_kl is not None:
            kl = scores.full_kl
        else:
            assert experience.ref_logprobs is not None
            reference = aligned(pick(experience.ref_logprobs, start, rows), scores.logprobs)
            kl = self._estimate(scores.logprobs, reference)
        record_masked(metrics, "kl/mean", kl, scores.mask)
        per_sequence = torch.where(scores.mask, kl.detach(), 0.0).sum(dim=1)
        metrics.add("kl/sequence", float(per_sequence.sum()), len(rows))
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
