"""A reward that does to its rank what the environment asks for, at its second call.

It counts what it has graded over all starts of the run; each rank has counts of its own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

_calls = 0
_graded = {"batches": 0, "ids": 0}


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even token ids, unless it is the second call and FAULT names one."""
    global _calls
    _calls += 1
    if _calls == 2:
        _fault(os.environ.get("FAULT"), os.environ.get("RANK"))
    _graded["batches"] += 1
    _graded["ids"] += sum(map(sum, completion_ids))
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


even_tokens.state_dict = lambda: dict(_graded)  # type: ignore[attr-defined]
even_tokens.load_state_dict = _graded.update  # type: ignore[attr-defined]


def _fault(kind: str | None, rank: str | None) -> None:
    if kind == "hang" and rank == "1":
        time.sleep(600)
    if kind == "death" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop" and rank == "0":
        os.kill(os.getppid(), signal.SIGTERM)  # as a scheduler asks the command to stop
        time.sleep(1.0)  # until the launcher has passed it on
