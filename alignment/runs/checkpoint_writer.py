"""Writing checkpoints while training goes on, one at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from alignment.activity import ACTIVITY
from alignment.runs.checkpoint import write_checkpoint
from alignment.runs.events import EventLog
from alignment.runs.metrics import read_metrics
from alignment.runs.snapshot import Snapshot, take_snapshot
from alignment.types import AlignmentError


@dataclass(frozen=True, slots=True)
class BestBy:
    """Which checkpoint is the best: the one whose step has the best value of a metric.

    metrics: the run's `metrics.jsonl`.
    """

    metrics: Path
    metric: str
    mode: Literal["max", "min"]

    def scores(self) -> dict[int, float]:
        """Step to score, higher is better, of the steps that measured the metric."""
        sign = 1.0 if self.mode == "max" else -1.0
        return {
            record["step"]: sign * record[self.metric]
            for record in read_metrics(self.metrics)
            if self.metric in record
        }


@dataclass(frozen=True, slots=True)
class _Written:
    path: Path
    copy_seconds: float  # which the step waited for
    write_seconds: float  # while the next one ran
    has_scores: bool


class CheckpointWriter:
    """Saves a run's state without keeping its next step waiting.

    `submit` copies the state; a thread writes the copy, forces it to disk and renames it while the
    next step runs. At most one is being written: `submit`, `wait` and leaving the context wait for
    it. The copy is freed once it is on disk. A checkpoint is told of in the event log when it is
    in place, and an error of the thread is raised here: by the next call, whichever it is.

    Use it as a context manager, from one thread.

    Args:
        directory: folder of the checkpoints.
        events: told of each checkpoint.
        keep: latest checkpoints to keep.
        best: what to keep the best one by, beside the latest; None keeps none.
    """

    def __init__(
        self, directory: Path, events: EventLog, *, keep: int, best: BestBy | None = None
    ) -> None:
        self._directory = directory
        self._events = events
        self._keep = keep
        self._best = best
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._submitted: tuple[int, Future[_Written]] | None = None
        self._said_unscored = False

    def submit(self, step: int, state: Mapping[str, Any]) -> None:
        """Save `state` as that of `step`. Returns when it is copied; it may change from then on.

        Raises:
            AlignmentError: the state holds what cannot be saved, or the write before this one
                failed.
        """
        self.wait()
        began = time.monotonic()
        snapshot = take_snapshot(state)
        copied = time.monotonic() - began
        self._submitted = (step, self._thread.submit(self._write, step, snapshot, copied))

    def collect(self) -> None:
        """Take note of a write that has ended, without waiting for one that has not.

        Raises:
            AlignmentError: it failed.
        """
        if self._submitted is not None and self._submitted[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was submitted is in place.

        Raises:
            AlignmentError: it could not be written. Earlier checkpoints are untouched.
        """
        if self._submitted is None:
            return
        step, future = self._submitted
        # A slow disk is no hang. A second Ctrl-C ends this, and leaves the write to `__exit__`.
        while wait_for([future], timeout=1.0).not_done:
            ACTIVITY.move()
        self._submitted = None
        written = future.result()
        self._events.write(
            "checkpoint",
            f"step {step}: saved {written.path.name}",
            step=step,
            copy_seconds=written.copy_seconds,
            write_seconds=written.write_seconds,
        )
        if self._best is not None and not (written.has_scores or self._said_unscored):
            self._said_unscored = True
            self._events.write(
                "warning",
                f"checkpoint.keep_best: no step has measured {self._best.metric!r} so far, so the "
                "best checkpoint is not known; metrics.jsonl shows what is measured",
            )

    def _write(self, step: int, snapshot: Snapshot, copy_seconds: float) -> _Written:
        began = time.monotonic()
        scores = self._best.scores() if self._best is not None else {}
        path = write_checkpoint(self._directory, step, snapshot, keep=self._keep, scores=scores)
        return _Written(path, copy_seconds, time.monotonic() - began, bool(scores))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            # It is the other one that ends the run; and a full disk takes no event either.
            with suppress(AlignmentError):
                self._events.write("error", str(failed))
        finally:
            self._thread.shutdown()
