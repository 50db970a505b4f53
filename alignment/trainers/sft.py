"""Supervised fine-tuning: maximise the log-likelihood of the marked completion tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignment.config.methods.sft import SFTConfig
from alignment.losses import reduce_loss, sft_loss
from alignment.modeling.scorer import Scores
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.update import Updater, record, record_masked
from alignment.types import UserInputError


class SFTTrainer:
    """One step: draw samples, negative log-likelihood, one update."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, SFTConfig)
        if not context.train.samples:
            raise UserInputError("data: there is no sample to fine-tune on; SFT needs completions")
        self.config = config
        self.samples = context.train.samples
        self.order = context.order
        self.distributed = context.distributed
        self.total_steps = config.steps or math.ceil(
            (config.epochs or 1) * len(context.train.samples) / config.samples_per_step
        )
        self.update = Updater(context, total_steps=self.total_steps)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        drawn = self.order.take(self.config.samples_per_step)
        batch = self.distributed.share([self.samples[row] for _, row in drawn])
        tokens, sequences = self.distributed.sum(
            [sum(s.n_loss_tokens for s in batch), sum(s.n_loss_tokens > 0 for s in batch)]
        )
        count = {"token": tokens, "sequence": sequences}[self.config.reduction]

        def loss_of(scores: Scores, _: list[int]) -> Tensor:
            loss = sft_loss(scores.logprobs, scores.mask)
            record(metrics, loss.metrics, "sft/")
            assert scores.greedy is not None
            record_masked(metrics, "sft/token_accuracy", scores.greedy, scores.mask)
            return reduce_loss(loss.per_token, scores.mask, mode=self.config.reduction, count=count)

        self.update(step, batch, loss_of, metrics, lambda _: {"greedy": True})
        if self.distributed.is_main:
            metrics.add("sft/loss_tokens", tokens)
        return StepResult(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.state_dict(), "update": self.update.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
