"""A watch in each rank: it notices that nothing moves or that a rank is gone, says which, and ends.

Each rank writes every few seconds what it is doing into `.heartbeat/rank-N.json` of the run. A rank
that does not move for longer than the limit reads what the others wrote, and judges:

* others have not come as far as it has: it waits for those. While one of them moves, that is
  patience; when none does, it is a hang, and it is theirs;
* nobody is behind: it hangs itself. In an exchange where all have arrived it is a rank that does
  not even write any more, as one that was stopped; or else the connection.

So a rank that waits for a slow evaluation is left alone, and the message names the rank that all
wait for. A thread can do this while the training thread is stuck in a grader or in an exchange; it
cannot stop that thread, so it writes the event and all stacks, and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import psutil
from rich.console import Console

from alignment.activity import ACTIVITY
from alignment.runs.events import EventLog
from alignment.runs.launched import is_orphan, report
from alignment.types import AlignmentError

HEARTBEATS = ".heartbeat"
BEAT_SECONDS = 2.0
GRACE_BEATS = 3
"""So long a rank that lost another may still fail by itself, with the error of its exchange."""
SILENT_SECONDS = 60.0
"""A rank on another machine is taken for dead when its heartbeat has not changed for so long."""
LOADING = "loading"
"""The phase in which bytes read and written are movement, too."""
LOADED_BYTES = 2**20
"""As many of them as that. The watch itself writes a few hundred at a time."""

_EXCHANGE_ERROR = re.compile(r"gloo|nccl|c10d|process ?group", re.I)


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank was doing when it wrote this.

    written: `time.time()` of writing; since: when the phase began.
    idle:    seconds in which nothing had moved by then.
    ended:   why the rank is ending; empty while it runs.
    silent:  seconds in which it has not been written anew, as seen by who reads it.
    """

    rank: int
    host: str
    pid: int
    written: float
    step: int
    phase: str
    detail: str
    since: float
    idle: float
    exchanges: int
    exchanging: bool
    ended: str = ""
    silent: float = 0.0

    @property
    def place(self) -> str:
        """Such as `grading of step 7 (reward 'math')`."""
        step = f" of step {self.step}" if self.step else ""
        return f"{self.phase}{step}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a rank must end: an event's kind, its message, and the ranks it is about."""

    kind: str
    message: str
    ranks: tuple[int, ...]


