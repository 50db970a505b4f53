"""Regression of the critic on its returns."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment.losses.inputs import check_shapes, masked
from alignment.losses.types import Mean, TokenLoss
from alignment.types import UserInputError


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
) -> TokenLoss:
    """Squared error of the values, pessimistic about moves away from the old values.

        v_clip = clamp(v, old - clip, old + clip)
        loss   = 1/2 max((v - return)^2, (v_clip - return)^2)

    As in the PPO implementation of Dhariwal et al. (OpenAI Baselines, 2017), its 1/2 included.
    Where the old values equal the values, this is the plain squared error; so it is everywhere
    with `clip=None`. `old_values` and `returns` are constants: no gradient flows into them.

    Args:
        values: `[B, T]`, current critic.
        old_values: `[B, T]`, critic at the time of the rollout.
        returns: `[B, T]`, targets.
        mask: `[B, T]`, True = counts.
        clip: largest move of a value that is believed, in units of reward.

    Metrics: `value/mean`, `value/clip_fraction` (the clipped error is the larger one),
    `value/squared_error`, `return/mean`, `return/squared`. From them, explained variance is
    `1 - (E[err^2] - E[err]^2) / (E[ret^2] - E[ret]^2)`, with `E[err] = E[ret] - E[value]`.
    """
    check_shapes(values.shape, old_values=old_values, returns=returns, mask=mask)
    if clip is not None and not clip > 0:
        raise UserInputError(f"value clip is {clip!r}; give a positive number, or None for no clip")
    value = masked(values, mask)
    old, target = masked(old_values.detach(), mask), masked(returns.detach(), mask)
    error = (value - target).square()
    worst = error
    if clip is not None:
        # Not old + clamp(value - old): inside the range this is exactly the value.
        moved = value.clamp(old - clip, old + clip)
        worst = torch.maximum(error, (moved - target).square())
    metrics = {
        "value/mean": Mean.of(value, mask),
        "value/clip_fraction": Mean.of(worst > error, mask),
        "value/squared_error": Mean.of(error, mask),
        "return/mean": Mean.of(target, mask),
        "return/squared": Mean.of(target.square(), mask),
    }
    return TokenLoss(0.5 * worst, metrics)
