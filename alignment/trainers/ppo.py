"""Proximal policy optimization with a critic, as in RLHF.

PPO (Schulman et al. 2017) on language (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al.
2022): the episode is a completion, an action a token. The reward is the score of the whole
completion, at its last token, less a KL penalty at every token; a critic estimates what is still to
come, and generalized advantage estimation turns both into an advantage for each token. The policy
then makes several passes over the rollout under a clipped probability ratio.

docs/ppo.md goes through the implementation details that the field has found to matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignment.advantages import gae, place_rewards, whiten
from alignment.config.methods.ppo import PPOConfig
from alignment.losses import clipped_value_loss, ppo_clip_loss, reduce_loss
from alignment.modeling.heads import ScalarModel
from alignment.modeling.scorer import Scores, completion_tensor
from alignment.rollout.collect import collect
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import (
    Experience,
    aligned,
    aligned_floats,
    minibatch_slices,
    pick,
    record_experience,
    shaped_rewards,
    training_samples,
)
from alignment.trainers.kl import KLTerm
from alignment.trainers.moments import RunningMoments
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.sampling import sampling_params
from alignment.trainers.update import Updater, record, record_masked, timed
from alignment.types import Prompt, Rollout, Sample, SamplingParams, UserInputError


@dataclass(frozen=True, slots=True)
class Targets:
    """What the updates of a step learn from: constants, `[N, T]` on the CPU, one row a sample."""

    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    mask: Tensor

    def mean_advantages(self, samples: Sequence[Sample]) -> list[float]:
        """One number a sample, for the record."""
        lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
        means: list[float] = (self.advantages.sum(dim=1) / lengths).tolist()
        return means


@dataclass(frozen=True, slots=True)
class Minibatch:
    """A part of a rollout that one update is made on; `n_tokens` counts those of all ranks."""

    step: int
    experience: Experience
    targets: Targets
    part: slice
    n_tokens: float

    @property
    def samples(self) -> Sequence[Sample]:
        return self.experience.samples[self.part]

    def take(self, constants: Tensor, rows: Sequence[int], like: Tensor) -> Tensor:
        """The constants `[N, T]` of this minibatch's `rows`, in the shape and place of `like`."""
        return constants[self.part][list(rows), : like.shape[1]].to(like.device)


