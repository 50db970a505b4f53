"""A reward for completions that match a pattern.

A pattern can take exponential time on text made to that end, and holds the interpreter's lock
while it does. So patterns are matched in worker processes, where that costs one sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from alignment.rewards.protocol import Item
from alignment.types import Score, UserInputError
from reward_models.pool import Reply, WorkerPool

Mode = Literal["search", "match", "fullmatch"]


class RegexReward:
    """1 where the completion matches a regular expression of Python's `re`, else 0.

    Args:
        pattern: the expression. `.` also matches a line break.
        mode: `search` (anywhere), `match` (from the start) or `fullmatch` (all of it).
        ignore_case: whether letter case does not count.
        negate: 1 where it does *not* match.
        timeout_seconds: processor time for one completion.

    Raises:
        UserInputError: the pattern is not a regular expression.
    """

    def __init__(
        self,
        *,
        pattern: str,
        mode: Mode = "search",
        ignore_case: bool = False,
        negate: bool = False,
        timeout_seconds: float = 1.0,
    ) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserInputError(
                f"the pattern {pattern!r} is not a regular expression: {error}"
            ) from error
        self._negate = negate
        self._request = {"pattern": pattern, "mode": mode, "ignore_case": ignore_case}
        self._pool = WorkerPool(
            "reward_models.regex:matches", workers=1, timeout_seconds=timeout_seconds
        )

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        requests = [{**self._request, "text": completion.text} for _, completion in items]
        return [self._score(reply) for reply in self._pool.run(requests)]

    def close(self) -> None:
        """End the worker process."""
        self._pool.close()

    def _score(self, reply: Reply) -> Score:
        if reply.failure is not None:
            return Score(None, reply.failure, reply.detail)
        return Score(float(bool(reply.value) != self._negate))


def matches(request: dict[str, Any]) -> bool:
    """What the workers run: whether `text` matches `pattern` under `mode`."""
    flags = re.DOTALL | (re.IGNORECASE if request["ignore_case"] else re.NOFLAG)
    pattern = re.compile(request["pattern"], flags)
    return getattr(pattern, request["mode"])(request["text"]) is not None
