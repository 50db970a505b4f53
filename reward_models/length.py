"""Rewards for the length of a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from alignment.rewards.protocol import Item
from alignment.rewards.shaping import length_shortfall, soft_overlong_penalty
from alignment.types import Completion, Score, UserInputError

Unit = Literal["words", "tokens", "characters"]
Kind = Literal["at_most", "at_least", "target"]


class LengthReward:
    """A reward for how long a completion is.

    Args:
        kind: `at_most`: 1 up to `count`, 0 beyond; `at_least`: the other way round; `target`:
            `max(0, 1 - |length - count| / count)`.
        count: the length that `kind` speaks of; at least 1.
        unit: `words` (separated by white space), `tokens` (the end token included) or
            `characters`.

    An empty completion gets 0 in every case: saying nothing is not brevity.
    """

    def __init__(self, *, count: int, kind: Kind = "at_most", unit: Unit = "words") -> None:
        if count < 1:
            raise UserInputError(f"the length reward has count {count}; it is at least 1")
        self._count = count
        self._measure = _UNITS[unit]
        self._rate = _KINDS[kind]

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return [Score(self._value(completion)) for _, completion in items]

    def _value(self, completion: Completion) -> float:
        if not completion.text.strip():
            return 0.0
        return self._rate(self._measure(completion), self._count)


class OverlongReward:
    """Soft penalty over the last `buffer` tokens before `max_length` (DAPO, eq. 13), in [-1, 0].

    Args:
        max_length: tokens; usually the rollout's `max_new_tokens`.
        buffer: tokens over which the penalty grows from 0 to -1.
    """

    def __init__(self, *, max_length: int, buffer: int) -> None:
        soft_overlong_penalty(0, max_length=max_length, buffer=buffer)  # refuses what does not fit
        self._max_length = max_length
        self._buffer = buffer

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return [Score(self._penalty(completion)) for _, completion in items]

    def _penalty(self, completion: Completion) -> float:
        length = len(completion.token_ids)
        return soft_overlong_penalty(length, max_length=self._max_length, buffer=self._buffer)


_UNITS: dict[Unit, Callable[[Completion], int]] = {
    "words": lambda completion: len(completion.text.split()),
    "tokens": lambda completion: len(completion.token_ids),
    "characters": lambda completion: len(completion.text),
}

_KINDS: dict[Kind, Callable[[int, int], float]] = {
    "at_most": lambda length, count: float(length <= count),
    "at_least": lambda length, count: float(length >= count),
    "target": lambda length, count: length_shortfall(length, target=count),
}