class PPOTrainer:
    """One step: prompts, rollout, scores, values, advantages, then clipped updates."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, PPOConfig)
        if context.rewards is None:
            raise UserInputError("rewards: PPO learns from rewards; list at least one")
        assert context.recipe.rollout is not None
        self.config = config
        self.rollout_config = context.recipe.rollout
        self.context = context
        self.rewards = context.rewards
        self.policy = context.policy
        self.distributed = context.distributed
        self.total_steps = config.steps
        self.kl = KLTerm(
            config.kl,
            samples_per_step=config.completions_per_step,
            has_reference=context.policy.reference is not None,
        )
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
        self.score_moments = RunningMoments()
        self.return_moments = RunningMoments()

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        with timed(metrics, "rollout"):
            rollout = self.collect(step, metrics)
        parts = self.parts(rollout)
        with timed(metrics, "record"):
            experience = self.record(rollout, parts)
            values = self.values(experience.samples, parts)
        scores = self.scores(rollout, metrics)
        targets = self.targets(scores, values, experience, metrics)
        with timed(metrics, "update"):
            for minibatch in self.minibatches(step, experience, targets, parts):
                if self.learn(minibatch, metrics):
                    break
        # Not before: old values and returns are read in one and the same scale.
        self.return_moments.update(targets.returns[targets.mask], self.distributed.sum)
        self.monitor.learned(step, metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        self.kl.after_step(metrics, self.distributed)
        return StepResult(metrics, rollout, targets.mean_advantages(experience.samples))

    def collect(self, step: int, metrics: MetricSums) -> Rollout:
        """Sample completions for the next prompts, and score them."""
        self.context.engine.weights_updated(self.update.policy_version)
        collected = collect(
            self.context.engine,
            self.rewards.grade,
            self.draw,
            self.config.prompts_per_step,
            self.sampling(step),
            over_ranks=lambda count: int(self.distributed.sum([count])[0]),
        )
        self.monitor.sampled(collected, metrics)
        return collected.rollout

    def draw(self, n_prompts: int) -> list[Prompt]:
        """This rank's share of the next `n_prompts` prompts of all ranks."""
        mine = self.distributed.deal(self.context.order.take(n_prompts))
        return [replace(self.context.train.prompts[row], index=index) for index, row in mine]

    def record(self, rollout: Rollout, parts: Sequence[slice]) -> Experience:
        """The rollout as samples, with log-probabilities of the policy and of the reference."""
        return record_experience(
            self.policy,
            rollout,
            training_samples(rollout, mask_truncated=False),
            parts,
            self.context.recipe.optim.micro_batch_tokens,
            self.sampling(rollout.step),
            old=True,
            reference=self.policy.reference is not None,
        )

    def values(self, samples: Sequence[Sample], parts: Sequence[slice]) -> list[Tensor]:
        """The critic's value where each token is chosen, in units of reward, ragged."""
        budget = self.context.recipe.optim.micro_batch_tokens
        raw: list[Tensor] = []
        for part in parts:
            if self.context.critic is None:
                raw += self.policy.values(samples[part], budget)
            else:
                critic = self.context.critic.model
                assert isinstance(critic, ScalarModel)
                raw += critic.values(samples[part], budget, reads="before")
        return [self.in_reward_units(row.cpu()) for row in raw]

    def scores(self, rollout: Rollout, metrics: MetricSums) -> Tensor:
        """Scores `[N]`: less the penalty for being cut off, scaled, clipped; NaN where grading
        failed."""
        config = self.config
        scores = shaped_rewards(
            rollout,
            max_new_tokens=self.rollout_config.max_new_tokens,
            cut_off_penalty=config.missing_eos_penalty,
        )
        self.monitor.rewards(rollout, scores, metrics)
        if config.normalize_rewards:
            self.score_moments.update(scores[~scores.isnan()], self.distributed.sum)
            scores = (scores - self.score_moments.mean) / self.score_moments.std
        if config.clip_rewards is not None:
            scores = scores.clamp(-config.clip_rewards, config.clip_rewards)
        return scores

    def targets(
        self,
        scores: Tensor,
        values: Sequence[Tensor],
        experience: Experience,
        metrics: MetricSums,
    ) -> Targets:
        """Advantages and returns of every token."""
        config = self.config
        mask = completion_tensor([s.loss_mask for s in experience.samples], torch.bool, "cpu")
        old_values = aligned(values, torch.zeros(mask.shape))
        token_rewards = place_rewards(scores, mask)
        self.kl.measure(experience, metrics)
        if self.kl.in_reward:
            token_rewards = token_rewards - aligned(
                self.kl.token_penalties(experience), token_rewards
            )
        advantages, returns = gae(
            token_rewards, old_values, mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce_sums=self.sum_over_ranks)
        targets = Targets(advantages, returns, old_values, mask)
        self.measure_critic(targets, metrics)
        return targets

    def minibatches(
        self, step: int, experience: Experience, targets: Targets, parts: Sequence[slice]
    ) -> Iterator[Minibatch]:
        """The parts of the rollout, again in every epoch."""
        for _ in range(self.config.epochs_per_step):
            for part in parts:
                own = sum(sample.n_loss_tokens for sample in experience.samples[part])
                (n_tokens,) = self.distributed.sum([own])
                yield Minibatch(step, experience, targets, part, n_tokens)

    def learn(self, batch: Minibatch, metrics: MetricSums) -> bool:
        """One update of the policy and of the critic on a minibatch.

        Returns:
            whether the policy has gone so far from the one that sampled that the step should end.
        """
        if not batch.n_tokens:
            return False
        before = metrics.means.get("policy/approx_kl", (0.0, 0.0))
        if batch.step > self.config.critic.warmup_steps:
            self.update(
                batch.step,
                batch.samples,
                lambda scores, rows: self.policy_loss(batch, scores, rows, metrics),
                metrics,
                lambda rows: self.score_options(batch.step, rows),
            )
        if self.update_critic is not None:
            self.update_critic(
                batch.step,
                batch.samples,
                lambda read, rows: self.value_loss(batch, read.values, read.mask, rows, metrics),
                metrics,
                lambda _: {"reads": "before"},
            )
        return self.went_too_far(before, metrics)

    def policy_loss(
        self, batch: Minibatch, scores: Scores, rows: list[int], metrics: MetricSums
    ) -> Tensor:
        """This micro-batch's share of the clipped policy loss and what else acts on the policy."""
        config, own = self.config, scores.logprobs
        assert batch.experience.old_logprobs is not None and scores.entropies is not None
        old = aligned(pick(batch.experience.old_logprobs, batch.part.start, rows), own)
        loss = ppo_clip_loss(
            own,
            old,
            batch.take(batch.targets.advantages, rows, own),
            scores.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        kl = self.kl.loss(scores, batch.experience, batch.part.start, rows, None)
        per_token = loss.per_token + kl - config.entropy_coef * scores.entropies
        record(metrics, loss.metrics, "policy/")
        record_masked(metrics, "policy/entropy", scores.entropies, scores.mask)
        sampled = [batch.experience.sampling_logprobs[batch.part.start + i] for i in rows]
        gaps = (aligned_floats(sampled, own), old, scores.mask)
        self.monitor.engine_gap(batch.step, *gaps, metrics)
        total = reduce_loss(per_token, scores.mask, mode="token", count=batch.n_tokens)
        if scores.values is not None:
            value_loss = self.value_loss(batch, scores.values, scores.mask, rows, metrics)
            total = total + config.critic.coef * value_loss
        return total

    def value_loss(
        self, batch: Minibatch, values: Tensor, mask: Tensor, rows: list[int], metrics: MetricSums
    ) -> Tensor:
        """This micro-batch's share of the critic's loss, in the critic's own units."""
        loss = clipped_value_loss(
            values,
            self.in_critic_units(batch.take(batch.targets.old_values, rows, values)),
            self.in_critic_units(batch.take(batch.targets.returns, rows, values)),
            mask,
            clip=self.config.critic.clip,
        )
        record(metrics, loss.metrics, "critic/")
        return reduce_loss(loss.per_token, mask, mode="token", count=batch.n_tokens)

    def in_critic_units(self, rewards: Tensor) -> Tensor:
        """Rewards still to come as the critic predicts them."""
        if not self.config.critic.normalize:
            return rewards
        return (rewards - self.return_moments.mean) / self.return_moments.std

    def in_reward_units(self, values: Tensor) -> Tensor:
        """The critic's predictions as rewards still to come."""
        if not self.config.critic.normalize:
            return values
        return values * self.return_moments.std + self.return_moments.mean

    def went_too_far(self, before: tuple[float, float], metrics: MetricSums) -> bool:
        """Whether the last minibatch's KL from the policy that sampled is over the limit."""
        if self.config.stop_kl is None:
            return False
        after = metrics.means.get("policy/approx_kl", (0.0, 0.0))
        total, count = self.distributed.sum([after[0] - before[0], after[1] - before[1]])
        too_far = bool(count) and total / count > self.config.stop_kl
        if self.distributed.is_main:
            metrics.add("policy/stopped_early", float(too_far))
        return too_far

    def score_options(self, step: int, rows: list[Sample]) -> dict[str, object]:
        options: dict[str, object] = {
            "sampling": self.sampling(step),
            "entropy": True,
            "entropy_gradient": self.config.entropy_coef != 0,
        }
        if self.kl.is_full:
            options["reference"] = self.policy.reference_states(rows)
        return options

    def measure_critic(self, targets: Targets, metrics: MetricSums) -> None:
        """How much of the returns' variance the critic foresaw: 1 is all, 0 none."""
        returns = targets.returns[targets.mask].double()
        error = returns - targets.old_values[targets.mask].double()
        sums = [x.sum() for x in (error, error.square(), returns, returns.square())]
        n, e, e2, r, r2 = self.distributed.sum([len(returns), *(float(x) for x in sums)])
        variance = r2 / n - (r / n) ** 2 if n else 0.0
        if variance > 0 and self.distributed.is_main:
            unexplained = e2 / n - (e / n) ** 2
            metrics.add("critic/explained_variance", 1.0 - unexplained / variance)

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        return torch.tensor(self.distributed.sum(sums.tolist()), dtype=sums.dtype)

    def parts(self, rollout: Rollout) -> list[slice]:
        """This rank's rows of each minibatch of the step."""
        own = [item.prompt.index for item in rollout.items[:: rollout.group_size]]
        everyones = self.distributed.gather(own)
        return minibatch_slices(own, everyones, self.config.updates_per_step, rollout.group_size)

    def sampling(self, step: int) -> SamplingParams:
        return sampling_params(
            self.rollout_config,
            n=self.config.samples_per_prompt,
            seed=self.context.recipe.run.seed,
            step=step,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.context.order.state_dict(),
            "update": self.update.state_dict(),
            "update_critic": self.update_critic.state_dict() if self.update_critic else {},
            "kl": self.kl.state_dict(),
            "monitor": self.monitor.state_dict(),
            "scores": self.score_moments.state_dict(),
            "returns": self.return_moments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.context.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        if self.update_critic is not None:
            self.update_critic.load_state_dict(state["update_critic"])
        self.kl.load_state_dict(state["kl"])
        self.monitor.load_state_dict(state["monitor"])
        self.score_moments.load_state_dict(state["scores"])
        self.return_moments.load_state_dict(state["returns"])
