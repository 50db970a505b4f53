"""`align` in processes that can be killed, forked from one that has everything imported already.

So a start costs what loading the model costs, and not the seconds that importing torch takes. The
parent must not train, nor use a pool of threads, before it forks.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from typer.main import get_command

from alignment.cli import app


@dataclass(frozen=True)
class Victim:
    """The processes of one run, each the leader of a process group of its own."""

    ranks: list[int]
    log: Path

    def kill(self, rank: int) -> int:
        """SIGKILL to one rank's group. The others may end by themselves, or are killed too.

        Returns:
            how many had to be.
        """
        os.killpg(self.ranks[rank], signal.SIGKILL)
        _wait(self.ranks[rank])
        others = [pid for pid in self.ranks if pid != self.ranks[rank]]
        deadline = time.monotonic() + 10.0
        hung = 0
        for pid in others:
            while not _has_ended(pid):
                if time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                    _wait(pid)
                    hung += 1
                    break
                time.sleep(0.002)
        return hung

    def ended(self) -> bool:
        """Whether a process of the run has come to its end; it stays to be waited for."""
        return any(_has_ended(pid) for pid in self.ranks)

    def codes(self) -> list[int]:
        """Exit codes, once all have ended."""
        return [_wait(pid) for pid in self.ranks]


def start(
    command: list[str],
    log: Path,
    *,
    processes: int,
    environment: Mapping[str, str] | None = None,
    modules: Path | None = None,
) -> Victim:
    """Start `align COMMAND` under so many gloo processes; what it says is appended to `log`.

    Args:
        environment: what is set besides what says which rank it is.
        modules: file that the first process writes the names of what it has imported to.
    """
    variables = dict(environment or {})
    if processes > 1:
        variables |= {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    ranks = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            if processes > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _become(command, log, variables, modules if rank == 0 else None)
        ranks.append(pid)
        os.setpgid(pid, pid)
    return Victim(ranks, log)


def import_all(modules: Path) -> None:
    """Import what a run has imported, so that those forked from now on need not."""
    for name in json.loads(modules.read_text(encoding="utf-8")):
        with contextlib.suppress(Exception):  # some were not imported but made
            importlib.import_module(name)


def _become(
    command: list[str], log: Path, environment: Mapping[str, str], modules: Path | None
) -> None:
    """Be that process, in a child that was just forked; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        # The pool of threads that a fork leaves is made anew by the first who uses it; two who do
        # so at a time, as when weights are loaded, find none ("Invalid thread pool!").
        torch.set_num_threads(torch.get_num_threads())
        code = _main(command)
        if modules is not None:
            modules.write_text(json.dumps(list(sys.modules)), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _main(command: list[str]) -> int:
    sys.argv = ["align", *command]
    try:
        get_command(app)(command)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