class Watch:
    """Watches the training thread of this rank, as a context manager around a run.

    Args:
        run: the run's folder; None while there is none yet. Ranks then know nothing of each other,
            and the stacks of one that hangs go to standard error.
        hang_minutes: how long nothing may move; 0 watches for lost ranks only.

    Raises (on leaving):
        AlignmentError: an exchange failed; the message names the ranks that are gone, and what
            this one was doing.
    """

    def __init__(
        self, run: Path | None, events: EventLog, *, rank: int, world_size: int, hang_minutes: float
    ) -> None:
        self._run = run
        self._events = events
        self._rank = rank
        self._world_size = world_size
        self._limit = 60.0 * hang_minutes
        self._interval = min(BEAT_SECONDS, self._limit / 4) if self._limit else BEAT_SECONDS
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._first_seen: dict[int, tuple[float, float]] = {}
        self._lost_since: float | None = None
        self._bytes = 0

    def __enter__(self) -> Watch:
        ACTIVITY.restart()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:  # not while it is ending the process
            self._done.set()
        self._thread.join()
        if error is None or getattr(error, "exit_code", 1) == 0:
            self._remove()
            return
        lost = self._lost_by(error) if self._world_size > 1 else None
        self._write(ended=f"{type(error).__name__}: {error}"[:500])
        if lost is not None:
            raise AlignmentError(lost.message) from error

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._done.wait(self._interval):
            asleep, woke = time.monotonic() - woke, time.monotonic()
            if self._limit and asleep > self._limit / 2:  # the whole process stood still
                ACTIVITY.move()
            self._note_loading()
            self._write()
            verdict = self._judge()
            with self._lock:
                if verdict is not None and not self._done.is_set():
                    self._end(verdict)

    def _note_loading(self) -> None:
        """A download or a slow disk tells nobody how far it has come."""
        if ACTIVITY.phase == LOADING and (moved := bytes_moved()) - self._bytes >= LOADED_BYTES:
            self._bytes = moved
            ACTIVITY.move()

    def _judge(self) -> Verdict | None:
        if is_orphan():
            return Verdict("error", f"the launcher of {self._name()} is gone; it ends too", ())
        own = self._beat()
        if own.idle < self._interval:
            self._lost_since = None
            return None
        others = self._others()
        lost = [beat for beat in others if self._is_lost(beat)]
        if lost:
            now = time.monotonic()
            self._lost_since = now if self._lost_since is None else self._lost_since
            if now - self._lost_since >= GRACE_BEATS * self._interval:
                return self._lost(own, lost)
        if not self._limit or own.idle < self._limit:
            return None
        return hang(own, others, limit=self._limit, world_size=self._world_size)

    def _end(self, verdict: Verdict) -> NoReturn:
        """Say why, and end the process: the training thread cannot be reached."""
        own = self._beat()
        message = verdict.message
        if verdict.kind == "hang":
            message += f"; the stacks of its threads are {self._write_stacks(message)}"
        with suppress(AlignmentError):
            self._events.write(
                verdict.kind,
                message,
                logged=False,  # it is said below
                rank=self._rank,
                phase=own.phase,
                detail=own.detail,
                step=own.step,
                seconds=round(own.idle, 3),
                ranks=verdict.ranks,
            )
        self._write(ended=verdict.message)
        advice = "give the same command again to go on from the last checkpoint"
        if not report(f"{message}; {advice}", 1, hang=verdict.kind == "hang"):
            Console(stderr=True).print(
                f"align: {message}; {advice}", markup=False, highlight=False, soft_wrap=True
            )
        with suppress(Exception):  # whoever reads the output may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)

    def _write_stacks(self, message: str) -> str:
        """Where they are."""
        if self._run is None:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            return "above"
        path = self._run / f"hang-rank{self._rank}.txt"
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(f"{message}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return f"in {path}"

    def _lost_by(self, error: BaseException) -> Verdict | None:
        """What an error of an exchange says about the others; None for any other error."""
        if not isinstance(error, RuntimeError) or not _is_of_exchange(error):
            return None
        own = self._beat()
        deadline = time.monotonic() + GRACE_BEATS * self._interval
        while not (lost := [beat for beat in self._others() if self._is_lost(beat)]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return self._lost(own, lost or self._others())

    def _lost(self, own: Beat, lost: Sequence[Beat]) -> Verdict:
        whom = "; ".join(self._describe_lost(beat) for beat in lost) or "another rank"
        message = f"rank {self._rank}, in {own.place}, lost the connection to {whom}"
        return Verdict("error", message, tuple(beat.rank for beat in lost))

    def _describe_lost(self, beat: Beat) -> str:
        if beat.ended:
            return f"rank {beat.rank}, which ended in {beat.place}: {beat.ended}"
        state = "is dead" if self._is_lost(beat) else "may be alive"
        return (
            f"rank {beat.rank}, which {state}; its last sign of life was at {clock(beat.written)} "
            f"in {beat.place} (process {beat.pid} on {beat.host})"
        )

    def _is_lost(self, beat: Beat) -> bool:
        if beat.ended:
            return True
        if beat.host == self._host:
            return not _runs(beat.pid)
        return self._age(beat) > SILENT_SECONDS

    def _age(self, beat: Beat) -> float:
        """Seconds since this rank first saw that heartbeat; clocks of other machines differ."""
        written, seen = self._first_seen.get(beat.rank, (0.0, 0.0))
        if written != beat.written:
            seen = time.monotonic()
            self._first_seen[beat.rank] = beat.written, seen
        return time.monotonic() - seen

    def _name(self) -> str:
        return f"rank {self._rank}" if self._world_size > 1 else "the run"

    def _beat(self, ended: str = "") -> Beat:
        note = ACTIVITY
        return Beat(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            written=time.time(),
            step=note.step,
            phase=note.phase,
            detail=note.detail,
            since=note.since,
            idle=time.monotonic() - note.moved,
            exchanges=note.exchanges,
            exchanging=note.exchanging,
            ended=ended,
        )

    def _others(self) -> list[Beat]:
        """What the other ranks last wrote; a rank that has not begun is left out. One whose watch
        cannot write either (a call that lets no other thread run) grows idle all the same."""
        if self._run is None:
            return []
        found = (read_beat(self._run, r) for r in range(self._world_size) if r != self._rank)
        beats = [(beat, self._age(beat)) for beat in found if beat is not None]
        return [replace(beat, idle=beat.idle + age, silent=age) for beat, age in beats]

    def _write(self, ended: str = "") -> None:
        """Let the others know; without them there is nobody to read it."""
        if self._run is None or self._world_size == 1:
            return
        path = beat_path(self._run, self._rank)
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is for those to tell who write what matters
            path.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._beat(ended))), encoding="utf-8")
            os.replace(temporary, path)

    def _remove(self) -> None:
        if self._run is None or self._world_size == 1:
            return
        with suppress(OSError):  # the folder goes with the last of them
            beat_path(self._run, self._rank).unlink(missing_ok=True)
            beat_path(self._run, self._rank).parent.rmdir()


