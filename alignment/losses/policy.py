"""Policy-gradient losses: PPO's clipped surrogate, its sequence-level form (GSPO), and CISPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from alignment.losses.inputs import check_shapes, choose, masked
from alignment.losses.types import Max, Mean, Metric, TokenLoss
from alignment.types import UserInputError

RatioLevel = Literal["token", "sequence"]

# exp(20) = 5e8. Past it the ratio is useless, and exp would overflow into a NaN gradient even on
# the side that the clip discards.
_LOG_RATIO_LIMIT = 20.0


def ppo_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_level: RatioLevel = "token",
    dual_clip: float | None = None,
) -> TokenLoss:
    """The negative clipped surrogate of PPO (Schulman et al. 2017, eq. 7), per token.

        loss = -min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A)

    ``token``:    r_t = exp(logprobs_t - old_logprobs_t).
    ``sequence``: r_t = exp(mean over the sequence's mask of logprobs - old_logprobs), the same for
                  all its tokens, differentiated through that mean (GSPO, Zheng et al. 2025, eq. 7);
                  meant for `reduce_loss(mode="sequence")`. A mean, so it does not grow with length.

    Two widths are those of DAPO (Yu et al. 2025, section 3.1). With `dual_clip` = c the loss of a
    token with A < 0 is at most `-c A` (dual-clip PPO, Ye et al. 2020), which bounds what one token
    that has become much more likely can do.

    `old_logprobs` and `advantages` are constants: no gradient flows into them, so passing
    `logprobs` for both is the on-policy gradient. `|log r|` is limited to 20.

    Args:
        logprobs: `[B, T]`, current policy.
        old_logprobs: `[B, T]`, the policy before this rollout's updates.
        advantages: `[B, T]`, or `[B]` for one per sequence.
        mask: `[B, T]`, True = counts.
        clip_low: width below 1.
        clip_high: width above 1.
        ratio_level: one ratio per token or per sequence.
        dual_clip: c > 1, or None.

    Metrics, over tokens: `ratio/mean`, `ratio/max`; `clip_fraction/low` and `clip_fraction/high`
    (the clip is active: r < 1 - clip_low with A < 0, r > 1 + clip_high with A > 0);
    `clip_fraction/dual` if it is on; `approx_kl`, the k3 estimate of KL(old || current) from token
    ratios.

    Raises:
        UserInputError: negative clip width, `dual_clip` not above 1, unknown ratio level.
    """
    _check_clips(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    log_ratio, advantage = _constants_aside(logprobs, old_logprobs, advantages, mask)
    at_level = choose(_RATIO_LEVELS, "ratio level", ratio_level)(log_ratio, mask.bool())
    ratio = _exp(at_level)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    metrics = _ratio_metrics(log_ratio, ratio, mask) | {
        "clip_fraction/low": Mean.of((ratio < 1 - clip_low) & (advantage < 0), mask),
        "clip_fraction/high": Mean.of((ratio > 1 + clip_high) & (advantage > 0), mask),
    }
    if dual_clip is not None:
        floor = dual_clip * advantage
        metrics["clip_fraction/dual"] = Mean.of((objective < floor) & (advantage < 0), mask)
        objective = torch.where(advantage < 0, torch.maximum(objective, floor), objective)
    return TokenLoss(masked(-objective, mask), metrics)


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_high: float,
    clip_low: float | None = None,
) -> TokenLoss:
    """REINFORCE with a clipped importance weight (CISPO, MiniMax-M1 2025, section 3.1), per token.

        loss = -stop_gradient(clamp(r, 1 - clip_low, 1 + clip_high)) A logprobs

    Unlike in PPO, a token past the clip keeps a gradient; only its weight stops growing. The paper
    leaves the lower side open, and so does `clip_low=None`.

    Args:
        logprobs: `[B, T]`, current policy.
        old_logprobs: `[B, T]`, the policy before this rollout's updates.
        advantages: `[B, T]`, or `[B]` for one per sequence.
        mask: `[B, T]`, True = counts.
        clip_high: width above 1: the largest weight is 1 + clip_high.
        clip_low: width below 1, or None for no lower limit.

    Metrics, over tokens: `ratio/mean`, `ratio/max`, `approx_kl` as in `ppo_clip_loss`;
    `clip_fraction/low`, `clip_fraction/high` (the weight is clipped, whatever the advantage).

    Raises:
        UserInputError: negative clip width.
    """
    _check_clips(clip_low=clip_low or 0.0, clip_high=clip_high, dual_clip=None)
    log_ratio, advantage = _constants_aside(logprobs, old_logprobs, advantages, mask)
    ratio = _exp(log_ratio.detach())
    lowest = 0.0 if clip_low is None else 1 - clip_low
    weight = ratio.clamp(lowest, 1 + clip_high)
    metrics = _ratio_metrics(log_ratio, ratio, mask) | {
        "clip_fraction/low": Mean.of(ratio < lowest, mask),
        "clip_fraction/high": Mean.of(ratio > 1 + clip_high, mask),
    }
    return TokenLoss(-weight * advantage * masked(logprobs, mask), metrics)


def _constants_aside(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-ratio and advantages `[B, T]`, 0 outside the mask; gradient only into `logprobs`."""
    if advantages.ndim == 1 and advantages.shape[0] == logprobs.shape[0]:
        advantages = advantages.unsqueeze(1).expand_as(logprobs)
    check_shapes(logprobs.shape, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    log_ratio = masked(logprobs, mask) - masked(old_logprobs.detach(), mask)
    return log_ratio, masked(advantages.detach(), mask)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()


def _token_level(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio


def _sequence_level(log_ratio: Tensor, mask: Tensor) -> Tensor:
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(dim=1, keepdim=True) / length).expand_as(log_ratio)


_RATIO_LEVELS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": _token_level,
    "sequence": _sequence_level,
}


def _ratio_metrics(log_ratio: Tensor, ratio: Tensor, mask: Tensor) -> dict[str, Metric]:
    per_token = log_ratio.detach().clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return {
        "ratio/mean": Mean.of(ratio, mask),
        "ratio/max": Max.of(ratio, mask),
        "approx_kl": Mean.of(per_token.expm1() - per_token, mask),
    }


def _check_clips(*, clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    for name, width in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not width >= 0:
            raise UserInputError(f"{name} is {width!r}; it is a width around 1, so give 0 or more")
    if dual_clip is not None and not dual_clip > 1:
        raise UserInputError(f"dual_clip is {dual_clip!r}; give a number above 1, or None")
