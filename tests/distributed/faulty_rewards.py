"""A reward that does to its rank what the environment asks for, at its second call."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

_calls = 0


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even token ids, unless it is the second call and FAULT names one."""
    global _calls
    _calls += 1
    if _calls == 2:
        _fault(os.environ.get("FAULT"), os.environ.get("RANK"))
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def _fault(kind: str | None, rank: str | None) -> None:
    if kind == "hang" and rank == "1":
        time.sleep(600)
    if kind == "death" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop" and rank == "0":
        os.kill(os.getppid(), signal.SIGTERM)  # as a scheduler asks the command to stop
        time.sleep(1.0)  # until the launcher has passed it on
