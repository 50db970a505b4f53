"""What methods that learn from preference pairs share: a recipe's loss, and one update on pairs.

Pairs are laid out chosen, rejected, chosen, rejected, and are never parted: both sides of a pair
share their prompt's computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignment.config.methods.preference import NLL, PreferenceLossConfig
from alignment.losses import (
    Mean,
    SequenceLoss,
    desensitized_sums,
    preference_loss,
    sequence_weights,
)
from alignment.modeling.memory import micro_batched
from alignment.modeling.policy import PolicyWithReference
from alignment.modeling.scorer import Scores
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.experience import aligned, pick
from alignment.trainers.update import Updater, record, record_masked
from alignment.types import Sample

# Mean log-ratio of the chosen completions' tokens, in nats, below which the run says so. DPO pushes
# both sides of its pairs down; here the policy gives each preferred token 0.6 times the
# probability that the reference does.
DISPLACED = -0.5


def interleaved(chosen: Iterable[Sample], rejected: Iterable[Sample]) -> list[Sample]:
    """chosen, rejected, chosen, rejected, ..."""
    return [side for pair in zip(chosen, rejected, strict=True) for side in pair]


def reference_logprobs(
    policy: PolicyWithReference, samples: Sequence[Sample], token_budget: int
) -> list[Tensor]:
    """The reference's log-probabilities of interleaved pairs, one tensor a sample.

    The micro-batches are those of the update, so that a policy that equals its reference gets the
    same numbers bit for bit, in low precision too.
    """
    return policy.logprobs(samples, token_budget, of_reference=True, together=2)


@dataclass(frozen=True, slots=True, eq=False)
class PairSums:
    """What a preference loss looks at, all `[P]` float32; the reference is 0 where there is none.

    chosen, rejected: log-probabilities summed over completion tokens.
    ref_chosen, ref_rejected: of the reference.
    chosen_lengths, rejected_lengths: tokens behind the sums.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @classmethod
    def of(
        cls, logprobs: Tensor, reference: Tensor, mask: Tensor, *, desensitize: float | None
    ) -> PairSums:
        """From interleaved `[2 P, T]` rows.

        Args:
            desensitize: weight of the longer side's excess tokens (LD-DPO); None weighs all alike.
        """
        lengths = mask.sum(dim=1)
        if desensitize is None:
            sums = [torch.where(mask, x, 0.0).sum(dim=1) for x in (logprobs, reference)]
        else:
            public = torch.minimum(lengths[::2], lengths[1::2]).repeat_interleave(2)
            sums = [desensitized_sums(x, mask, public, desensitize) for x in (logprobs, reference)]
        columns = [side for x in (*sums, lengths.float()) for side in (x[::2], x[1::2])]
        return cls(*columns)

    def rows(self) -> list[list[float]]:
        """One list of six numbers a pair."""
        columns = [getattr(self, name).detach() for name in self.__slots__]
        rows: list[list[float]] = torch.stack(columns, dim=1).tolist()
        return rows

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]], device: torch.device) -> PairSums:
        """The inverse of `rows`."""
        return cls(*torch.tensor(rows, dtype=torch.float32, device=device).unbind(dim=1))


def pair_loss(config: PreferenceLossConfig, sums: PairSums, *, bco_shift: float) -> SequenceLoss:
    """The recipe's loss of each pair, `[P]`."""
    optional = {
        "alpha": config.alpha,
        "simpo_gamma": config.simpo_gamma,
        "discopop_tau": config.discopop_tau,
    }
    has_reference = config.uses_reference
    return preference_loss(
        sums.chosen,
        sums.rejected,
        sums.ref_chosen if has_reference else None,
        sums.ref_rejected if has_reference else None,
        kind=config.kind,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        divergence=config.divergence,
        chosen_lengths=sums.chosen_lengths,
        rejected_lengths=sums.rejected_lengths,
        nll_coef=config.nll_coef,
        bco_shift=bco_shift,
        **{name: value for name, value in optional.items() if value is not None},
    )


def remedies(config: PreferenceLossConfig) -> list[str]:
    """What holds up the likelihood of the chosen completions, as this recipe can have it."""
    found = ["lower optim.lr", "raise algorithm.loss.beta"]
    if config.desensitize is None:  # else a likelihood term is refused
        if isinstance(config.kind, str):
            option, weight = "nll_coef", config.nll_coef
        else:
            option, weight = f"kind.{NLL}", config.kind.get(NLL)
        found.append(f"{'raise' if weight else 'add'} algorithm.loss.{option}")
    return found


ShareOf = Callable[[PairSums, list[int]], Tensor]
"""The sums of a micro-batch's pairs and their places in; their loss, summed, out."""


