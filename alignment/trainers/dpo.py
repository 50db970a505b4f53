"""Direct preference optimization, and its relatives by table.

DPO (Rafailov et al. 2023): the policy that maximises a reward under a KL penalty has that reward as
beta log(policy / reference), up to a constant of the prompt; so a preference between two answers is
fitted by the policy itself, without a reward model. What the kinds of loss make of the two
log-ratios is in `alignment.losses.preference_kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alignment.config.methods.dpo import DPOConfig
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.precomputed import precomputed_logprobs
from alignment.trainers.preference import PairLearner, interleaved
from alignment.trainers.update import Updater, timed
from alignment.types import Sample, UserInputError


class DPOTrainer:
    """One step: draw pairs, reference log-probabilities, loss, one update."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, DPOConfig)
        if not len(context.train.pairs):
            raise UserInputError(
                "data: there is no preference pair to learn from; DPO needs chosen and rejected "
                "completions"
            )
        self.config = config
        self.pairs = context.train.pairs
        self.order = context.order
        self.distributed = context.distributed
        self.policy = context.policy
        self.total_steps = config.steps or math.ceil(
            (config.epochs or 1) * len(self.pairs) / config.pairs_per_step
        )
        self.precomputed: list[Tensor] | None = None
        if config.uses_reference and context.recipe.model.reference.mode == "precomputed":
            samples = interleaved(self.pairs.chosen, self.pairs.rejected)
            self.precomputed = precomputed_logprobs(context, samples)
        self.update = Updater(context, total_steps=self.total_steps)
        self.learn = PairLearner(context, config.loss, self.update)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        drawn = self.order.take(self.config.pairs_per_step)
        rows = self.distributed.share([row for _, row in drawn])
        samples = interleaved(
            (self.pairs.chosen[row] for row in rows), (self.pairs.rejected[row] for row in rows)
        )
        with timed(metrics, "record"):
            reference = self.reference(rows, samples)
        with timed(metrics, "update"):
            self.learn(step, samples, reference, metrics)
        self.learn.after_step(step, metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        return StepResult(metrics)

    def reference(self, rows: Sequence[int], samples: Sequence[Sample]) -> list[Tensor] | None:
        """The reference's log-probabilities of these pairs; None where the loss looks at none."""
        if self.precomputed is not None:
            return [self.precomputed[2 * row + side] for row in rows for side in (0, 1)]
        return self.learn.reference(samples)

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.order.state_dict(),
            "update": self.update.state_dict(),
            "learn": self.learn.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        self.learn.load_state_dict(state["learn"])
