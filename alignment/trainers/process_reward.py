"""Process reward modeling: cross-entropy of each step's label under the score at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.reward_model import ProcessRewardModelConfig
from alignment.data.text_form import TEXT_FORM, TextForm, fixed_style
from alignment.losses import process_reward_loss, reduce_loss
from alignment.modeling.scorer import Values
from alignment.runs.files import write_atomic
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.update import Updater, record
from alignment.types import SteppedSample, UserInputError


class ProcessRewardTrainer:
    """One step: draw answers, score the ends of their steps, cross-entropy, one update."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, ProcessRewardModelConfig)
        if not context.train.steps:
            raise UserInputError(
                "data: there is no labelled step to learn from; a process reward model needs rows "
                "with 'prompt', 'completions' (the steps) and 'labels'"
            )
        data = context.recipe.data
        self.config = config
        self.text_form = TextForm(
            fixed_style(data.style, context.tokenizer), data.system, config.separator
        )
        self.answers = context.train.steps
        self.order = context.order
        self.distributed = context.distributed
        self.total_steps = config.steps or math.ceil(
            (config.epochs or 1) * len(self.answers) / config.samples_per_step
        )
        self.update = Updater(context, total_steps=self.total_steps)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        drawn = self.order.take(self.config.samples_per_step)
        batch = self.distributed.share([self.answers[row] for _, row in drawn])
        (count,) = self.distributed.sum([sum(len(answer.labels) for answer in batch)])

        def loss_of(values: Values, rows: list[int]) -> Tensor:
            labels = aligned_labels([batch[i] for i in rows], values.mask)
            loss = process_reward_loss(values.values, labels, values.mask)
            record(metrics, loss.metrics, "process_reward_model/")
            return reduce_loss(loss.per_token, values.mask, count=count)

        self.update(step, [answer.sample for answer in batch], loss_of, metrics)
        if self.distributed.is_main:
            metrics.add("data/epoch", self.order.epoch)
        return StepResult(metrics)

    def extra_files(self, folder: Path) -> None:
        """Write what belongs beside the saved model: what it reads."""
        write_atomic(folder / TEXT_FORM, self.text_form.to_json())

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.state_dict(), "update": self.update.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])


def aligned_labels(answers: list[SteppedSample], mask: Tensor) -> Tensor:
    """Labels `[B, T]` where `mask` is True, the ends of the steps; 0 elsewhere."""
    given = [label for answer in answers for label in answer.labels]
    labels = torch.zeros(mask.shape, device=mask.device)
    # Row by row, and in a row from left to right: the order in which a mask selects.
    labels[mask] = torch.tensor(given, device=mask.device)
    return labels
