"""From rewards to advantages: placement, GAE, group baselines, whitening.

All of these make constants for the losses: nothing here carries a gradient. Everything is computed
in float32, or in float64 where the input is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from alignment.types import AlignmentError, UserInputError

AdvantageScale = Literal["group", "batch", "none"]

MIN_STD = 1e-4
"""Below this standard deviation the rewards of a group count as tied (in units of reward)."""

_STD_EPS = 1e-4  # added to the deviation before dividing, as trl's GRPO does
_VARIANCE_EPS = 1e-8


@torch.no_grad()
def place_rewards(
    rewards: Tensor, mask: Tensor, *, kl: Tensor | None = None, kl_coef: float = 0.0
) -> Tensor:
    """Rewards per token, `[B, T]`: the sequence's at its last counted token, less the KL penalty.

        token_rewards_t = rewards [t is the last True of mask] - kl_coef kl_t

    0 outside the mask; a row without a True gets nothing. A NaN reward (failed grader) stays NaN:
    leave such a row out of the mask.

    Args:
        rewards: `[B]`.
        mask: `[B, T]`, True = counts; the one later given to `gae`.
        kl: `[B, T]` estimate of KL(policy || reference), where the penalty is in the reward.
        kl_coef: its coefficient.
    """
    _check_rows(rewards, mask)
    mask = mask.bool()
    is_last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    placed = torch.where(is_last, _upcast(rewards).unsqueeze(1), 0.0)
    if kl is not None:
        placed = placed - kl_coef * torch.where(mask, _upcast(kl), 0.0)
    return placed


@torch.no_grad()
def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eqs. 11 to 16), `[B, T]` each.

        delta_t     = reward_t + gamma V_next(t) - V_t
        advantage_t = delta_t + gamma lam advantage_next(t)
        return_t    = advantage_t + V_t

    `next(t)` is the next True of the mask, so a masked hole (a tool's output) is stepped over as if
    it were not there, without being discounted; a reward inside a hole is not seen. After the last
    True everything is 0: a completion ends its episode.

    Args:
        token_rewards: `[B, T]`.
        values: `[B, T]`, the critic's value of the state *before* token t.
        mask: `[B, T]`, True = counts.
        gamma: discount per counted token.
        lam: GAE's lambda.

    Returns:
        (advantages, returns), 0 outside the mask.
    """
    if not token_rewards.shape == values.shape == mask.shape:
        raise AlignmentError(
            f"gae was given token_rewards {tuple(token_rewards.shape)}, values "
            f"{tuple(values.shape)} and mask {tuple(mask.shape)}; all must be [B, T]"
        )
    mask = mask.bool()
    reward = torch.where(mask, _upcast(token_rewards), 0.0)
    value = torch.where(mask, _upcast(values), 0.0)
    advantages = torch.zeros_like(value)
    next_advantage = next_value = value.new_zeros(value.shape[0])
    for t in reversed(range(value.shape[1])):
        counts = mask[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]
        next_advantage = torch.where(counts, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(counts, value[:, t], next_value)
        advantages[:, t] = torch.where(counts, next_advantage, 0.0)
    return advantages, advantages + value


@torch.no_grad()
def group_relative(
    rewards: Tensor, group_ids: Tensor, *, scale: AdvantageScale = "group"
) -> Tensor:
    """Rewards relative to their group's mean, `[B]` (GRPO, Shao et al. 2024, section 4.1.2).

        ``group``: (reward - group mean) / (group std + 1e-4)
        ``batch``: (reward - group mean) / (std of all rewards + 1e-4)
        ``none``:  reward - group mean          (Dr. GRPO, Liu et al. 2025)

    The deviation is the unbiased one (n - 1), and the constant is trl's. Where the deviation that
    would divide is below `MIN_STD` the rewards are tied and their advantages are exactly 0: a
    tie's rounding noise is never blown up to unit size. So rewards must be on a scale on which a
    difference of 1e-4 is nothing. Rewards all equal in a group give exactly 0 at every scale.

    A reward that is not finite (a failed grader's NaN) is left out of every statistic and gets
    advantage 0. So does the only valid one of a group.

    Args:
        rewards: `[B]`, of whole groups: gather over ranks first where a group can be split. For
            ``batch``, all rewards of the step.
        group_ids: `[B]` integers, which prompt a row belongs to, in any order.
        scale: what to divide by.

    Raises:
        UserInputError: unknown scale.
    """
    if scale not in ("group", "batch", "none"):
        raise UserInputError(f"unknown advantage scale {scale!r}. Known: group, batch, none.")
    valid, rewards, group, n_groups = _grouped(rewards, group_ids)
    deviation = _from_group_mean(rewards, valid, group, n_groups)
    if scale == "none":
        return deviation
    if scale == "group":
        count = _sum_by_group(valid.to(deviation.dtype), group, n_groups)
        squares = _sum_by_group(deviation.square(), group, n_groups)
        std = (squares / (count - 1).clamp(min=1)).sqrt()[group]
    else:
        whole = torch.zeros_like(group)
        squares = _from_group_mean(rewards, valid, whole, 1).square().sum()
        std = (squares / (valid.sum() - 1).clamp(min=1)).sqrt()
    return torch.where(std < MIN_STD, 0.0, deviation / (std + _STD_EPS))


@torch.no_grad()
def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Rewards relative to the mean of the *other* members of the group, `[B]`.

        advantage_i = reward_i - mean of reward_j over j != i in the group

    RLOO (Ahmadian et al. 2024, section 3.3; Kool et al. 2019): the baseline does not depend on the
    sample's own reward, so the gradient stays unbiased. A reward that is not finite is left out of
    the baselines and gets advantage 0; so does the only valid one of a group.

    Args:
        rewards: `[B]`, of whole groups.
        group_ids: `[B]` integers, which prompt a row belongs to, in any order.
    """
    valid, rewards, group, n_groups = _grouped(rewards, group_ids)
    deviation = _from_group_mean(rewards, valid, group, n_groups)
    count = _sum_by_group(valid.to(deviation.dtype), group, n_groups)[group]
    # r - (S - r) / (n - 1) = (r - S / n) n / (n - 1)
    return deviation * count / (count - 1).clamp(min=1)


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce_sums: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`x` scaled to variance 1 over the mask, and moved to mean 0; 0 outside the mask.

        (x - mean) / sqrt(variance + 1e-8)  [+ mean, with shift_mean=False]

    The variance is that of the set itself (divided by n, not n - 1), taken in a second pass around
    the mean, so a large common offset costs no precision.

    Args:
        x: any shape, usually `[B, T]`.
        mask: the same shape, True = counts.
        shift_mean: True puts the mean at 0, False leaves it where it was.
        reduce_sums: sums a 1-d tensor elementwise over ranks, so that all whiten by the statistics
            of the global set. It is called twice on every rank, even on one with an empty mask.
    """
    if x.shape != mask.shape:
        raise AlignmentError(
            f"whiten was given x {tuple(x.shape)} and mask {tuple(mask.shape)}; shapes must match"
        )
    total = reduce_sums if reduce_sums is not None else _unchanged
    mask = mask.bool()
    kept = torch.where(mask, _upcast(x), 0.0)
    count, summed = total(torch.stack([mask.sum().to(kept.dtype), kept.sum()]))
    count = count.clamp(min=1)
    mean = summed / count
    centred = torch.where(mask, kept - mean, 0.0)
    variance = total(centred.square().sum().reshape(1))[0] / count
    whitened = centred * torch.rsqrt(variance + _VARIANCE_EPS)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unchanged(sums: Tensor) -> Tensor:
    return sums


def _check_rows(rewards: Tensor, mask: Tensor) -> None:
    if rewards.shape != mask.shape[:1] or mask.ndim != 2:
        raise AlignmentError(
            f"{tuple(rewards.shape)} rewards do not go with a mask {tuple(mask.shape)}; give "
            "rewards [B] and mask [B, T]"
        )


def _grouped(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Valid flags, rewards with 0 for the invalid, group numbers 0 .. n-1, and n."""
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise AlignmentError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be "
            "[B]: one reward and one group per completion"
        )
    ids, group = torch.unique(group_ids, return_inverse=True)
    valid = rewards.isfinite()
    return valid, torch.where(valid, _upcast(rewards), 0.0), group, ids.numel()


def _sum_by_group(x: Tensor, group: Tensor, n_groups: int) -> Tensor:
    return x.new_zeros(n_groups).index_add(0, group, x)


def _from_group_mean(rewards: Tensor, valid: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Rewards less the mean of the valid ones of their group; 0 for the invalid.

    Taken from the group's smallest first: equal rewards then differ from their mean by exactly 0,
    where the rounded mean of eight times 0.1 is not 0.1.
    """
    lowest = rewards.new_full((n_groups,), float("inf"))
    lowest = lowest.scatter_reduce(0, group, rewards.where(valid, lowest[group]), "amin")
    above = torch.where(valid, rewards - lowest[group], 0.0)
    count = _sum_by_group(valid.to(above.dtype), group, n_groups).clamp(min=1)
    mean = _sum_by_group(above, group, n_groups) / count
    return torch.where(valid, above - mean[group], 0.0)
