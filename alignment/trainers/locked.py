"""A run is trained by one start at a time: rank 0 holds the lock for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignment.distributed import Distributed
from alignment.runs.events import EventLog
from alignment.runs.lock import RunLock
from alignment.runs.watch import clear_heartbeats
from alignment.types import UserInputError


@contextmanager
def locked(run: Path, distributed: Distributed, events: EventLog) -> Iterator[None]:
    """Nobody else trains the run in this folder inside; every rank enters.

    What ranks of an earlier, killed start left to tell each other is removed. Where the file system
    has no locks, a warning says that nothing holds a second start off.

    Raises:
        UserInputError: on every rank, where another start has the run; it names the process.
    """
    lock = RunLock(run)
    refusal = lock.take() if distributed.is_main else None
    try:
        if distributed.is_main and refusal is None:
            clear_heartbeats(run)
        refusal = distributed.broadcast(refusal)
        if refusal is not None:
            raise UserInputError(refusal)
        if lock.missing:
            events.write("warning", lock.missing)
        yield
    finally:
        lock.release()
