"""Kahneman-Tversky optimization: learning from completions labelled desirable or not.

KTO (Ethayarajh et al. 2024) takes each completion by itself: its implied reward, beta log(policy /
reference), is valued against a reference point, the KL divergence of the policy from the
reference, by a curve that flattens on both sides. That point is estimated at each step from the
batch's completions behind other prompts than their own. Its relatives have other points and curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.kto import KTOConfig, UnpairedLossConfig
from alignment.losses import SequenceLoss, bco_loss, kto_kl, kto_loss
from alignment.modeling.scorer import Scores
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult, TrainingContext
from alignment.trainers.experience import aligned, pick
from alignment.trainers.update import Updater, record, timed
from alignment.types import LabelledSample, Sample, UserInputError

# All desirable samples' weight over all undesirable ones': the range that the paper recommends.
_BALANCE = (1.0, 4.0 / 3.0)

# Of each kind: (logps, ref_logps, desirable, point, *, beta, desirable_weight, undesirable_weight).
_LOSSES: Mapping[str, Callable[..., SequenceLoss]] = {
    "kto": kto_loss,
    "apo_zero_unpaired": kto_loss,  # at the point 0
    "bco": bco_loss,
}


class KTOTrainer:
    """One step: draw samples, reference log-probabilities and reference point, loss, one update."""

    def __init__(self, context: TrainingContext) -> None:
        config = context.recipe.algorithm
        assert isinstance(config, KTOConfig)
        if not context.train.labelled:
            raise UserInputError("data: there is no labelled completion to learn from")
        self.config = config
        self.labelled = context.train.labelled
        self.order = context.order
        self.distributed = context.distributed
        self.policy = context.policy
        self.token_budget = context.recipe.optim.micro_batch_tokens
        # A completion behind another prompt may be longer than either was.
        self.max_tokens = max(
            len(one.sample.prompt_ids) + len(one.sample.completion_ids) for one in self.labelled
        )
        self.total_steps = config.steps or math.ceil(
            (config.epochs or 1) * len(self.labelled) / config.samples_per_step
        )
        self.update = Updater(context, total_steps=self.total_steps)
        self.bco_shift = 0.0
        warning = balance_warning(self.labelled, config.loss)
        if warning:
            context.events.write("warning", warning)

    def step(self, step: int) -> StepResult:
        metrics = MetricSums()
        drawn = [self.labelled[row] for _, row in self.order.take(self.config.samples_per_step)]
        batch = self.distributed.share(drawn)
        samples = [one.sample for one in batch]
        with timed(metrics, "record"):
            point = self.point([one.sample for one in drawn])
            reference = self.policy.logprobs(samples, self.token_budget, of_reference=True)
        with timed(metrics, "update"):
            self.learn(step, batch, reference, point, metrics)
        self._move_shift(metrics)
        if self.policy.reference is not None:
            self.policy.reference.after_step(step)
        return StepResult(metrics)

    def point(self, drawn: Sequence[Sample]) -> float:
        """What implied rewards are held against: in nats, or of bco in units of reward."""
        if self.config.loss.kind == "kto":
            return self.reference_point(drawn)
        return self.bco_shift

    def reference_point(self, drawn: Sequence[Sample]) -> float:
        """KL(policy || reference) in nats a sequence, from the samples of all ranks; at least 0.

        It is 0 too where all samples of the step have one prompt, so that none can be mismatched.
        """
        others = self.distributed.share(mismatched(drawn, self.max_tokens))
        own, reference = (
            _sums(self.policy.logprobs(others, self.token_budget, of_reference=which), others)
            for which in (False, True)
        )
        pairs = self.distributed.gather(list(zip(own, reference, strict=True)))
        if not pairs:
            return 0.0
        own_of_all, reference_of_all = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
        return float(kto_kl(own_of_all, reference_of_all))

    def learn(
        self,
        step: int,
        batch: Sequence[LabelledSample],
        reference: Sequence[Tensor],
        point: float,
        metrics: MetricSums,
    ) -> None:
        """One optimizer update."""
        config = self.config.loss
        loss_of_kind = _LOSSES[config.kind]

        def loss_of(scores: Scores, rows: list[int]) -> Tensor:
            ref = aligned(pick(reference, 0, rows), scores.logprobs)
            desirable = [batch[row].desirable for row in rows]
            loss = loss_of_kind(
                torch.where(scores.mask, scores.logprobs, 0.0).sum(dim=1),
                torch.where(scores.mask, ref, 0.0).sum(dim=1),
                torch.tensor(desirable, device=ref.device),
                point,
                beta=config.beta,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
            )
            record(metrics, loss.metrics, "kto/")
            return loss.per_sequence.sum() / self.config.samples_per_step

        self.update(step, [one.sample for one in batch], loss_of, metrics)

    def _move_shift(self, metrics: MetricSums) -> None:
        """Move bco's shift by the mean of the two classes' mean rewards, over all ranks."""
        decay = self.config.loss.bco_decay
        if decay is None:
            return
        names = ("kto/reward/desirable", "kto/reward/undesirable")
        sums = [x for name in names for x in metrics.means.get(name, (0.0, 0.0))]
        good, n_good, bad, n_bad = self.distributed.sum(sums)
        if n_good and n_bad:  # of one class alone, the mean is no border between two
            middle = (good / n_good + bad / n_bad) / 2
            if math.isfinite(middle):  # else the update was skipped
                self.bco_shift = decay * self.bco_shift + (1 - decay) * middle

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.order.state_dict(),
            "update": self.update.state_dict(),
            "bco_shift": self.bco_shift,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.update.load_state_dict(state["update"])
        self.bco_shift = state["bco_shift"]


def mismatched(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Each sample's completion behind the prompt of the next sample that has another one.

    A sample without such a partner is left out. The completion is cut where the two together are
    longer than `max_tokens`.
    """
    out = []
    for i, sample in enumerate(samples):
        others = (*samples[i + 1 :], *samples[:i])
        prompt = next((o.prompt_ids for o in others if o.prompt_ids != sample.prompt_ids), None)
        if prompt is not None:
            room = max(max_tokens - len(prompt), 1)
            out.append(Sample(prompt, sample.completion_ids[:room], sample.loss_mask[:room]))
    return out


