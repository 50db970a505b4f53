"""Group-relative policy optimization, and its variants by table.

GRPO (Shao et al. 2024) samples a group of completions for each prompt, scores them, and takes each
completion's reward relative to its group as the advantage of all its tokens; there is no critic.
The variants differ in one place each:

    Dr. GRPO   advantage.scale: none, reduction: constant          (Liu et al. 2025)
    RLOO       advantage.baseline: leave_one_out                   (Ahmadian et al. 2024)
    DAPO       loss.clip_high > clip_low, dynamic_sampling: refill, overlong, reduction: token
    GSPO       loss.ratio_level: sequence, reduction: sequence     (Zheng et al. 2025)
    CISPO      loss.type: cispo                                    (MiniMax 2025)

`rlvr` is the same trainer with a verifier among its rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.grpo import GRPOConfig
from alignment.losses import reduce_loss
from alignment.modeling.scorer import Scores
from alignment.rollout.collect import has_spread
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import (
    Experience,
    aligned,
    aligned_floats,
    pick,
    record_experience,
    shaped_rewards,
    training_samples,
)
from alignment.trainers.group_relative import ADVANTAGES, POLICY_LOSSES
from alignment.trainers.kl import KLTerm
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.sampler import Sampler
from alignment.trainers.update import Updater, record, record_masked, timed
from alignment.types import Rollout, Sample


class GRPOTrainer:
    """One step: prompts, rollout, rewards, advantages, loss, update."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, GRPOConfig)
        assert context.recipe.rollout is not None
        self.config = config
        self.rollout_config = context.recipe.rollout
        self.context = context
        self.policy = context.policy
        self.distributed = context.distributed
        self.total_steps = config.steps
        self.kl = KLTerm(
            config.kl,
            samples_per_step=config.completions_per_step,
            has_reference=context.policy.reference is not None,
        )
        self.update = Updater(context, total_steps=config.steps)
        self.monitor = RolloutMonitor(context)
        self.sampler = Sampler(context, group_size=config.group_size, monitor=self.monitor)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        with timed(metrics, "rollout"):
            rollout = self.collect(step, metrics)
        parts = self.sampler.parts(rollout, self.config.updates_per_step)
        with timed(metrics, "record"):
            experience = self.record(rollout, parts)
        rewards = shaped_rewards(
            rollout,
            max_new_tokens=self.rollout_config.max_new_tokens,
            overlong=self.config.overlong,
            cut_off_penalty=self.config.truncation_penalty,
        )
        self.monitor.rewards(rollout, rewards, metrics)
        rewards = rewards - self.kl.penalty(experience)
        advantages = self.advantages(rewards, rollout.group_size)
        for _ in range(self.config.epochs_per_step):
            for part in parts:
                with timed(metrics, "update"):
                    self.learn(step, experience, advantages, part, metrics)
        self.monitor.learned(step, metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        self.kl.after_step(metrics, self.distributed)
        return StepResult(metrics, rollout, advantages.tolist())

    def collect(self, step: int, metrics: MetricSums) -> Rollout:
        """Sample groups for the next prompts, and grade them."""
        dynamic = self.config.dynamic_sampling
        return self.sampler(
            step,
            self.config.prompts_per_step,
            metrics,
            policy_version=self.update.policy_version,
            keep=has_spread if dynamic != "off" else lambda group: True,
            max_rounds=1 + self.config.max_refills if dynamic == "refill" else 1,
        )

    def record(self, rollout: Rollout, parts: Sequence[slice]) -> Experience:
        """The rollout as samples, with old and reference log-probabilities."""
        samples = training_samples(rollout, mask_truncated=self.config.truncated == "mask")
        several = self.config.updates_per_step * self.config.epochs_per_step > 1
        return record_experience(
            self.policy,
            rollout,
            samples,
            parts,
            self.context.recipe.optim.micro_batch_tokens,
            self.sampler.params(rollout.step),
            old=several or self.kl.in_reward,
            reference=self.kl.needs_reference_logprobs,
        )

    def advantages(self, rewards: Tensor, group_size: int) -> Tensor:
        """`[B]`; groups and batch statistics are those of all ranks together."""
        shares = self.distributed.gather([rewards.tolist()])
        everything = torch.tensor([reward for share in shares for reward in share])
        group_ids = torch.arange(len(everything)) // group_size
        advantages = ADVANTAGES[self.config.advantage.baseline](
            everything, group_ids, self.config.advantage.scale
        )
        before = sum(len(share) for share in shares[: self.distributed.rank])
        return advantages[before : before + len(rewards)]

    def learn(
        self,
        step: int,
        experience: Experience,
        advantages: Tensor,
        part: slice,
        metrics: MetricSums,
    ) -> None:
        """One optimizer update on a minibatch."""
        config = self.config
        samples = experience.samples[part]
        count = self.global_count(samples)
        if count == 0:
            return

        def loss_of(scores: Scores, rows: list[int]) -> Tensor:
            own = scores.logprobs
            old = own.detach()
            if experience.old_logprobs is not None:
                old = aligned(pick(experience.old_logprobs, part.start, rows), own)
            advantage = advantages[part][rows].to(own.device)
            loss = POLICY_LOSSES[config.loss.type](own, old, advantage, scores.mask, config.loss)
            per_token = loss.per_token + self.kl.loss(scores, experience, part.start, rows, metrics)
            assert scores.entropies is not None
            if config.entropy_coef:
                per_token = per_token - config.entropy_coef * scores.entropies
            record(metrics, loss.metrics, "policy/")
            record_masked(metrics, "policy/entropy", scores.entropies, scores.mask)
            sampled = [experience.sampling_logprobs[part.start + i] for i in rows]
            self.monitor.engine_gap(step, aligned_floats(sampled, own), old, scores.mask, metrics)
            return reduce_loss(per_token, scores.mask, mode=config.reduction, count=count)

        def score_options(rows: list[Sample]) -> dict[str, object]:
            options = {
                "sampling": self.sampler.params(step),
                "entropy": True,
                "entropy_gradient": config.entropy_coef != 0,
            }
            if self.kl.is_full:
                options["reference"] = self.policy.reference_states(rows)
            return options

        self.update(step, samples, loss_of, metrics, score_options)

    def global_count(self, samples: Sequence[Sample]) -> float:
        """What the loss of a minibatch is divided by, over all ranks."""
        tokens, sequences = self.distributed.sum(
            [sum(s.n_loss_tokens for s in samples), sum(s.n_loss_tokens > 0 for s in samples)]
        )
        divisor = self.config.constant_divisor or self.rollout_config.max_new_tokens
        counts = {"token": tokens, "sequence": sequences, "constant": sequences * divisor}
        return counts[self.config.reduction]

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.context.order.state_dict(),
            "update": self.update.state_dict(),
            "kl": self.kl.state_dict(),
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.context.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        self.kl.load_state_dict(state["kl"])
        self.monitor.load_state_dict(state["monitor"])