def hang(own: Beat, others: Sequence[Beat], *, limit: float, world_size: int) -> Verdict | None:
    """Who hangs, asked by a rank in which nothing has moved for `limit` seconds; None while those
    that it waits for still move."""
    name = f"rank {own.rank}" if world_size > 1 else "the run"
    spent = f"{own.idle / 60:.3g} minutes (limits.hang_minutes is {limit / 60:.3g})"
    behind = [beat for beat in others if beat.exchanges < own.exchanges]
    if any(beat.idle < limit and not beat.ended for beat in behind):
        return None
    stopped = [beat for beat in others if own.exchanging and beat.silent > limit / 2]
    if late := behind or stopped:
        whom = "; ".join(_describe_late(beat, limit) for beat in late)
        message = f"{name} waited in {own.place} for {spent} for {whom}"
        return Verdict("hang", message, tuple(beat.rank for beat in late))
    if own.exchanging:
        message = (
            f"{name} is in an exchange with the other ranks, in {own.place}, for {spent}, though "
            "no rank is behind: look at the connection between the processes"
        )
        return Verdict("hang", message, tuple(beat.rank for beat in others))
    since = clock(own.since)
    message = f"{name} hangs in {own.place} since {since}: nothing moved for {spent}"
    return Verdict("hang", message, (own.rank,))


def _describe_late(beat: Beat, limit: float) -> str:
    what = f"rank {beat.rank}, which is in {beat.place} since {clock(beat.since)}"
    if beat.silent <= limit / 2:
        return what
    return (
        f"{what} and has given no sign of life since {clock(beat.written)}: process {beat.pid} on "
        f"{beat.host} is stopped, or in a call that lets no other thread run"
    )


def clear_heartbeats(run: Path) -> None:
    """Remove what ranks of an earlier, killed start of the run left."""
    for path in (run / HEARTBEATS).glob("rank-*"):
        path.unlink(missing_ok=True)


def beat_path(run: Path, rank: int) -> Path:
    return run / HEARTBEATS / f"rank-{rank}.json"


def read_beat(run: Path, rank: int) -> Beat | None:
    """A rank's heartbeat; None where there is none yet, or no more."""
    try:
        return Beat(**json.loads(beat_path(run, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def clock(seconds: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S UTC")


def bytes_moved() -> int:
    """What this process has read and written so far, caches included; 0 where the system does not
    say."""
    try:
        counters = psutil.Process().io_counters()
    except (AttributeError, OSError, psutil.Error):
        return 0
    names = ("read_chars", "write_chars", "read_bytes")
    return sum(getattr(counters, name, 0) for name in names)


def _is_of_exchange(error: BaseException) -> bool:
    """Whether an error comes from the exchange between ranks and not from computing."""
    return type(error).__name__.startswith("Dist") or bool(_EXCHANGE_ERROR.search(str(error)))


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it is there, and not ours to look at
        return True
