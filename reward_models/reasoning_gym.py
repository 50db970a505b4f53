"""Tasks of reasoning-gym, scored by their own checkers.

Some of those checkers compute on what the completion says, which can take forever or be an attack;
they run in worker processes with the openings closed (`reward_models.reasoning_gym_worker`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.rewards.protocol import Item
from alignment.types import Outcome, Prompt, Score, UserInputError
from reward_models.answers import Extraction, final_answer, thinking_opened
from reward_models.pool import Reply, WorkerPool
from reward_models.verifier import no_answer

_PLACES: tuple[Extraction, ...] = ("answer_tag", "boxed", "all")


class ReasoningGymReward:
    """The score that a reasoning-gym task gives the answer, in [0, 1]: `correct` at 1.

    The rows come from the source `reasoning_gym`: `task` is the task's name, `entry` the whole
    entry, `options` what it was made with (the last two as mappings, or as JSON text). In rows of
    another make, where those names mean something else, the columns may be called
    `reasoning_gym_task` and so on.

    Args:
        extraction: where to look for the answer in a completion, in order of preference.
        partial_credit: False makes every score below 1 a 0. Some checkers give a little for the
            right form, and some for any answer that contains the right one.
        timeout_seconds: processor time for one check.
        workers: processes for the checks.

    Raises (when called):
        UserInputError: a row was not made by the source `reasoning_gym`, or names a task that
            the installed version does not have.
    """

    is_verifier = True

    def __init__(
        self,
        *,
        extraction: tuple[Extraction, ...] = _PLACES,
        partial_credit: bool = True,
        timeout_seconds: float = 10.0,
        workers: int = 2,
    ) -> None:
        self._extraction = extraction
        self._partial_credit = partial_credit
        self._pool = WorkerPool(
            "reward_models.reasoning_gym_worker:grade",
            workers=workers,
            timeout_seconds=timeout_seconds,
        )

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        scores: dict[int, Score] = {}
        requests: dict[int, dict[str, Any]] = {}
        for index, (prompt, completion) in enumerate(items):
            request = _task_of(prompt)
            opened = thinking_opened(prompt.text)
            answer = final_answer(completion.text, self._extraction, thinking_opened=opened)
            if answer is None:
                scores[index] = no_answer("the completion has no answer")
            else:
                requests[index] = {**request, "answer": answer}
        for index, reply in zip(requests, self._pool.run(list(requests.values())), strict=True):
            scores[index] = self._as_score(reply, requests[index], items[index][0])
        return [scores[index] for index in range(len(items))]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _as_score(self, reply: Reply, request: dict[str, Any], prompt: Prompt) -> Score:
        detail = f"{request['task']}: {request['answer'][:100]!r}"
        if reply.failure is not None:
            return Score(None, reply.failure, f"{reply.detail}; {detail}")
        if "bad_row" in reply.value:
            raise UserInputError(
                f"{prompt.row_name} cannot be scored by reasoning-gym: "
                f"{reply.value['bad_row']}; make the data again with the installed version"
            )
        score = float(reply.value["score"])
        if score >= 1.0:
            return Score(score, Outcome.CORRECT, detail)
        return Score(score if self._partial_credit else 0.0, Outcome.WRONG, detail)


def _task_of(prompt: Prompt) -> dict[str, Any]:
    row = prompt.row
    prefix = "reasoning_gym_" if "reasoning_gym_task" in row else ""
    task, entry = row.get(prefix + "task"), _mapping(row.get(prefix + "entry"))
    options = _mapping(row.get(prefix + "options") or {})
    if not isinstance(task, str) or entry is None or options is None:
        known = ", ".join(sorted(row)) or "none"
        raise UserInputError(
            f"{prompt.row_name} is not a reasoning-gym entry (columns: {known}); "
            "the reward `reasoning_gym` goes with the data source `reasoning_gym`"
        )
    return {"task": task, "entry": entry, "options": options}


def _mapping(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None
