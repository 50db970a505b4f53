"""Data sets out of the policy's own samples: best-of-n demonstrations, and labelled pairs.

A step samples, grades, and hands the loop rows; nothing is trained. The rows end up in the run's
`data.jsonl`, which a later stage reads ("${stages.NAME.data}").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignment.config.methods.make_data import PreferenceSamplingConfig, RejectionSamplingConfig
from alignment.data.prompts import prompt_column
from alignment.rollout.sampling import row_key, uniforms
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import shaped_rewards
from alignment.trainers.monitor import RolloutMonitor
from alignment.trainers.sampler import Sampler
from alignment.trainers.update import timed
from alignment.types import Prompt, RewardedCompletion, Rollout, StopReason

Row = dict[str, Any]
Group = Sequence[RewardedCompletion]

_UNUSABLE = ("blank", "cut_off", "failed")  # failed: the grader


def demonstrations(
    group: Group, config: RejectionSamplingConfig, _: int, metrics: MetricSums
) -> list[Row]:
    """The best completions of a prompt, the earlier of two equal ones first."""
    usable = _usable(group, config.keep_cut_off, metrics)
    good = [item for item in usable if config.minimum is None or item.reward >= config.minimum]
    good.sort(key=lambda item: -item.reward)
    kept = good[: config.keep]
    metrics.add("made/prompts_with_rows", float(bool(kept)), 1)
    return [_row(item.prompt, completion=item.completion.text, reward=item.reward) for item in kept]


def preferences(
    group: Group, config: PreferenceSamplingConfig, seed: int, metrics: MetricSums
) -> list[Row]:
    """Labelled pairs of a prompt's completions."""
    usable = _usable(group, config.keep_cut_off, metrics)
    alone = len(usable) % 2 if config.pairs == "neighbours" else len(usable) == 1
    metrics.add_count("made/left_out/unpaired", float(alone))
    rows = []
    for number, (one, other) in enumerate(_PAIRINGS[config.pairs](usable)):
        tied = abs(one.reward - other.reward) <= config.min_gap
        tied = tied or one.completion.text == other.completion.text
        metrics.add_count("made/tied_pairs", float(tied))
        if tied:
            continue
        key = np.array([row_key(seed, 0, one.prompt.index, number)], dtype=np.uint64)
        label, flip = uniforms(np.repeat(key, 2), np.array([0, 1]))
        prefers_one = label < _probability(one.reward - other.reward, config.temperature)
        if flip < config.flip:
            prefers_one = not prefers_one
        chosen, rejected = (one, other) if prefers_one else (other, one)
        metrics.add("made/labels_against_reward", float(chosen.reward < rejected.reward), 1)
        rows.append(
            _row(
                one.prompt,
                chosen=chosen.completion.text,
                rejected=rejected.completion.text,
                reward_chosen=chosen.reward,
                reward_rejected=rejected.reward,
            )
        )
    return rows


MAKERS: Mapping[str, Callable[[Group, Any, int, MetricSums], list[Row]]] = {
    "rejection_sampling": demonstrations,
    "preference_sampling": preferences,
}
"""(completions of one prompt, the method's section, run seed, metrics) to rows."""


class DataMaker:
    """One step: prompts, rollout, rewards, rows."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, RejectionSamplingConfig | PreferenceSamplingConfig)
        assert context.recipe.rollout is not None
        self.config = config
        self.context = context
        self.rollout_config = context.recipe.rollout
        self.total_steps = config.steps or math.ceil(
            len(context.train.prompts) / config.prompts_per_step
        )
        self.monitor = RolloutMonitor(context)
        self.sampler = Sampler(context, group_size=config.samples_per_prompt, monitor=self.monitor)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        with timed(metrics, "rollout"):
            rollout = self.collect(step, metrics)
        items, n = rollout.items, rollout.group_size
        rewards = shaped_rewards(rollout, max_new_tokens=self.rollout_config.max_new_tokens)
        self.monitor.rewards(rollout, rewards, metrics)
        make, seed = MAKERS[self.config.type], self.context.recipe.run.seed
        rows = [
            (group[0].prompt.index, row)
            for group in (items[i : i + n] for i in range(0, len(items), n))
            for row in make(group, self.config, seed, metrics)
        ]
        metrics.add_count("made/rows", len(rows))
        return StepResult(metrics, rollout, rows=rows)

    def collect(self, step: int, metrics: MetricSums) -> Rollout:
        """Sample and grade groups for the next prompts."""
        return self.sampler(step, self.n_prompts(step), metrics)

    def n_prompts(self, step: int) -> int:
        """Prompts of a step; the last step of a single pass has what is left."""
        if self.config.steps is not None:
            return self.config.prompts_per_step
        left = len(self.context.train.prompts) - (step - 1) * self.config.prompts_per_step
        return min(self.config.prompts_per_step, left)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.context.order.state_dict(), "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.context.order.load_state_dict(state["order"])
        self.monitor.load_state_dict(state["monitor"])


def _usable(group: Group, keep_cut_off: bool, metrics: MetricSums) -> list[Any]:
    """Completions with a reward and something to say; without those cut off, unless wanted."""
    reasons = [_why_unusable(item, keep_cut_off) for item in group]
    for reason in _UNUSABLE:
        metrics.add_count(f"made/left_out/{reason}", reasons.count(reason))
    return [item for item, reason in zip(group, reasons, strict=True) if not reason]


def _why_unusable(item: RewardedCompletion, keep_cut_off: bool) -> str:
    """One of `_UNUSABLE`, or "" for a completion that can come into a row."""
    if not item.completion.text.strip():
        return "blank"
    if item.completion.stop_reason is not StopReason.STOP and not keep_cut_off:
        return "cut_off"
    return "failed" if item.reward is None else ""


def _neighbours(items: Group) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=False))


def _best_and_worst(items: Group) -> list[tuple[Any, Any]]:
    if len(items) < 2:
        return []
    ranked = sorted(items, key=lambda item: -(item.reward or 0.0))
    return [(ranked[0], ranked[-1])]


_PAIRINGS: Mapping[str, Callable[[Group], list[tuple[Any, Any]]]] = {
    "neighbours": _neighbours,
    "best_worst": _best_and_worst,
}


def _probability(difference: float, temperature: float | None) -> float:
    """That the first of two is preferred."""
    if temperature is None:
        return float(difference > 0)
    return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, difference / temperature))))


def _row(prompt: Prompt, **columns: Any) -> Row:
    return {"prompt": prompt_column(prompt.row), **columns}
