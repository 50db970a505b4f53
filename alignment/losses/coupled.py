"""Losses that couple the sequences of a batch, through micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignment.losses.inputs import upcast
from alignment.losses.types import SequenceLoss


def sequence_weights(
    loss_of_logps: Callable[[Tensor, Tensor], SequenceLoss],
    chosen_logps: Tensor,
    rejected_logps: Tensor,
) -> tuple[Tensor, Tensor]:
    """The weight of every log-probability in a loss's gradient: d(sum of the loss) / d logps.

    A loss that sorts its batch (`COUPLED_KINDS`) cannot be cut into micro-batches. Its gradient
    can: by the chain rule it is that of

        sum_i w_chosen[i] chosen_logps[i] + w_rejected[i] rejected_logps[i]

    with the weights held constant, which is a sum over pairs. So: score all pairs of the step
    without a graph, gather them over the ranks, take the weights of the whole, and backpropagate
    each micro-batch's part of the sum, divided by the number of pairs in the step.

    Args:
        loss_of_logps: the loss of (chosen_logps, rejected_logps), everything else fixed, as
            `lambda c, r: preference_loss(c, r, ref_chosen, ref_rejected, kind="aot", beta=0.1)`.
        chosen_logps: `[B]`, of all pairs of the step. No gradient flows into it.
        rejected_logps: `[B]`, likewise.

    Returns:
        The weights of the chosen and of the rejected log-probabilities, `[B]` each, constants.
        They hold for the weights of the model that the log-probabilities were computed with.
    """
    leaves = [upcast(x.detach()).clone().requires_grad_() for x in (chosen_logps, rejected_logps)]
    with torch.enable_grad():
        total = loss_of_logps(leaves[0], leaves[1]).per_sequence.sum()
    chosen, rejected = torch.autograd.grad(total, leaves, materialize_grads=True)
    return chosen, rejected
