"""Which row comes next: shuffled epochs that resume exactly, and held-out splits that hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from alignment.types import UserInputError


class DataOrder:
    """An endless order of row indices, one permutation after another.

    Epoch e is the permutation that sorts n counter-based random numbers of the key (seed, e), so
    that position alone says what comes next: the state is one integer, and resuming is exact. No
    row comes twice within an epoch.

    Args:
        n_rows: number of rows; at least 1.
        seed: of the permutations.
        shuffle: False keeps the rows' own order in every epoch.
    """

    def __init__(self, n_rows: int, *, seed: int, shuffle: bool = True) -> None:
        if n_rows < 1:
            raise UserInputError("there are no rows to draw from; check the data and its filters")
        self._n_rows = n_rows
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._cached: tuple[int, list[int]] | None = None

    @property
    def position(self) -> int:
        """Number of rows drawn so far."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._position / self._n_rows

    def take(self, k: int) -> list[tuple[int, int]]:
        """The next `k` draws, as (draw index, row index). A draw index is never given twice."""
        draws = []
        for draw in range(self._position, self._position + k):
            epoch, offset = divmod(draw, self._n_rows)
            draws.append((draw, self._permutation(epoch)[offset]))
        self._position += k
        return draws

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "n_rows": self._n_rows,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserInputError: the state is of another order: other data, seed or shuffling.
        """
        for key, mine in self.state_dict().items():
            if key != "position" and state[key] != mine:
                raise UserInputError(
                    f"the checkpoint's data order has {key} = {state[key]}, this run's has {mine}; "
                    "resume with the data and seed of the run, or start a new one"
                )
        self._position = int(state["position"])

    def _permutation(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(self._n_rows)
        if self._cached is None or self._cached[0] != epoch:
            # numpy guarantees the raw stream of a bit generator across versions, not that of
            # Generator.permutation.
            key = np.array([self._seed % 2**64, epoch], dtype=np.uint64)
            numbers = np.random.Philox(key=key).random_raw(self._n_rows)
            self._cached = (epoch, np.argsort(numbers, kind="stable").tolist())
        return self._cached[1]


def split_held_out(
    rows: Sequence[Mapping[str, Any]],
    k: int,
    seed: int,
    *,
    by: Literal["row", "prompt"] = "prompt",
) -> tuple[list[int], list[int]]:
    """Split rows into (kept, held out), `k` of them held out, each by its index in `rows`.

    Rows that are the same, or with `by="prompt"` have the same prompt (or the same `split_key`,
    where a source says which rows are one problem), stay on one side. Whether a
    row is held out depends on its content and the seed, not on its place; both parts keep the
    rows' order. Groups of equal rows can make the held-out part smaller than `k`, never larger.

    Raises:
        UserInputError: `k` is negative, leaves nothing to keep, or cannot be held out because the
            rows are too much the same.
    """
    if not 0 <= k < len(rows):
        raise UserInputError(
            f"{k} of {len(rows)} rows cannot be held out; give 0 or more, and fewer than there are"
        )
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_identity(row, by), []).append(index)
    held: set[int] = set()
    for identity in sorted(groups, key=lambda one: _digest(f"{seed}:{one}")):
        if len(held) + len(groups[identity]) <= k:
            held.update(groups[identity])
    if k > 0 and not held:
        raise UserInputError(
            f"no {k} rows can be held out: each {by} appears more than {k} times; hold out more, "
            'or split by="row"'
        )
    return [index for index in range(len(rows)) if index not in held], sorted(held)


def _identity(row: Mapping[str, Any], by: str) -> str:
    for column in ("split_key", "prompt", "question") if by == "prompt" else ():
        if column in row:
            return _digest(_canonical(row[column]))
    for column in ("messages", "chosen") if by == "prompt" else ():
        if isinstance(row.get(column), list):
            return _digest(_canonical(_before_first_answer(row[column])))
    return _digest(_canonical(row))


def _before_first_answer(messages: list[Any]) -> list[Any]:
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            return messages[:index]
    return messages


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
