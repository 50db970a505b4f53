"""Reward modeling from preference pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.losses.inputs import check_shapes, upcast
from alignment.losses.types import Mean, SequenceLoss


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> SequenceLoss:
    """Negative log-likelihood of the preferences under Bradley and Terry (1952), `[B]`.

        d    = s_chosen - s_rejected - margin
        loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d) + center_coef (s_chosen + s_rejected)^2

    The margin is that of Llama 2 (Touvron et al. 2023, eq. 2). The last term keeps scores near
    zero, which the likelihood alone leaves free (Eisenstein et al. 2023).

    Args:
        chosen_scores: `[B]`, the head at the last completion token.
        rejected_scores: `[B]`.
        margin: how much better the chosen one must be: `[B]`, or one number for all.
        center_coef: weight of the centring term.
        label_smoothing: e, the probability that a label is wrong.

    Metrics: `accuracy` (strict), `margin` (without the margin taken off), `score/chosen`,
    `score/rejected`.
    """
    chosen, rejected = upcast(chosen_scores), upcast(rejected_scores)
    check_shapes(chosen.shape, rejected_scores=rejected)
    difference = chosen - rejected
    shifted = difference
    if isinstance(margin, Tensor):
        check_shapes(chosen.shape, margin=margin)
        shifted = difference - upcast(margin.detach())
    elif margin is not None:
        shifted = difference - margin
    loss = -(1 - label_smoothing) * logsigmoid(shifted) - label_smoothing * logsigmoid(-shifted)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square()
    metrics = {
        "accuracy": Mean.of(difference > 0),
        "margin": Mean.of(difference),
        "score/chosen": Mean.of(chosen),
        "score/rejected": Mean.of(rejected),
    }
    return SequenceLoss(loss, metrics)
