"""The pieces in which group-relative methods differ: advantages, policy losses, shaping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from alignment.advantages import group_relative, leave_one_out
from alignment.config.methods.sections import PolicyLossConfig
from alignment.losses import (
    TokenLoss,
    cispo_loss,
    ppo_clip_loss,
)
from alignment.types import UserInputError

Scale = Literal["group", "batch", "none"]


def _leave_one_out(rewards: Tensor, group_ids: Tensor, scale: Scale) -> Tensor:
    if scale != "none":
        raise UserInputError(
            f"advantage: leave_one_out (RLOO) is not scaled; set advantage.scale: none, not {scale}"
        )
    return leave_one_out(rewards, group_ids)


ADVANTAGES: Mapping[str, Callable[[Tensor, Tensor, Scale], Tensor]] = {
    "group_mean": lambda rewards, group_ids, scale: group_relative(rewards, group_ids, scale=scale),
    "leave_one_out": _leave_one_out,
}
"""(rewards `[B]`, group_ids `[B]`, scale) to advantages `[B]`; NaN rewards get advantage 0."""


def _clip(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: PolicyLossConfig
) -> TokenLoss:
    assert config.clip_low is not None
    return ppo_clip_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ratio_level=config.ratio_level,
        dual_clip=config.dual_clip,
    )


def _cispo(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: PolicyLossConfig
) -> TokenLoss:
    return cispo_loss(
        logprobs, old, advantages, mask, clip_low=config.clip_low, clip_high=config.clip_high
    )


POLICY_LOSSES: Mapping[
    str, Callable[[Tensor, Tensor, Tensor, Tensor, PolicyLossConfig], TokenLoss]
] = {"clip": _clip, "cispo": _cispo}
