"""One run, killed again and again at random moments until enough kills have landed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from victims import Victim, start

from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.files import TEMPORARY_PREFIX
from alignment.types import AlignmentError

_PATIENCE = 300.0  # seconds without the event that a kill waits for
_POLL = 0.001


@dataclass(frozen=True)
class Tempo:
    """How long the parts of an uninterrupted run take, in seconds.

    starting: up to the first step; of one step; finishing: after the last step.
    """

    starting: float
    step: float
    finishing: float


@dataclass
class Toll:
    """What was done to a run: kills, those of them inside the writing of a checkpoint, starts
    after a kill, and processes that outlived a dead one and had to be killed too."""

    kills: int = 0
    in_writing: int = 0
    resumes: int = 0
    outlived: int = 0


@dataclass(frozen=True)
class Launch:
    """A run that can be started: the same command in the same environment each time."""

    command: list[str]
    run: RunDirectory
    log: Path
    processes: int
    steps: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> Victim:
        return start(self.command, self.log, processes=self.processes, environment=self.environment)

    def lives(self) -> int:
        """How often training began."""
        return _count(self.run.events, b'"kind": "start"')

    def recorded(self) -> int:
        """Lines of metrics.jsonl, where step 0 may be one."""
        return _count(self.run.metrics, b"\n")

    def saved(self) -> int:
        """The last step that has a checkpoint."""
        return max((step for step, _ in list_checkpoints(self.run.checkpoints_dir)), default=0)

    def temporaries(self) -> frozenset[str]:
        """The names of folders that have not become checkpoints, or are none any more."""
        found = self.run.checkpoints_dir.glob(f"{TEMPORARY_PREFIX}*")
        return frozenset(path.name for path in found)

    def is_writing(self, earlier: frozenset[str]) -> bool:
        """Whether a checkpoint is half written.

        Args:
            earlier: the temporary folders that were there before the run was started.
        """
        folder = self.run.checkpoints_dir
        return any(_is_half_written(folder / name) for name in self.temporaries() - earlier)


def run_through(launch: Launch) -> Tempo:
    """Run without interruption.

    Raises:
        AlignmentError: it failed.
    """
    began = time.monotonic()
    victim = launch.start()
    _until(lambda: launch.recorded() > 1, victim)
    first, first_lines = time.monotonic(), launch.recorded()
    _until(lambda: launch.recorded() >= launch.steps, victim)
    last, lines = time.monotonic(), launch.recorded()
    require_success(victim)
    step = (last - first) / max(lines - first_lines, 1)
    return Tempo(max(first - began - step, 0.1), step, time.monotonic() - last)


def kill_and_resume(
    launch: Launch, tempo: Tempo, rng: random.Random, toll: Toll, *, kills: int, in_writing: int
) -> None:
    """Start the run, kill it, and start it again, until there are `kills` in `toll`, of which
    `in_writing` while a checkpoint was written; then let it end.

    Each life is killed a random number of steps after where it began, so that all lives together
    go over the whole run, or in its start. A run that ends before its kill is over: its toll stays
    as it is.

    Raises:
        AlignmentError: a start failed by itself.
    """
    while toll.kills < kills or toll.in_writing < in_writing:
        toll.resumes += int(launch.run.path.exists())
        left = max(kills - toll.kills, in_writing - toll.in_writing, 1)
        in_write = in_writing - toll.in_writing >= left or rng.random() < 0.4
        earlier = launch.temporaries()
        victim = launch.start()
        if not _await_moment(launch, victim, tempo, rng, left, in_write, earlier):
            require_success(victim)
            return
        # Rank 0 writes; where another one dies, it ends its checkpoint before it ends itself.
        toll.outlived += victim.kill(0 if in_write else rng.randrange(launch.processes))
        toll.kills += 1
        toll.in_writing += int(launch.is_writing(earlier))
    toll.resumes += 1
    require_success(launch.start())


def _await_moment(
    launch: Launch,
    victim: Victim,
    tempo: Tempo,
    rng: random.Random,
    left: int,
    in_write: bool,
    earlier: frozenset[str],
) -> bool:
    """Wait for a moment drawn at random, with `left` kills to go; False if the run ended first."""
    lives, saved = launch.lives(), launch.saved()
    to_go = launch.steps - saved
    progress = rng.uniform(-0.5, 2.0 * to_go / (left + 1))  # in steps; below 0, in the start
    if progress < 0.0 and not in_write:
        return _pause(2.0 * -progress * tempo.starting, victim)
    steps = min(int(max(progress, 0.0)), to_go)
    if not _until(lambda: launch.lives() > lives, victim):
        return False
    lines = launch.recorded() + steps
    if not _until(lambda: launch.recorded() >= lines, victim):
        return False
    if in_write and steps < to_go:
        written = launch.saved()
        return _until(
            lambda: launch.is_writing(earlier) or launch.saved() > written + 1, victim
        ) and _pause(rng.uniform(0.0, 0.5) * tempo.step * rng.random() ** 2, victim)
    return _pause(rng.random() * (tempo.step if steps < to_go else tempo.finishing), victim)


def _is_half_written(temporary: Path) -> bool:
    """Whether a temporary folder is a checkpoint that is being written.

    A checkpoint that is removed is renamed like this, too. It is whole, or it was begun before
    the newest one that stands was complete: one is written at a time, `state.json` first.
    """
    try:
        begun = (temporary / "state.json").stat().st_mtime_ns
        if _is_complete(temporary / "manifest.json"):
            return False
        standing = temporary.parent.glob("step-*/manifest.json")
        return all(path.stat().st_mtime_ns < begun for path in standing)
    except FileNotFoundError:  # it is gone, or not begun
        return False


def _is_complete(manifest: Path) -> bool:
    try:
        json.loads(manifest.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _until(holds: Callable[[], bool], victim: Victim) -> bool:
    """Wait until `holds`; False if the run ended first."""
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        if victim.ended():
            return holds()
        if time.monotonic() > deadline:
            victim.kill(0)
            raise AlignmentError(f"nothing happened for {_PATIENCE:.0f} s; see {victim.log}")
        time.sleep(_POLL)
    return True


def _pause(seconds: float, victim: Victim) -> bool:
    """Wait so long; False if the run ended first."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if victim.ended():
            return False
        time.sleep(_POLL)
    return not victim.ended()


def require_success(victim: Victim) -> None:
    """Wait for a run's end.

    Raises:
        AlignmentError: it failed; the message has the end of what it said.
    """
    codes = victim.codes()
    if any(codes):
        tail = victim.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise AlignmentError(f"a run that nobody killed ended with {codes}; it said:\n{tail}")


def _count(path: Path, what: bytes) -> int:
    try:
        return path.read_bytes().count(what)
    except FileNotFoundError:
        return 0
