"""A reward that does to its rank what the environment asks for, at its second call or in the
backward pass after that.

It counts what it has graded over all starts of the run; each rank has counts of its own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignment.activity import ACTIVITY
from alignment.runs.launched import LAUNCHER
from alignment.runs.watch import read_beat

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
    if kind == "death in backward" and rank == "1":
        _in_backward(signal.SIGKILL)
    if kind == "standstill" and rank == "1":
        _in_backward(signal.SIGSTOP)
    if kind == "launcher's death" and rank == "0":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if kind == "stop" and rank == "0":
        # As a scheduler asks the command to stop; without one, as the command asks a rank.
        os.kill(os.getppid() if LAUNCHER in os.environ else os.getpid(), signal.SIGTERM)
        time.sleep(1.0)  # until the launcher has passed it on


def _in_backward(number: int) -> None:
    """Send this rank a signal in the midst of its next backward pass.

    Where weights lie in parts that is one exchange of all ranks. Its heartbeat is seen to say so
    first: the others then know of no rank that has not come as far.
    """
    tensors: Any = torch.Tensor
    backward = tensors.backward

    def once(loss: Any, *args: Any, **options: Any) -> None:
        tensors.backward = backward
        loss.register_hook(lambda _: _once_arrived(number))
        backward(loss, *args, **options)

    tensors.backward = once


def _once_arrived(number: int) -> None:
    run, rank = Path("runs") / "run", int(os.environ["RANK"])
    while ACTIVITY.exchanging:
        beat = read_beat(run, rank)
        if beat is not None and beat.exchanges == ACTIVITY.exchanges:
            break
        time.sleep(0.02)
    os.kill(os.getpid(), number)
