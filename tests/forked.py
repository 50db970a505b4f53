"""Work that ends its process, done in a child of the test's own: everything is imported already.

The work must not compute with torch, whose threads a child does not have.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE = 60.0


def in_child(work: Callable[[], object], log: Path) -> tuple[int, str]:
    """The exit code of a child that does `work`, 0 where that returns, and what it said."""
    pid = os.fork()
    if pid == 0:
        _work_and_exit(work, log)
    deadline = time.monotonic() + _PATIENCE
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1]), log.read_text(encoding="utf-8")


def _work_and_exit(work: Callable[[], object], log: Path) -> None:
    code = 3
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = sys.__stderr__ = os.fdopen(out, "w")
        work()
        code = 0
    finally:
        os._exit(code)
