"""The lock of a run: one process has it, however that ends, and nothing it started keeps it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import events_of, run

from alignment.runs import lock as lock_module
from alignment.runs.lock import LOCK, RunLock

HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from alignment.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
assert lock.take() is None
child = 0
if sys.argv[2] == "forks":
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"runs")
        time.sleep(60)
        os._exit(0)
    os.read(read, 4)
elif sys.argv[2] == "starts a program":
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False).pid
elif sys.argv[2] == "releases":
    lock.release()
print(child, flush=True)
time.sleep(60)
"""


@contextmanager
def holder(run: Path, what: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that has taken the lock; the process that it started then, or 0."""
    command = [sys.executable, "-c", HOLDER, str(run), what]
    child = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def test_a_second_process_is_told_who_has_it_and_what_to_do(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        for _ in range(2):
            refusal = RunLock(tmp_path).take()
            assert refusal is not None
            assert f"process {process.pid} on {socket.gethostname()} since 2" in refusal
            assert "wait for it to end, or stop it there" in refusal
            assert f"kill {process.pid}" in refusal


@pytest.mark.parametrize("what", ["", "forks", "starts a program"])
def test_a_killed_process_has_it_no_more_though_a_child_lives(tmp_path: Path, what: str) -> None:
    with holder(tmp_path, what) as (process, child):
        assert RunLock(tmp_path).take() is not None
        process.kill()
        process.wait()
        if child:
            os.kill(child, 0)  # it is there
        lock = RunLock(tmp_path)
        assert lock.take() is None
        lock.release()


def test_it_is_free_after_its_release(tmp_path: Path) -> None:
    with holder(tmp_path, "releases"):
        mine = RunLock(tmp_path)
        assert mine.take() is None
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        other = RunLock(tmp_path)  # of a second start in this process
        assert f"process {os.getpid()} on" in (other.take() or "")
        other.release()  # it has nothing to let go of
        assert RunLock(tmp_path).take() is not None
        mine.release()
        mine.release()
        assert (tmp_path / LOCK).read_bytes() == b""  # nobody is named who has it no more
        again = RunLock(tmp_path)
        assert again.take() is None
        again.release()


def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / LOCK).write_text("")
        assert "is being trained by another process; wait" in (RunLock(tmp_path).take() or "")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    stand_in = SimpleNamespace(flock=none, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
    monkeypatch.setattr(lock_module, "fcntl", stand_in)
    lock = RunLock(tmp_path)
    assert lock.take() is None
    assert os.strerror(number) in lock.missing and "second start" in lock.missing
    lock.release()
    if number == errno.ENOLCK:
        (event,) = events_of(run("sft", tmp_path, "algorithm.steps=1"), "warning")
        assert "has no locks (No locks available)" in event["message"]
