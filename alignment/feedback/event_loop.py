"""Coroutines, for callers that know nothing of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises.

    It runs in a thread of its own: the caller's may have an event loop already, as in a notebook.
    A caller that is interrupted (Ctrl-C) cancels `work` and does not wait for it, nor does the end
    of the process: except for a look-up of a host's name that hangs, and for a write to a file.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    thread = threading.Thread(target=_run, args=(loop, task), name="requests", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        with suppress(RuntimeError):  # it ended meanwhile, and the loop is closed
            loop.call_soon_threadsafe(task.cancel)
        raise
    return task.result()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    try:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
