"""Held-out preference pairs in the terms of the loss that a policy learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignment.config.methods.preference import KINDS, PreferenceLossConfig
from alignment.losses import LOGISTIC_KINDS, preference_score
from alignment.trainers.preference import PairSums
from alignment.types import Sample


def scores_are_logits(algorithm: Any) -> bool:
    """Whether sigmoid(chosen - rejected) of the scores is a probability that the method's loss
    fits; of a weighted sum, that all its kinds fit."""
    loss = getattr(algorithm, "loss", None)
    return isinstance(loss, PreferenceLossConfig) and set(loss.kinds) <= LOGISTIC_KINDS


def pair_scores(
    algorithm: Any,
    samples: Sequence[Sample],
    logprobs: Sequence[Tensor],
    reference: Sequence[Tensor] | None,
) -> tuple[list[float], list[float]]:
    """(scores of the chosen sides, of the rejected sides), one each a pair.

    Of a preference loss, the `preference_score` of its kind, from the sums that its training takes:
    over the tokens that count, desensitized where it does that. Of a weighted sum of kinds, that of
    the first one with a reference, or else of the first. Of any other method, beta times the
    log-ratio to the reference; 1 for beta where its loss has none.

    Args:
        algorithm: the method's section.
        samples: interleaved.
        logprobs: `[completion length]` each, under the policy.
        reference: the same under the reference; None where the method compares with none.
    """
    loss = getattr(algorithm, "loss", None)
    own = loss if isinstance(loss, PreferenceLossConfig) else None
    sums = _sums(samples, logprobs, reference, desensitize=own.desensitize if own else None)
    options: dict[str, Any] = {"kind": "sigmoid", "beta": getattr(loss, "beta", 1.0)}
    if own is not None:
        options |= {"kind": _ranking_kind(own), "divergence": own.divergence}
        options |= {} if own.alpha is None else {"alpha": own.alpha}
    chosen = preference_score(sums.chosen, sums.ref_chosen, sums.chosen_lengths, **options)
    rejected = preference_score(sums.rejected, sums.ref_rejected, sums.rejected_lengths, **options)
    return chosen.tolist(), rejected.tolist()


def _ranking_kind(loss: PreferenceLossConfig) -> str:
    return min(loss.kinds, key=lambda kind: not KINDS[kind].needs_reference)


def _sums(
    samples: Sequence[Sample],
    logprobs: Sequence[Tensor],
    reference: Sequence[Tensor] | None,
    *,
    desensitize: float | None,
) -> PairSums:
    """Pair by pair, so that padding to the longest of all takes no memory."""
    rows: list[list[float]] = []
    for first in range(0, len(samples), 2):
        pair = slice(first, first + 2)
        mask = _padded([torch.tensor(sample.loss_mask) for sample in samples[pair]])
        own = _padded(logprobs[pair])
        ref = torch.zeros_like(own) if reference is None else _padded(reference[pair])
        rows += PairSums.of(own, ref, mask, desensitize=desensitize).rows()
    return PairSums.from_rows(rows, torch.device("cpu"))


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence([row.cpu() for row in rows], batch_first=True)
