"""Adjustments of a reward by a completion's length and ending: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignment.types import StopReason, UserInputError


def soft_overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """Penalty in [-1, 0] that grows linearly over the last `buffer` tokens (DAPO, eq. 13).

        0                                          length <= max_length - buffer
        (max_length - buffer - length) / buffer    up to max_length
        -1                                         beyond max_length

    Lengths in tokens. Source: Yu et al. 2025, arXiv:2503.14476.

    Raises:
        UserInputError: the buffer is not within 1 .. max_length.
    """
    if not 1 <= buffer <= max_length:
        raise UserInputError(
            f"an overlong buffer of {buffer} tokens does not fit max_length {max_length}; "
            "it is between 1 and max_length"
        )
    if length > max_length:
        return -1.0
    return min(0.0, (max_length - buffer - length) / buffer)


def length_shortfall(count: int, *, target: int) -> float:
    """How near a length is to its target: 1 at the target, 0 at nothing or at twice the target.

    `max(0, 1 - |count - target| / target)`.
    """
    return max(0.0, 1.0 - abs(count - target) / target)


def clip_reward(reward: float, *, low: float, high: float) -> float:
    """The reward, held between `low` and `high`."""
    if low > high:
        raise UserInputError(f"reward bounds are the wrong way round: low {low} > high {high}")
    return min(max(reward, low), high)


TRUNCATED: dict[str, Callable[[float, float], float | None]] = {
    # how a truncated completion is treated, by name: (reward, penalty) -> reward
    "keep": lambda reward, penalty: reward,
    "penalize": lambda reward, penalty: reward - penalty,
    "replace": lambda reward, penalty: -penalty,
    "mask": lambda reward, penalty: None,
}


def shape_truncated(
    rewards: Sequence[float | None],
    stop_reasons: Sequence[StopReason],
    *,
    treatment: str,
    penalty: float = 1.0,
) -> list[float | None]:
    """Rewards after treating completions that were cut off before they ended.

    `keep` leaves them; `penalize` subtracts `penalty` (the missing-EOS penalty of RLHF);
    `replace` makes the reward `-penalty`; `mask` makes it None, which leaves the sample out of
    the loss (DAPO's overlong filtering). None stays None.

    Raises:
        UserInputError: unknown treatment.
    """
    if treatment not in TRUNCATED:
        raise UserInputError(
            f"unknown treatment {treatment!r} of truncated completions; "
            f"one of: {', '.join(TRUNCATED)}"
        )
    treat = TRUNCATED[treatment]
    return [
        treat(reward, penalty) if reward is not None and reason is StopReason.LENGTH else reward
        for reward, reason in zip(rewards, stop_reasons, strict=True)
    ]