def balance_warning(labelled: Sequence[LabelledSample], config: UnpairedLossConfig) -> str:
    """What is wrong with the weights of the two classes, with a remedy; "" if nothing is."""
    n_desirable = sum(one.desirable for one in labelled)
    n_undesirable = len(labelled) - n_desirable
    counts = f"{n_desirable} desirable and {n_undesirable} undesirable samples"
    if not n_desirable or not n_undesirable:
        return f"KTO: {counts}; there is one class only, so nothing is held against the other"
    desirable = config.desirable_weight * n_desirable
    undesirable = config.undesirable_weight * n_undesirable
    low, high = _BALANCE
    # Weights are given to two or three digits: 1.33 x 3 against 4 x 1 is within the range.
    balanced = low * undesirable * 0.99 <= desirable <= high * undesirable * 1.01
    if balanced or config.kind != "kto":
        return ""
    return (
        f"KTO: {counts} weigh {desirable:g} to {undesirable:g}; KTO works best from 1:1 to 4:3. "
        + _remedy(config, n_desirable, n_undesirable)
    )


def _remedy(config: UnpairedLossConfig, n_desirable: int, n_undesirable: int) -> str:
    """Raise the weight of the class that is too light."""
    if config.desirable_weight * n_desirable > config.undesirable_weight * n_undesirable:
        weight = config.desirable_weight * n_desirable / n_undesirable
        return f"Set algorithm.loss.undesirable_weight to {weight:.3g}"
    weight = config.undesirable_weight * n_undesirable / n_desirable
    return f"Set algorithm.loss.desirable_weight to {weight:.3g}"


def _sums(logprobs: Sequence[Tensor], samples: Sequence[Sample]) -> list[float]:
    """Over the tokens that count, one number a sample."""
    return [
        float(row[torch.tensor(sample.loss_mask, device=row.device)].sum())
        for row, sample in zip(logprobs, samples, strict=True)
    ]
