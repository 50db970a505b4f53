"""One process at a time trains a run: a lock of the operating system on `.lock` in its folder.

Two starts of one run would write into the same metrics and checkpoints. The kernel holds the lock
for the process that took it, and lets go of it when that process ends, however it ends: a run that
was killed can be gone on with at once.

It is taken with `flock` and not through filelock, whose locks a forked child cannot let go of
without taking them from its parent: a worker that outlives a killed run would keep it locked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from alignment.runs.events import utc_now
from alignment.runs.files import readable_errors

LOCK = ".lock"

_HELD_ERRNOS = (errno.EAGAIN, errno.EACCES)
_OPEN: set[int] = set()


class RunLock:
    """The right to train a run.

    Where the file system has no locks (`missing` then says so) it is given to everyone.

    Args:
        run: the run's folder, which is there.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._descriptor: int | None = None
        self.missing = ""

    def take(self) -> str | None:
        """Take it, without waiting.

        Returns:
            None, or who has it and what to do.

        Raises:
            AlignmentError: the folder cannot be written to.
        """
        path = self._run / LOCK
        with readable_errors("lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not for programs started
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD_ERRNOS:
                return _refusal(self._run)
            self.missing = (
                f"the file system of {self._run} has no locks ({error.strerror}), so that nothing "
                "keeps a second start of this run from writing into the same files: see to it that "
                "there is none"
            )
            return None
        self._descriptor = descriptor
        _OPEN.add(descriptor)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": utc_now()}
        _write(descriptor, json.dumps(holder))
        return None

    def release(self) -> None:
        """Let go of it, where this has it."""
        if self._descriptor is not None:
            _write(self._descriptor, "")
            _OPEN.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def _write(descriptor: int, note: str) -> None:
    """Say who holds the lock; nothing goes by it, so that a full disk is for others to tell."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note.encode(), 0)


def _refusal(run: Path) -> str:
    whom, stop = "another process", "stop it"
    with suppress(OSError, ValueError, KeyError, TypeError):  # it may not have said so yet
        holder = json.loads((run / LOCK).read_bytes())
        whom = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        stop = f"stop it there (kill {holder['pid']}: it finishes its step and saves)"
    return (
        f"the run {run} is being trained by {whom}; wait for it to end, or {stop} and give the "
        "command again, or choose another run.name"
    )


def _let_go_in_child() -> None:
    """A forked child shares the lock with its parent, and would keep it after the parent's end."""
    for descriptor in _OPEN:
        with suppress(OSError):
            os.close(descriptor)
    _OPEN.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
