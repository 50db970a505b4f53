"""A pool of worker processes that can be killed: graders that may hang, crash or eat memory.

A check of untrusted text can hold the interpreter's lock for hours (`9^{9^{9^9}}`), or bring its
process down. Here such a check costs the one sample it was for: its worker is killed and another
takes its place. Nothing depends on signals or threads of the parent, so a pool can be used from
any thread, next to CUDA, and after a fork (the child starts workers of its own).
"""

from __future__ import annotations

import json
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from alignment.activity import ACTIVITY
from alignment.types import AlignmentError, Outcome, UserInputError

WALL_FACTOR = 4.0
"""Wall-clock limit of a check, as a multiple of its limit in processor seconds."""

_LENGTH = struct.Struct(">Q")
_SCRIPT = str(Path(__file__).with_name("worker.py"))
_MAX_REPLY_BYTES = 1 << 20
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
_FIXED = {
    "PYTHONHASHSEED": "0",  # so that a check does not depend on the process it ran in
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request: its value, or (failure set) why there is none."""

    value: Any = None
    failure: Outcome | None = None
    detail: str = ""


class WorkerPool:
    """Runs `target`, a "module:function" of one picklable argument, in worker processes.

    Args:
        target: what the workers import and call; its results must be JSON values.
        workers: how many processes at most. They are started when first needed.
        timeout_seconds: processor time for one request, at a resolution of one second, so that a
            busy machine does not change a verdict. `WALL_FACTOR` times as much of wall-clock time
            is the limit for requests that wait without computing.
        memory_mb: address space of each worker.
        startup_seconds: wall-clock limit for a worker to import the target.
        recycle_after: requests after which a worker is replaced by a fresh one.
    """

    def __init__(
        self,
        target: str,
        *,
        workers: int = 2,
        timeout_seconds: float = 5.0,
        memory_mb: int = 2048,
        startup_seconds: float = 120.0,
        recycle_after: int = 5000,
    ) -> None:
        for name, value in (("workers", workers), ("timeout_seconds", timeout_seconds)):
            if not value > 0:
                raise UserInputError(f"{name} of the pool for {target} is {value}; it must be > 0")
        self._target = target
        self._size = workers
        self._timeout_seconds = timeout_seconds
        self._memory_bytes = memory_mb << 20
        self._startup_seconds = startup_seconds
        self._recycle_after = recycle_after
        self._start_afresh()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, requests: Sequence[Any]) -> list[Reply]:
        """One `Reply` per request, in order. Concurrent calls take turns.

        Raises:
            AlignmentError: a worker cannot start (the target fails to import).
        """
        if os.getpid() != self._crew.pid:
            self._start_afresh()
        with self._lock:
            batch = _Batch(requests)
            try:
                while batch.unfinished:
                    self._hand_out(batch)
                    self._wait(batch)
            finally:  # an interrupted batch must not leave replies for the next one
                for worker in self._crew.busy():
                    self._crew.dismiss(worker)
        return batch.replies

    def close(self) -> None:
        """End all workers. A later `run` starts new ones."""
        if os.getpid() == self._crew.pid:
            with self._lock:
                self._crew.dismiss_all()

    def _start_afresh(self) -> None:
        self._crew = _Crew()
        self._lock = threading.Lock()
        # At exit, or once nothing refers to the pool.
        weakref.finalize(self, _Crew.dismiss_all, self._crew)

    def _hand_out(self, batch: _Batch) -> None:
        for worker in self._crew.idle():
            if not batch.waiting:
                return
            if worker.process.poll() is not None:
                self._crew.dismiss(worker)
                continue
            index = batch.waiting.popleft()
            if worker.send(batch.requests[index]):
                worker.request = index
                worker.deadline = time.monotonic() + WALL_FACTOR * self._timeout_seconds
            else:  # it died while it was idle, which is not the request's doing
                batch.waiting.appendleft(index)
                self._crew.dismiss(worker)
        starting = sum(worker.starting for worker in self._crew.workers)
        missing = min(self._size - len(self._crew.workers), len(batch.waiting) - starting)
        for _ in range(missing):
            self._crew.hire(self._settings(), self._startup_seconds)

    def _settings(self) -> dict[str, Any]:
        return {
            "target": self._target,
            "path": [entry or os.getcwd() for entry in sys.path],
            "memory_bytes": self._memory_bytes,
            "cpu_seconds": self._timeout_seconds,
        }

    def _wait(self, batch: _Batch) -> None:
        ACTIVITY.move()  # every wait has an end
        now = time.monotonic()
        nearest = min((worker.deadline for worker in self._crew.active()), default=now)
        for key, _ in self._crew.selector.select(max(0.0, nearest - now)):
            self._hear(key.data, batch)
        now = time.monotonic()
        for worker in self._crew.active():
            if worker.deadline <= now:
                self._crew.dismiss(worker)
                self._ended(worker, batch, timed_out=True)

    def _hear(self, worker: _Worker, batch: _Batch) -> None:
        chunk = worker.receive()
        if not chunk or len(worker.received) > _MAX_REPLY_BYTES:
            with suppress(subprocess.TimeoutExpired):  # let its own exit code come first
                worker.process.wait(1.0)
            self._crew.dismiss(worker)
            self._ended(worker, batch, timed_out=worker.process.returncode == -signal.SIGXCPU)
        elif b"\n" in chunk:
            message = json.loads(bytes(worker.received))
            worker.received.clear()
            self._handle(worker, message, batch)

    def _handle(self, worker: _Worker, message: dict[str, Any], batch: _Batch) -> None:
        if "fatal" in message:
            self._crew.dismiss(worker)
            raise self._cannot_start(message["fatal"])
        if worker.request is None:
            worker.starting = False
            return
        failed = "error" in message
        batch.replies[worker.request] = (
            Reply(failure=Outcome.CRASH, detail=message["error"])
            if failed
            else Reply(value=message["ok"])
        )
        batch.unfinished -= 1
        worker.request = None
        worker.served += 1
        # After an error the worker may be short of memory, or otherwise not what it was.
        if failed or worker.served >= self._recycle_after:
            self._crew.dismiss(worker)

    def _ended(self, worker: _Worker, batch: _Batch, *, timed_out: bool) -> None:
        if worker.starting:
            why = "took too long" if timed_out else _exit_reason(worker.process)
            raise self._cannot_start(why)
        if worker.request is None:
            return
        batch.replies[worker.request] = (
            Reply(failure=Outcome.TIMEOUT, detail=f"no verdict within {self._timeout_seconds:g} s")
            if timed_out
            else Reply(failure=Outcome.CRASH, detail=f"the worker {_exit_reason(worker.process)}")
        )
        batch.unfinished -= 1

    def _cannot_start(self, why: str) -> AlignmentError:
        return AlignmentError(
            f"a worker process for {self._target} cannot start: {why}. Check that the package it "
            f"needs is installed in {sys.executable}, and that {self._memory_bytes >> 20} MB of "
            f"memory and {self._startup_seconds:g} s are enough to import it"
        )


class _Batch:
    """The requests of one call, and what is still to be done about them."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self.requests = requests
        self.replies: list[Reply] = [Reply()] * len(requests)
        self.waiting = deque(range(len(requests)))
        self.unfinished = len(requests)


@dataclass(eq=False, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    deadline: float
    starting: bool = True
    request: int | None = None  # index within the batch
    served: int = 0
    received: bytearray = field(default_factory=bytearray)

    def send(self, request: Any) -> bool:
        """Write a request; False where the worker is gone."""
        payload = pickle.dumps(request)
        try:
            self.stdin.write(_LENGTH.pack(len(payload)) + payload)
            self.stdin.flush()
        except OSError:
            return False
        return True

    def receive(self) -> bytes:
        """What has come since the last time; empty once the worker is gone."""
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        self.received += chunk
        return chunk


class _Crew:
    """The workers of one process, and the selector that listens to them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()

    def idle(self) -> list[_Worker]:
        return [worker for worker in self.workers if not worker.starting and worker.request is None]

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.request is not None]

    def active(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.starting or worker.request is not None]

    def hire(self, settings: dict[str, Any], startup_seconds: float) -> None:
        process = subprocess.Popen(
            # -P: the script's own folder, with its math.py, must not be on the module path.
            [sys.executable, "-P", "-s", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**{key: os.environ[key] for key in _PASSED_ON if key in os.environ}, **_FIXED},
            start_new_session=True,  # Ctrl-C is for the parent; and a killed group has no orphans
        )
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + startup_seconds
        worker = _Worker(process, process.stdin, process.stdout, deadline)
        self.workers.append(worker)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)
        worker.send(settings)

    def dismiss(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        self.selector.unregister(worker.stdout)
        if worker.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        for pipe in (worker.stdin, worker.stdout):
            with suppress(OSError):  # closing flushes what the worker no longer reads
                pipe.close()

    def dismiss_all(self) -> None:
        if os.getpid() != self.pid:  # a forked child must not end its parent's workers
            return
        for worker in list(self.workers):
            self.dismiss(worker)


def _exit_reason(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"
