"""Reward modeling: outcome rewards from preference pairs, process rewards from labelled steps."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from alignment.losses.inputs import check_shapes, masked, upcast
from alignment.losses.types import Mean, SequenceLoss, TokenLoss
from alignment.types import GOOD_STEP, UserInputError


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
        label_smoothing: e, the probability that a label is wrong, in [0, 0.5).

    Metrics: `accuracy` (strict), `margin` (without the margin taken off), `score/chosen`,
    `score/rejected`.

    Raises:
        UserInputError: label_smoothing outside [0, 0.5).
        AlignmentError: shapes that differ.
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserInputError(
            f"label_smoothing is {label_smoothing!r}; it is the probability that a label is wrong, "
            "so give a number in [0, 0.5)"
        )
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


def process_reward_loss(step_scores: Tensor, labels: Tensor, mask: Tensor) -> TokenLoss:
    """Binary cross-entropy of every labelled step, `[B, T]`.

        loss = -y log s(x) - (1 - y) log s(-x)

    x the score (a logit) and y the label of a step: a process reward model, Lightman et al. 2023.
    A step's score stands at its last token, and so do its label and its True in the mask.

    Args:
        step_scores: `[B, T]`.
        labels: `[B, T]`, 1 for a good step, 0 for a bad one, or a probability between. Constants.
        mask: `[B, T]`, True at the last token of each labelled step.

    Metrics over steps: `accuracy` (share where s(x) and y are on the same side of `GOOD_STEP`),
    `accuracy/good` and `accuracy/bad` over the steps of that label: with few bad steps, the first
    one alone says little.

    Raises:
        AlignmentError: shapes that differ.
    """
    check_shapes(step_scores.shape, labels=labels, mask=mask)
    mask = mask.bool()
    scores, targets = masked(step_scores, mask), masked(labels.detach(), mask)
    targets = targets.to(scores.dtype)
    loss = binary_cross_entropy_with_logits(scores, targets, reduction="none")
    good = targets >= GOOD_STEP
    right = (scores.sigmoid() >= GOOD_STEP) == good
    metrics = {
        "accuracy": Mean.of(right, mask),
        "accuracy/good": Mean.of(right, mask & good),
        "accuracy/bad": Mean.of(right, mask & ~good),
    }
    return TokenLoss(masked(loss, mask), metrics)
