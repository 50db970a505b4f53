"""Proximal policy optimization with a critic, as in RLHF.

PPO (Schulman et al. 2017) on language (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al.
2022): the episode is a completion, an action a token. The reward is the score of the whole
completion, at its last token, less a KL penalty at every token; a critic estimates what is still to
come, and generalized advantage estimation turns both into an advantage for each token. The policy
then makes several passes over the rollout under a clipped probability ratio.

`PPOTrainer.step` is the algorithm, one numbered part after the other; the methods below stand in
the same order. docs/ppo.md goes through the implementation details that the field has found to
matter, each with the test that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.advantages import gae, place_rewards, whiten
from alignment.config.methods.ppo import PPOConfig
from alignment.losses import ppo_clip_loss, reduce_loss
from alignment.modeling.scorer import Scores
from alignment.rollout.sampling import row_key
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.critic import Critic
from alignment.trainers.experience import (
    Experience,
    aligned,
    aligned_floats,
    pick,
    record_experience,
    shaped_rewards,
    training_samples,
)
from alignment.trainers.kl import KLTerm
from alignment.trainers.minibatches import Minibatch, Targets, loss_mask, shuffled_rows
from alignment.trainers.moments import RunningMoments
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.sampler import Sampler
from alignment.trainers.update import Updater, record, record_masked, timed
from alignment.types import Rollout, Sample, StopReason


class PPOTrainer:
    """One step: prompts, rollout, scores, values, advantages, then clipped updates."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, PPOConfig)
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
        self.critic = Critic(context, config.critic)
        self.update = Updater(context, total_steps=config.steps)
        self.update_critic: Updater | None = None
        if context.critic is not None:
            self.update_critic = Updater(
                context,
                total_steps=config.steps,
                trained=context.critic,
                lr=config.critic.lr,
                prefix="critic/",
            )
        self.monitor = RolloutMonitor(context, compares_groups=False)
        self.sampler = Sampler(context, group_size=config.samples_per_prompt, monitor=self.monitor)
        self.score_moments = RunningMoments()

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        # 1. Sample completions from the policy as it is, and grade them.
        with timed(metrics, "rollout"):
            rollout = self.collect(step, metrics)
        # 2. Record what the updates will compare with, before any of them: log-probabilities of
        #    the policy and of the reference, and the critic's values.
        parts = self.sampler.parts(rollout, self.config.updates_per_step)
        with timed(metrics, "record"):
            experience = self.record(rollout, parts, metrics)
            values = self.critic.values(experience.samples, parts)
        # 3. From grades to one score a completion: scaled, clipped, lowered where it has no end.
        scores = self.scores(rollout, metrics)
        # 4. Rewards: the score at the last token, less the KL penalty at every token.
        mask = loss_mask(experience.samples)
        rewards = self.token_rewards(scores, experience, mask, metrics)
        # 5. Advantages and returns of every token, from rewards and values.
        targets = self.targets(rewards, values, mask, metrics)
        # 6. Several passes over the rollout, one update after the other.
        self.critic.rescale(targets.returns[mask], metrics)
        with timed(metrics, "update"):
            self.learn(rollout, experience, targets, metrics)
        # 7. What follows the policy: the KL coefficient, the reference, the limits. In the critic's
        #    warm-up the policy stands still, which is no news for the controller.
        if self.moves_policy(step):
            self.kl.after_step(metrics, self.distributed)
            self.monitor.learned(step, metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        return StepResult(metrics, rollout, targets.mean_advantages())

    # -- 1. sampling --------------------------------------------------------------------------

    def collect(self, step: int, metrics: MetricSums) -> Rollout:
        """Sample completions for the next prompts, and grade them."""
        version = self.update.policy_version
        return self.sampler(step, self.config.prompts_per_step, metrics, policy_version=version)

    # -- 2. recording -------------------------------------------------------------------------

    def groups(self, rollout: Rollout) -> tuple[list[int], list[int]]:
        """Prompts of a rollout by index: this rank's, and those of all ranks."""
        own = [item.prompt.index for item in rollout.items[:: rollout.group_size]]
        return own, self.distributed.gather(own)

    def record(self, rollout: Rollout, parts: Sequence[slice], metrics: MetricSums) -> Experience:
        """The rollout as samples, with log-probabilities of the policy and of the reference."""
        experience = record_experience(
            self.policy,
            rollout,
            training_samples(rollout, mask_truncated=False),
            parts,
            self.context.recipe.optim.micro_batch_tokens,
            self.sampler.params(rollout.step),
            old=True,
            reference=self.policy.reference is not None,
        )
        if experience.samples:
            mask = loss_mask(experience.samples)
            assert experience.old_logprobs is not None
            own = aligned(experience.old_logprobs, torch.zeros(mask.shape))
            sampled = aligned_floats(experience.sampling_logprobs, own)
            self.monitor.engine_gap(rollout.step, sampled, own, mask, metrics)
        return experience

    # -- 3. scores ----------------------------------------------------------------------------

    def scores(self, rollout: Rollout, metrics: MetricSums) -> Tensor:
        """Scores `[N]`; NaN where grading failed, which leaves the sample out of everything."""
        config = self.config
        scores = shaped_rewards(rollout, max_new_tokens=self.rollout_config.max_new_tokens)
        self.monitor.rewards(rollout, scores, metrics)
        if config.normalize_rewards:
            self.score_moments.update(scores, self.distributed.sum)
            scores = (scores - self.score_moments.mean) / self.score_moments.std
        if config.clip_rewards is not None:
            scores = scores.clamp(-config.clip_rewards, config.clip_rewards)
        # Last, so that it means the same on every reward model.
        ends = [item.completion.stop_reason for item in rollout.items]
        endless = torch.tensor([end is StopReason.LENGTH for end in ends], dtype=torch.bool)
        endless &= ~scores.isnan()
        if config.missing_eos_penalty is not None:
            scores = torch.where(endless, scores - config.missing_eos_penalty, scores)
        if config.missing_eos_score is not None:
            scores = torch.where(endless, config.missing_eos_score, scores)
        scored = scores[~scores.isnan()]
        metrics.add("objective/score", float(scored.sum()), len(scored))
        return scores

    # -- 4. rewards ---------------------------------------------------------------------------

    def token_rewards(
        self, scores: Tensor, experience: Experience, mask: Tensor, metrics: MetricSums
    ) -> Tensor:
        """Rewards of every token `[N, T]`, 0 outside the mask."""
        rewards = place_rewards(scores, mask)
        self.kl.measure(experience, metrics)
        if self.kl.in_reward:
            penalties = aligned(self.kl.token_penalties(experience), rewards)
            rewards = torch.where(mask, rewards - penalties, 0.0)
        metrics.add("objective/total", float(rewards.sum()), float(mask.any(dim=1).sum()))
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce_sums=self.over_ranks)
        return rewards

    # -- 5. advantages ------------------------------------------------------------------------

    def targets(
        self, rewards: Tensor, values: Sequence[Tensor], mask: Tensor, metrics: MetricSums
    ) -> Targets:
        """Advantages and returns of every token."""
        config = self.config
        old_values = aligned(values, rewards)
        advantages, returns = gae(rewards, old_values, mask, gamma=config.gamma, lam=config.lam)
        self.critic.measure(old_values[mask], returns[mask], metrics)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce_sums=self.over_ranks)
        return Targets(advantages, returns, old_values, mask)

    def over_ranks(self, sums: Tensor) -> Tensor:
        return torch.tensor(self.distributed.sum(sums.tolist()), dtype=sums.dtype)

    # -- 6. updates ---------------------------------------------------------------------------

    def learn(
        self, rollout: Rollout, experience: Experience, targets: Targets, metrics: MetricSums
    ) -> None:
        """All updates of a step, or as many as `stop_kl` allows."""
        stops, measured = False, MetricSums()
        for rows in self.minibatches(rollout):
            own = sum(experience.samples[row].n_loss_tokens for row in rows)
            (n_tokens,) = self.distributed.sum([own])
            if not n_tokens:
                continue
            stops = self.is_far(measured)  # asked here, where there is something to leave out
            if stops:
                break
            batch = Minibatch(rollout.step, experience, targets, rows, n_tokens)
            measured = MetricSums()
            if self.moves_policy(rollout.step):
                self.update_policy(batch, measured)
            if self.update_critic is not None:
                self.update_separate_critic(self.update_critic, batch, measured)
            metrics.merge(measured)
        if self.config.stop_kl is not None and self.distributed.is_main:
            metrics.add("policy/stopped_early", float(stops))

    def minibatches(self, rollout: Rollout) -> Iterator[Sequence[int]]:
        """This rank's rows of one minibatch after the other, pass by pass.

        The first pass takes the minibatches that were recorded: the same rows share a forward pass
        then, so that the first ratio is exactly one in low precision too. The others shuffle.
        """
        for part in self.sampler.parts(rollout, self.config.updates_per_step):
            yield range(len(rollout.items))[part]
        own, everyones = self.groups(rollout)
        for number in range(1, self.config.epochs_per_step):
            key = row_key(self.context.recipe.run.seed, rollout.step, number, 0)
            n_parts = self.config.updates_per_step
            yield from shuffled_rows(own, everyones, n_parts, rollout.group_size, key)

    def moves_policy(self, step: int) -> bool:
        """Whether the critic's warm-up is over."""
        return step > self.config.critic.warmup_steps

    def update_policy(self, batch: Minibatch, metrics: MetricSums) -> None:
        """One update of the policy, and of a critic that shares its trunk."""

        def score_options(samples: list[Sample]) -> dict[str, object]:
            options: dict[str, object] = {
                "sampling": self.sampler.params(batch.step),
                "entropy": True,
                "entropy_gradient": self.config.entropy_coef != 0,
            }
            if self.kl.is_full:
                options["reference"] = self.policy.reference_states(samples)
            return options

        self.update(
            batch.step,
            batch.samples,
            lambda scores, rows: self.policy_loss(batch, scores, rows, metrics),
            metrics,
            score_options,
        )

    def update_separate_critic(
        self, update: Updater, batch: Minibatch, metrics: MetricSums
    ) -> None:
        """One update of a critic of its own."""
        update(
            batch.step,
            batch.samples,
            lambda read, rows: self.value_loss(batch, read.values, read.mask, rows, metrics),
            metrics,
            lambda _: {"reads": "before"},
        )

    def policy_loss(
        self, batch: Minibatch, scores: Scores, rows: list[int], metrics: MetricSums
    ) -> Tensor:
        """This micro-batch's share of the clipped policy loss and what else acts on the policy."""
        config, own, where = self.config, scores.logprobs, batch.where(rows)
        assert batch.experience.old_logprobs is not None and scores.entropies is not None
        loss = ppo_clip_loss(
            own,
            aligned(pick(batch.experience.old_logprobs, 0, where), own),
            batch.take(batch.targets.advantages, rows, own),
            scores.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        record(metrics, loss.metrics, "policy/")
        record_masked(metrics, "policy/entropy", scores.entropies, scores.mask)
        kl = self.kl.loss(scores, batch.experience, 0, where, None)
        per_token = loss.per_token + kl - config.entropy_coef * scores.entropies
        total = reduce_loss(per_token, scores.mask, mode="token", count=batch.n_tokens)
        if scores.values is not None:
            value_loss = self.value_loss(batch, scores.values, scores.mask, rows, metrics)
            total = total + config.critic.coef * value_loss
        return total

    def value_loss(
        self, batch: Minibatch, values: Tensor, mask: Tensor, rows: list[int], metrics: MetricSums
    ) -> Tensor:
        """This micro-batch's share of the critic's loss."""
        old_values = batch.take(batch.targets.old_values, rows, values)
        returns = batch.take(batch.targets.returns, rows, values)
        per_token = self.critic.loss(values, old_values, returns, mask, metrics)
        return reduce_loss(per_token, mask, mode="token", count=batch.n_tokens)

    def is_far(self, measured: MetricSums) -> bool:
        """Whether a minibatch found the policy further than `stop_kl` from the one that sampled;
        the same on every rank."""
        if self.config.stop_kl is None:
            return False
        total, count = self.distributed.sum(measured.means.get("policy/approx_kl", (0.0, 0.0)))
        return bool(count) and total / count > self.config.stop_kl

    # -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.context.order.state_dict(),
            "update": self.update.state_dict(),
            "update_critic": self.update_critic.state_dict() if self.update_critic else {},
            "critic": self.critic.state_dict(),
            "kl": self.kl.state_dict(),
            "monitor": self.monitor.state_dict(),
            "scores": self.score_moments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.context.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        if self.update_critic is not None:
            self.update_critic.load_state_dict(state["update_critic"])
        self.critic.load_state_dict(state["critic"])
        self.kl.load_state_dict(state["kl"])
        self.monitor.load_state_dict(state["monitor"])
        self.score_moments.load_state_dict(state["scores"])
