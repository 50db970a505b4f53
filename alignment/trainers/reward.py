"""Reward modeling: the likelihood of the preferences under the scores of both answers.

With `normalize`, the last step scores pairs of the training data with the weights it has come to:
their mean and deviation are saved beside the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.reward_model import RewardModelConfig
from alignment.data.text_form import TEXT_FORM, TextForm, fixed_style
from alignment.losses import bradley_terry_loss
from alignment.modeling.finite import require_finite_scores
from alignment.modeling.scalar import SCORE_NORMALIZATION
from alignment.modeling.scorer import Values
from alignment.runs.files import write_atomic
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.moments import RunningMoments
from alignment.trainers.preference import interleaved
from alignment.trainers.update import Updater, record
from alignment.types import Sample, UserInputError

# Pairs that the scores' mean and deviation are measured on, at most. From 512 independent scores
# both have a standard error of some 4% of the deviation.
NORMALIZED_ON = 256


class RewardModelTrainer:
    """One step: draw pairs, score both sides, Bradley-Terry loss, one update."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, RewardModelConfig)
        pairs = context.train.pairs
        if not len(pairs):
            raise UserInputError(
                "data: there is no pair to learn from; a reward model needs rows with 'chosen' and "
                "'rejected'"
            )
        if config.margin == "column" and not pairs.margins:
            raise UserInputError(
                "algorithm.margin: column, but the data's rows have no column 'margin'; add it, "
                "rename yours with the source's `columns` option, or set margin: none"
            )
        if config.margin == "none" and pairs.margins:
            context.events.write(
                "warning",
                "the data's rows have a column 'margin', and algorithm.margin: none does not look "
                "at it; set algorithm.margin: column to have the scores that far apart",
            )
        data = context.recipe.data
        self.config = config
        self.text_form = TextForm(fixed_style(data.style, context.tokenizer), data.system)
        self.model = context.scalar_model
        self.token_budget = context.recipe.optim.micro_batch_tokens
        self.pairs = pairs
        self.order = context.order
        self.distributed = context.distributed
        self.scores = RunningMoments()
        self.total_steps = config.steps or math.ceil(
            (config.epochs or 1) * len(pairs) / config.pairs_per_step
        )
        self.update = Updater(context, total_steps=self.total_steps)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        drawn = self.order.take(self.config.pairs_per_step)
        batch = self.distributed.share([row for _, row in drawn])

        def loss_of(values: Values, rows: list[int]) -> Tensor:
            scores = values.last
            loss = bradley_terry_loss(
                scores[::2],
                scores[1::2],
                margin=self._margins([batch[i // 2] for i in rows[::2]], scores),
                center_coef=self.config.center_coef,
                label_smoothing=self.config.label_smoothing,
            )
            record(metrics, loss.metrics, "reward_model/")
            return loss.per_sequence.sum() / len(drawn)

        self.update(step, self._sides(batch), loss_of, metrics, together=2)
        if self.config.normalize and step == self.total_steps:
            self._measure(metrics)
        if self.distributed.is_main:
            metrics.add("data/epoch", self.order.epoch)
        return StepResult(metrics)

    def _sides(self, rows: Sequence[int]) -> list[Sample]:
        """Both answers of these pairs, side by side, so that they share their prompt's pass."""
        return interleaved(
            (self.pairs.chosen[row] for row in rows), (self.pairs.rejected[row] for row in rows)
        )

    def _margins(self, rows: list[int], like: Tensor) -> Tensor | None:
        """By how much each chosen side is better; None where nothing is asked for."""
        if self.config.margin == "none":
            return None
        return torch.tensor([self.pairs.margins[row] for row in rows], device=like.device)

    def _measure(self, metrics: MetricSums) -> None:
        """Take mean and deviation of the scores as they are now, on pairs spread over the data."""
        n_pairs = min(len(self.pairs), NORMALIZED_ON)
        rows = [i * len(self.pairs) // n_pairs for i in range(n_pairs)]
        samples = self._sides(self.distributed.share(rows))
        scores = self.model.scores(samples, self.token_budget)
        require_finite_scores(scores, self.model)
        self.scores = RunningMoments()
        self.scores.update(torch.tensor(scores, dtype=torch.float64), self.distributed.sum)
        if self.distributed.is_main:
            metrics.add("reward_model/score/mean", self.scores.mean)
            metrics.add("reward_model/score/std", self.scores.std)

    def extra_files(self, folder: Path) -> None:
        """Write what belongs beside the saved model: what it reads, and how its scores are
        normalized."""
        write_atomic(folder / TEXT_FORM, self.text_form.to_json())
        if self.config.normalize:
            stated = {"mean": self.scores.mean, "std": self.scores.std, "count": self.scores.count}
            write_atomic(folder / SCORE_NORMALIZATION, json.dumps(stated) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.order.state_dict(),
            "update": self.update.state_dict(),
            "scores": self.scores.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        self.scores.load_state_dict(state["scores"])
