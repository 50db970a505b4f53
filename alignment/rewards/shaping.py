"""Adjustments of a reward by a completion's length and ending: pure functions of numbers."""

from __future__ import annotations

from alignment.types import UserInputError


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
