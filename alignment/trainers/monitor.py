"""Watches what RL samples and learns: metrics of rollouts, and why nothing is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.rewards.compose import check_unscorable, described_failures, unscorable_share
from alignment.rollout.collect import Collected, has_spread
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.update import record_masked
from alignment.types import AlignmentError, Outcome, RewardedCompletion, Rollout, StopReason

# Steps in a row whose engine gap may be over the limit before the run stops.
_GAP_PATIENCE = 3


class RolloutMonitor:
    """Metrics and limits of an RL trainer's rollouts.

    Args:
        compares_groups: whether the method learns from differences inside a prompt's group, so that
            without any there is nothing to learn; else from differences within the step.
    """

    def __init__(self, context: TrainingContext, *, compares_groups: bool = True) -> None:
        self._compares_groups = compares_groups
        self._limits = context.recipe.limits
        self._events = context.events
        self._distributed = context.distributed
        # Recorded completions may be those of any policy: their gap is measured, and no fault.
        self._limits_gap = context.recorded is None
        self._gaps_in_a_row = 0
        self._idle_in_a_row = 0
        self._reasons: list[str] = []

    def sampled(self, collected: Collected, metrics: MetricSums) -> None:
        """All that was sampled, also what dynamic sampling dropped.

        Raises:
            AlignmentError: more completions than allowed could not be scored.
        """
        items = collected.sampled
        group_size = collected.rollout.group_size
        groups = [items[i : i + group_size] for i in range(0, len(items), group_size)]
        n_spread = sum(has_spread(group) for group in groups)
        rewards = {item.reward for item in items if item.reward is not None}
        everyones = set(self._distributed.gather(sorted(rewards)))
        n_cut_off = sum(i.completion.stop_reason is StopReason.LENGTH for i in items)
        if self._compares_groups:
            metrics.add("groups/with_spread", n_spread, len(groups))
        metrics.add("rollout/rounds", collected.n_rounds)
        metrics.add("completion/length", _total_length(items), len(items))
        metrics.add("completion/cut_off", n_cut_off, len(items))
        for outcome in Outcome:
            count = sum(item.outcome is outcome for item in items)
            metrics.add(f"outcome/{outcome.value}", count, len(items))
        for outcome, share in unscorable_share(items).items():
            metrics.add(f"unscorable/{outcome.value}", share * len(items), len(items))
        _record_parts(items, metrics)
        spread, cut_off, total = self._distributed.sum([n_spread, n_cut_off, len(items)])
        self._reasons = []
        if total and cut_off == total:
            self._reasons.append(
                f"all {total:.0f} completions were cut off at the limit; raise "
                "rollout.max_new_tokens, or fine-tune the model to end its answers"
            )
        if not spread and (self._compares_groups or len(everyones) == 1):
            self._reasons.append(_no_spread(everyones))
        failed = self._distributed.gather([item for item in items if item.reward is None])
        if failed and self._distributed.is_main:
            step = collected.rollout.step
            self._events.write(
                "unscorable",
                f"step {step}: {len(failed)} of {total:.0f} completions could not be scored and "
                f"are left out of the loss {described_failures(failed)}",
                step=step,
                completions=len(failed),
            )
        check_unscorable(failed, self._limits.unscorable, among=int(total))

    def rewards(self, rollout: Rollout, rewards: Tensor, metrics: MetricSums) -> None:
        """The shaped rewards that advantages are made from."""
        scored = rewards[~rewards.isnan()]
        if not len(scored):
            return
        metrics.add("reward/mean", float(scored.sum()), len(scored))
        if not self._compares_groups:
            return
        # A group without any score has no spread, rather than one of 0.
        groups = [group[~group.isnan()] for group in rewards.reshape(-1, rollout.group_size)]
        spread = torch.stack([group.std(correction=0) for group in groups if len(group)])
        metrics.add("reward/std_in_group", float(spread.sum()), len(spread))

    def engine_gap(
        self, step: int, sampled: Tensor, scored: Tensor, mask: Tensor, metrics: MetricSums
    ) -> None:
        """How far the engine's log-probabilities are from the trainer's, per token."""
        gap = (sampled - scored).abs()
        record_masked(metrics, "engine/logprob_gap", gap, mask)
        metrics.add_max("engine/logprob_gap_max", float(torch.where(mask, gap, 0.0).max()))

    def learned(self, step: int, metrics: MetricSums) -> None:
        """After the updates of a step: stop where engine and trainer disagree, or nothing moves.

        Raises:
            AlignmentError: a limit was passed for several steps in a row.
        """
        self._check_gap(step, metrics)
        norm_total, norm_count = metrics.means.get("optim/grad_norm", (0.0, 0.0))
        norm_total, norm_count = self._distributed.sum([norm_total, norm_count])
        if norm_count and norm_total == 0.0:
            self._reasons.append("the gradient is exactly zero")
        idle = bool(self._reasons) and (not norm_count or norm_total == 0.0)
        self._idle_in_a_row = self._idle_in_a_row + 1 if idle else 0
        for reason in self._reasons:
            if step == 1 or idle:
                self._events.write("diagnosis", f"step {step}: {reason}", step=step)
        if self._idle_in_a_row >= self._limits.idle_steps:
            raise AlignmentError(
                f"nothing could be learned in {self._idle_in_a_row} steps in a row: "
                + "; ".join(self._reasons)
                + ". The weights are unchanged since. (limits.idle_steps sets how many are allowed)"
            )

    def _check_gap(self, step: int, metrics: MetricSums) -> None:
        total, count = metrics.means.get("engine/logprob_gap", (0.0, 0.0))
        total, count = self._distributed.sum([total, count])
        if not (count and self._limits_gap) or total / count <= self._limits.logprob_gap:
            self._gaps_in_a_row = 0
            return
        self._gaps_in_a_row += 1
        message = (
            f"step {step}: the rollout engine's log-probabilities are {total / count:.3f} nats a "
            f"token from the trainer's (limits.logprob_gap is {self._limits.logprob_gap}); its "
            "weights are stale, or its sampling transforms or precision differ"
        )
        self._events.write("warning", message, step=step)
        if self._gaps_in_a_row >= _GAP_PATIENCE:
            raise AlignmentError(message)

    def state_dict(self) -> dict[str, Any]:
        return {"gaps_in_a_row": self._gaps_in_a_row, "idle_in_a_row": self._idle_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._gaps_in_a_row = state["gaps_in_a_row"]
        self._idle_in_a_row = state["idle_in_a_row"]


def _total_length(items: Sequence[RewardedCompletion]) -> int:
    return sum(len(item.completion.token_ids) for item in items)


def _record_parts(items: Sequence[RewardedCompletion], metrics: MetricSums) -> None:
    names = {name: None for item in items for name in item.parts}
    for name in names:
        values = [
            item.parts[name].value
            for item in items
            if name in item.parts and item.parts[name].value is not None
        ]
        metrics.add(f"reward/{name}", sum(v for v in values if v is not None), len(values))


def _no_spread(rewards: set[float]) -> str:
    """Why no group has spread, given the distinct rewards of all groups."""
    if len(rewards) == 1:
        return (
            f"every reward is {rewards.pop():g}, so no completion is better than another; make the "
            "task easier or harder, or fine-tune first"
        )
    return (
        "no group has completions of different reward, so there is nothing to compare; raise "
        "group_size or the temperature, or choose prompts of middling difficulty"
    )
