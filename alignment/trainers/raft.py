"""Reward-ranked fine-tuning: imitate the best of one's own samples, again and again.

RAFT (Dong et al. 2023) samples a group of completions for each prompt, keeps the best, and takes
supervised steps on them; expert iteration (Anthony et al. 2017) keeps what a verifier accepts. The
ids that were sampled are what is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alignment.config.methods.raft import RAFTConfig
from alignment.losses import reduce_loss, sft_loss
from alignment.modeling.scorer import Scores
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import (
    Experience,
    aligned_floats,
    record_experience,
    shaped_rewards,
    training_samples,
)
from alignment.trainers.kl import KLTerm
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.sampler import Sampler
from alignment.trainers.update import Updater, record, timed
from alignment.types import RewardedCompletion, Rollout, Sample


class RAFTTrainer:
    """One step: prompts, rollout, rewards, the best of each group, supervised updates on them."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, RAFTConfig)
        assert context.recipe.rollout is not None
        self.config = config
        self.context = context
        self.rollout_config = context.recipe.rollout
        self.policy = context.policy
        self.distributed = context.distributed
        self.total_steps = config.steps
        self.kl = KLTerm(
            config.kl,
            samples_per_step=config.completions_per_step,
            has_reference=context.policy.reference is not None,
        )
        self.update = Updater(context, total_steps=config.steps)
        self.monitor = RolloutMonitor(context, compares_groups=False)
        self.sampler = Sampler(context, group_size=config.group_size, monitor=self.monitor)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        with timed(metrics, "rollout"):
            rollout = self.collect(step, metrics)
        rewards = shaped_rewards(rollout, max_new_tokens=self.rollout_config.max_new_tokens)
        self.monitor.rewards(rollout, rewards, metrics)
        best = self.best(rollout, metrics)
        with timed(metrics, "update"):
            if self.distributed.sum([len(best.items)])[0]:
                experience = self.record(best)
                for epoch in range(self.config.epochs_per_step):
                    self.learn(step, experience, metrics if epoch == 0 else MetricSums())
        self.monitor.learned(step, metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        self.kl.after_step(metrics, self.distributed)
        kept = {id(item) for item in best.items}
        return StepResult(metrics, rollout, [float(id(item) in kept) for item in rollout.items])

    def collect(self, step: int, metrics: MetricSums) -> Rollout:
        """Sample groups for the next prompts, and grade them."""
        version = self.update.policy_version
        return self.sampler(step, self.config.prompts_per_step, metrics, policy_version=version)

    def best(self, rollout: Rollout, metrics: MetricSums) -> Rollout:
        """The completions to imitate: of each group the best `keep`, none below the minimum."""
        size = rollout.group_size
        groups = [rollout.items[i : i + size] for i in range(0, len(rollout.items), size)]
        kept = [item for group in groups for item in self.best_of(group)]
        total = sum(item.reward or 0.0 for item in kept)
        metrics.add("raft/kept_reward", total, len(kept))
        metrics.add("raft/kept_share", len(kept), len(rollout.items))
        return Rollout(tuple(kept), group_size=1, step=rollout.step)

    def best_of(self, group: Sequence[RewardedCompletion]) -> list[RewardedCompletion]:
        minimum = -float("inf") if self.config.minimum is None else self.config.minimum
        graded = [(item.reward, item) for item in group if item.reward is not None]
        good = [(reward, item) for reward, item in graded if reward >= minimum]
        good.sort(key=lambda pair: -pair[0])  # stable: the earlier of two equal ones comes first
        return [item for _, item in good[: self.config.keep]]

    def record(self, best: Rollout) -> Experience:
        """The completions kept as samples, with the reference's log-probabilities."""
        samples = training_samples(best, mask_truncated=False)
        return record_experience(
            self.policy,
            best,
            samples,
            [slice(0, len(samples))],
            self.context.recipe.optim.micro_batch_tokens,
            self.sampler.params(best.step),
            old=False,
            reference=self.kl.needs_reference_logprobs,
        )

    def learn(self, step: int, experience: Experience, metrics: MetricSums) -> None:
        """One supervised update."""
        samples = experience.samples
        tokens, sequences = self.distributed.sum(
            [sum(s.n_loss_tokens for s in samples), len(samples)]
        )
        count = {"token": tokens, "sequence": sequences}[self.config.reduction]

        def loss_of(scores: Scores, rows: list[int]) -> Tensor:
            loss = sft_loss(scores.logprobs, scores.mask)
            record(metrics, loss.metrics, "raft/")
            sampled = [experience.sampling_logprobs[i] for i in rows]
            own = scores.logprobs.detach()
            gap = aligned_floats(sampled, own)
            self.monitor.engine_gap(step, gap, own, scores.mask, metrics)
            per_token = loss.per_token + self.kl.loss(scores, experience, 0, rows, metrics)
            return reduce_loss(per_token, scores.mask, mode=self.config.reduction, count=count)

        def score_options(rows: list[Sample]) -> dict[str, object]:
            options: dict[str, object] = {"sampling": self.sampler.params(step)}
            if self.kl.is_full:
                options["reference"] = self.policy.reference_states(rows)
            return options

        self.update(step, samples, loss_of, metrics, score_options)

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
