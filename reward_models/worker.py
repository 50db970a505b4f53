"""The process in which untrusted text is graded. Run as a script by `reward_models.pool`.

It imports one function, then answers requests one at a time, until its input ends. Requests are
pickled by the parent, which it trusts; replies are lines of JSON, so that the parent never
unpickles anything that came from here. The reply channel is a private copy of standard output:
whatever a library prints goes nowhere. No file can be written once the function is imported,
memory is capped, and each request gets a budget of processor time that the kernel enforces even
where Python code could not (a long computation in C that holds the interpreter's lock).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pickle
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO

_LENGTH = struct.Struct(">Q")


def main() -> None:
    requests, replies = _private_channels()
    settings = _receive(requests)
    try:
        sys.path[:] = settings["path"]
        module_name, _, attribute = settings["target"].partition(":")
        function = getattr(importlib.import_module(module_name), attribute)
    except BaseException as error:
        _send(replies, {"fatal": _describe(error)})
        return
    _limit(settings["memory_bytes"])
    _send(replies, {"ready": True})
    _serve(function, requests, replies, settings["cpu_seconds"])


def _serve(
    function: Callable[[Any], Any], requests: BinaryIO, replies: TextIO, cpu_seconds: float
) -> None:
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        _grant_cpu(cpu_seconds)
        _send(replies, _answer(function, request))


def _answer(function: Callable[[Any], Any], request: Any) -> dict[str, Any]:
    try:
        return {"ok": function(request)}
    except MemoryError:
        return {"error": "out of memory"}
    except BaseException as error:  # sys.exit() in a grader is its failure, not our end
        return {"error": _describe(error)}


def _private_channels() -> tuple[BinaryIO, TextIO]:
    """Standard input and output under other numbers; the numbers 0 and 1 become /dev/null."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return requests, replies


def _receive(requests: BinaryIO) -> Any:
    header = requests.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    return pickle.loads(requests.read(_LENGTH.unpack(header)[0]))


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _limit(memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not every system knows every limit
            resource.setrlimit(limit, (value, value))


def _grant_cpu(seconds: float) -> None:
    """End this process (SIGXCPU) once it has used `seconds` more of processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(used + seconds)
    if hard == resource.RLIM_INFINITY or soft <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
