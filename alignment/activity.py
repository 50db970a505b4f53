"""What this process is doing: noted where it is done, read by the watch (`runs/watch.py`).

There is one `ACTIVITY`, as a process does one thing at a time: whatever its training thread does.
Noting costs a microsecond and never fails, so that it can stand in every step's path.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Activity:
    """What is being done, and since when.

    step:       the step in progress; 0 before the first.
    phase:      such as loading, sampling, grading, update, evaluation, saving, comparison.
    detail:     what in particular, such as which reward grades which samples.
    since:      when the phase began (`time.time()`).
    moved:      when something was last begun, finished or computed (`time.monotonic()`).
    exchanges:  exchanges with the other ranks begun so far: how far the rank has come.
    exchanging: whether it is in one now, which ends when all ranks have come as far.
    """

    step: int = 0
    phase: str = "preparation"
    detail: str = ""
    since: float = field(default_factory=time.time)
    moved: float = field(default_factory=time.monotonic)
    exchanges: int = 0
    exchanging: bool = False

    def move(self) -> None:
        """Note progress, such as one forward pass."""
        self.moved = time.monotonic()

    def begin(self, step: int, phase: str) -> None:
        """Note that a step, or a phase outside the steps, begins."""
        self.step, self.phase, self.detail, self.since = step, phase, "", time.time()
        self.move()

    def restart(self) -> None:
        """Note that a run begins."""
        self.begin(0, "preparation")
        self.exchanges, self.exchanging = 0, False


ACTIVITY = Activity()


@contextmanager
def doing(phase: str, detail: str = "") -> Iterator[None]:
    """Note what happens inside. An error leaves the note: it says where things went wrong."""
    note = ACTIVITY
    outer = note.phase, note.detail
    note.phase, note.detail, note.since = phase, detail, time.time()
    note.move()
    yield
    note.phase, note.detail = outer
    note.since = time.time()
    note.move()


@contextmanager
def exchanging() -> Iterator[None]:
    """Note an exchange that every rank takes part in. An error leaves the note."""
    ACTIVITY.exchanges += 1
    ACTIVITY.exchanging = True
    ACTIVITY.move()
    yield
    ACTIVITY.exchanging = False
    ACTIVITY.move()
