"""One optimizer update: a gradient whole over micro-batches and ranks, then a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignment.activity import doing
from alignment.losses.types import Max, Mean, Metric
from alignment.modeling.memory import OutOfMemory, memory_for, release_memory
from alignment.modeling.optimizer import learning_rate
from alignment.modeling.policy import updating
from alignment.modeling.scorer import Scores, Values
from alignment.modeling.shards import lockstep, rows_of, zero_loss
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import Trained, TrainingContext
from alignment.types import AlignmentError, Sample

LossOf = Callable[[Any, list[int]], Tensor]
"""`Scores` (of a policy) or `Values` (of a model with a scalar head) of a micro-batch and the
indices of its samples in, its share of the loss out."""


class Updater:
    """Makes optimizer updates of one model and counts them.

    Args:
        trained: the model and its optimizer; by default the one that the recipe names.
        lr: peak learning rate; by default the recipe's.
        prefix: put before the names of the metrics (`critic/`).

    Attributes:
        policy_version: updates made so far.
    """

    def __init__(
        self,
        context: TrainingContext,
        *,
        total_steps: int,
        trained: Trained | None = None,
        lr: float | None = None,
        prefix: str = "",
    ) -> None:
        trained = trained or context.trained
        if trained.optimizer is None:
            raise AlignmentError("there is no optimizer: the method says that it does not train")
        self._model = trained.model
        self._optimizer = trained.optimizer
        self._prefix = prefix
        self._distributed = context.distributed
        self._events = context.events
        self._optim = context.recipe.optim
        self._lr = trained.optimizer.base_lr if lr is None else lr
        self._router_aux_coef = context.recipe.model.router_aux_coef
        self._nonfinite_limit = context.recipe.limits.nonfinite_steps
        self._total_steps = total_steps
        self._nonfinite_in_a_row = 0
        self.policy_version = 0

    @doing("update")
    def __call__(
        self,
        step: int,
        samples: Sequence[Sample],
        loss_of: LossOf,
        metrics: MetricSums,
        score_options: Callable[[list[Sample]], dict[str, object]] = lambda _: {},
        *,
        together: int = 1,
    ) -> None:
        """Accumulate `loss_of` over micro-batches of `samples`, and step.

        Args:
            together: so many neighbours are never parted (2 for pairs).

        A non-finite loss or gradient anywhere, on any rank, skips the update on all of them; a
        gradient that reached the optimizer would spread to every weight through clipping.

        Where memory does not hold a micro-batch, the accumulation starts over in smaller ones.

        Raises:
            AlignmentError: too many skipped updates in a row, or memory does not hold the smallest
                micro-batch.
        """
        local_loss = self._gradient(samples, loss_of, metrics, score_options, together)
        self._distributed.sum_gradients(self._optimizer.gradients)
        norm = self._optimizer.clip_(self._optim.max_grad_norm)
        (loss_sum,) = self._distributed.sum([local_loss])
        if math.isfinite(norm) and math.isfinite(loss_sum):
            self._step(step, norm, loss_sum, metrics)
        else:
            self._skip(step, norm, loss_sum, metrics)

    def _gradient(
        self,
        samples: Sequence[Sample],
        loss_of: LossOf,
        metrics: MetricSums,
        score_options: Callable[[list[Sample]], dict[str, object]],
        together: int,
    ) -> float:
        """`_accumulate`, over again in smaller micro-batches where memory does not hold one.

        Nothing in an accumulation waits for other ranks, so that a rank may do that alone; except
        where weights are sharded.
        """
        (n_samples,) = self._distributed.sum([len(samples)])
        budget = self._optim.micro_batch_tokens
        measured = metrics.copy()
        while True:
            try:
                return self._accumulate(
                    samples, n_samples, loss_of, metrics, score_options, together
                )
            except OutOfMemory as error:
                if self._model.shards.lockstep:  # the other ranks wait in the pass that failed
                    raise
                self._model.cap.lower(budget, error, together=together)
            self._optimizer.drop_gradients()
            metrics.restore(measured)
            release_memory()

    def _accumulate(
        self,
        samples: Sequence[Sample],
        n_samples: float,
        loss_of: LossOf,
        metrics: MetricSums,
        score_options: Callable[[list[Sample]], dict[str, object]],
        together: int,
    ) -> float:
        """Add the gradient of this rank's samples, micro-batch by micro-batch; returns its loss."""
        local_loss = 0.0
        budget = self._model.cap(self._optim.micro_batch_tokens)
        shards = self._model.shards
        plan = self._model.plan(samples, budget, together=together)
        with updating(self._model):
            for batch in lockstep(shards, plan):
                rows = rows_of(samples, batch)
                with memory_for(rows):
                    scores = self._model(rows, **score_options(rows))
                    if not batch:  # other ranks have more of them
                        shards.backward(_reach_all(scores))
                        continue
                    loss = loss_of(scores, batch)
                    if scores.aux_loss is not None:
                        share = len(rows) / n_samples
                        loss = loss + self._router_aux_coef * scores.aux_loss * share
                        aux_loss = float(scores.aux_loss.detach())
                        metrics.add("router_loss", aux_loss * len(rows), len(rows))
                    local_loss += float(loss.detach())
                    if shards.lockstep:
                        loss = loss + _reach_all(scores)
                    if loss.requires_grad:
                        shards.backward(loss)
        return local_loss

    def _step(self, step: int, norm: float, loss: float, metrics: MetricSums) -> None:
        lr = learning_rate(
            step - 1,
            base=self._lr,
            schedule=self._optim.schedule,
            warmup_steps=self._optim.warmup_steps,
            total_steps=self._total_steps,
            min_ratio=self._optim.min_lr_ratio,
        )
        self._optimizer.set_lr(lr)
        moved = self._optimizer.step()
        self.policy_version += 1
        self._nonfinite_in_a_row = 0
        if self._distributed.is_main:
            metrics.add(f"{self._prefix}loss", loss)
            metrics.add(f"{self._prefix}optim/grad_norm", norm)
            metrics.add(f"{self._prefix}optim/lr", lr)
            metrics.add(f"{self._prefix}optim/moved_share", moved)
            metrics.add(f"{self._prefix}optim/skipped_updates", 0.0)

    def _skip(self, step: int, norm: float, loss: float, metrics: MetricSums) -> None:
        self._optimizer.drop_gradients()
        self._nonfinite_in_a_row += 1
        if self._distributed.is_main:
            metrics.add(f"{self._prefix}optim/skipped_updates", 1.0)
        self._events.write(
            "nonfinite",
            f"step {step}: {self._prefix}loss {loss}, gradient norm {norm}: the update was skipped",
            step=step,
        )
        if self._nonfinite_in_a_row >= self._nonfinite_limit:
            raise AlignmentError(
                f"the loss or gradient was not finite in {self._nonfinite_in_a_row} updates in a "
                f"row (loss {loss}, gradient norm {norm} at step {step}); the weights are those "
                "of the last finite update. Lower optim.lr, or look at the step's samples"
            )

    def state_dict(self) -> dict[str, int]:
        return {
            "policy_version": self.policy_version,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore, once the optimizer is restored.

        Raises:
            AlignmentError: the optimizer has moments and no update was made, or the other way
                round.
        """
        n_updates = state["policy_version"]
        has_moments = bool(self._optimizer.state_dict()["moments"])
        if has_moments != (n_updates > 0):
            raise AlignmentError(
                f"the checkpoint holds {'' if has_moments else 'no '}moments of the optimizer, and "
                f"counts {n_updates} updates; resume with the version of the toolkit that wrote it"
            )
        self.policy_version = n_updates
        self._nonfinite_in_a_row = state["nonfinite_in_a_row"]


def _reach_all(scores: Scores | Values) -> Tensor:
    """0, with gradients of 0 for all that a model has computed."""
    if isinstance(scores, Values):
        return zero_loss(scores.values, scores.aux_loss)
    return zero_loss(
        scores.logprobs, scores.entropies, scores.full_kl, scores.values, scores.aux_loss
    )


@contextmanager
def timed(metrics: MetricSums, phase: str) -> Iterator[None]:
    """Add the seconds spent inside to `time/PHASE_seconds`, and note the phase."""
    began = time.monotonic()
    try:
        with doing(phase):
            yield
    finally:
        name = f"time/{phase}_seconds"
        total, _ = metrics.means.get(name, (0.0, 1.0))
        metrics.means[name] = (total + time.monotonic() - began, 1.0)


def record(metrics: MetricSums, losses: Mapping[str, Metric], prefix: str = "") -> None:
    """Take a loss's metrics into the step's sums."""
    for name, metric in losses.items():
        match metric:
            case Mean():
                metrics.add(prefix + name, float(metric.total), float(metric.count))
            case Max():
                metrics.add_max(prefix + name, float(metric.largest))


def record_masked(metrics: MetricSums, name: str, values: Tensor, mask: Tensor) -> None:
    """Take the masked mean of a `[B, T]` tensor into the step's sums."""
    kept = torch.where(mask, values.detach().float(), 0.0)
    metrics.add(name, float(kept.sum()), float(mask.sum()))