class PairLearner:
    """Optimizer updates on preference pairs: the mean loss over the pairs of all ranks.

    Keeps what outlives a step: bco's moving average of rewards, and whether displacement of the
    chosen completions' likelihood was reported.
    """

    def __init__(
        self, context: TrainingContext, config: PreferenceLossConfig, update: Updater
    ) -> None:
        self._config = config
        self._update = update
        self._policy = context.policy
        self._distributed = context.distributed
        self._events = context.events
        self._token_budget = context.recipe.optim.micro_batch_tokens
        self._bco_shift = 0.0
        self._reported = False

    def reference(self, samples: Sequence[Sample]) -> list[Tensor] | None:
        """The reference's log-probabilities of interleaved pairs, one tensor a sample; None where
        the loss looks at none."""
        if not self._config.uses_reference:
            return None
        return reference_logprobs(self._policy, samples, self._token_budget)

    def __call__(
        self,
        step: int,
        samples: Sequence[Sample],
        reference: Sequence[Tensor] | None,
        metrics: MetricSums,
    ) -> None:
        """One update on this rank's pairs, which may be none; no update where no rank has any.

        Args:
            samples: interleaved.
            reference: log-probabilities of `samples` under the reference; None without one.
        """
        (n_pairs,) = self._distributed.sum([len(samples) // 2])
        if not n_pairs:
            return
        share = self._own_share(metrics)
        if self._config.couples:
            share = self._coupled_share(samples, reference, metrics)

        def loss_of(scores: Scores, rows: list[int]) -> Tensor:
            ref = _like(scores, rows, reference)
            logps = torch.where(scores.mask, scores.logprobs, 0.0).sum(dim=1)
            for first, side in enumerate(("chosen", "rejected")):
                record(metrics, {f"logps/{side}": Mean.of(logps[first::2])}, "dpo/")
                if reference is not None:
                    ratio = (scores.logprobs - ref)[first::2]
                    record_masked(metrics, f"dpo/log_ratio/{side}", ratio, scores.mask[first::2])
            return share(self._sums(scores, ref), rows) / n_pairs

        self._update(step, samples, loss_of, metrics, together=2)

    def after_step(self, step: int, metrics: MetricSums) -> None:
        """Move bco's shift by the step's rewards over all ranks, and look for displacement."""
        names = ("dpo/reward/chosen", "dpo/reward/rejected", "dpo/log_ratio/chosen")
        sums = [x for name in names for x in metrics.means.get(name, (0.0, 0.0))]
        chosen, n_chosen, rejected, n_rejected, ratio, n_tokens = self._distributed.sum(sums)
        if self._config.bco_decay is not None and n_chosen:
            reward = (chosen + rejected) / (n_chosen + n_rejected)
            if math.isfinite(reward):  # else the update was skipped
                decay = self._config.bco_decay
                self._bco_shift = decay * self._bco_shift + (1 - decay) * reward
        if self._reported or self._config.lowers_chosen or not n_tokens:
            return
        if ratio / n_tokens < DISPLACED:
            self._reported = True
            self._events.write(
                "diagnosis",
                f"step {step}: the policy gives the chosen completions {-ratio / n_tokens:.2f} "
                "nats a token less than the reference (likelihood displacement): what it learns "
                "to say instead is in neither side of the pairs. Any of these counters it: "
                f"{', '.join(remedies(self._config))}. (Said once)",
                step=step,
            )

    def _own_share(self, metrics: MetricSums) -> ShareOf:
        """Where each pair has its own loss."""

        def share(sums: PairSums, _: list[int]) -> Tensor:
            loss = self._loss(sums)
            _record_loss(metrics, loss)
            return loss.per_sequence.sum()

        return share

    def _coupled_share(
        self, samples: Sequence[Sample], reference: Sequence[Tensor] | None, metrics: MetricSums
    ) -> ShareOf:
        """Where a pair's loss depends on the others of the step, on any rank.

        All pairs are scored first; each micro-batch then backpropagates its log-probabilities by
        their weights in the whole loss (`sequence_weights`), at the whole loss's value.
        """
        own = self._sums_before(samples, reference)
        counts = self._distributed.gather([len(own)])
        first = sum(counts[: self._distributed.rank])
        everyone = PairSums.from_rows(self._distributed.gather(own), self._policy.device)
        loss = self._loss(everyone)
        if self._distributed.is_main:
            _record_loss(metrics, loss)
        chosen, rejected = sequence_weights(
            lambda c, r: self._loss(replace(everyone, chosen=c, rejected=r)),
            everyone.chosen,
            everyone.rejected,
        )

        def share(sums: PairSums, rows: list[int]) -> Tensor:
            pairs = [first + row // 2 for row in rows[::2]]
            moved = chosen[pairs] * (sums.chosen - sums.chosen.detach())
            moved = moved + rejected[pairs] * (sums.rejected - sums.rejected.detach())
            return (loss.per_sequence[pairs] + moved).sum()

        return share

    @torch.no_grad()
    def _sums_before(
        self, samples: Sequence[Sample], reference: Sequence[Tensor] | None
    ) -> list[list[float]]:
        """The pairs' sums under the policy before the update, a row a pair."""
        out: dict[int, list[float]] = {}
        for scores, batch in micro_batched(
            self._policy, samples, self._token_budget, self._policy, together=2
        ):
            sums = self._sums(scores, _like(scores, batch, reference))
            out |= zip((i // 2 for i in batch[::2]), sums.rows(), strict=True)
        return [out[pair] for pair in range(len(samples) // 2)]

    def _sums(self, scores: Scores, reference: Tensor) -> PairSums:
        desensitize = self._config.desensitize
        return PairSums.of(scores.logprobs, reference, scores.mask, desensitize=desensitize)

    def _loss(self, sums: PairSums) -> SequenceLoss:
        return pair_loss(self._config, sums, bco_shift=self._bco_shift)

    def state_dict(self) -> dict[str, Any]:
        return {"bco_shift": self._bco_shift, "reported": self._reported}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bco_shift = state["bco_shift"]
        self._reported = state["reported"]


def _record_loss(metrics: MetricSums, loss: SequenceLoss) -> None:
    """All but its log-probabilities, which may be desensitized sums; whole ones are recorded."""
    kept = {name: one for name, one in loss.metrics.items() if not name.startswith("logps/")}
    record(metrics, kept, "dpo/")


def _like(scores: Scores, rows: list[int], reference: Sequence[Tensor] | None) -> Tensor:
    """The reference's log-probabilities of a micro-batch, `[B, T]`; 0 where there is none."""
    if reference is None:
        return torch.zeros_like(scores.logprobs)
    return aligned(pick(reference, 0, rows), scores.logprobs)
