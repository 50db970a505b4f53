"""The one loop: step, measure, record, evaluate, save. Every method goes through it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch

from alignment.activity import ACTIVITY, doing
from alignment.config.methods.base import needs_of
from alignment.modeling.finite import NonFiniteError, first_nonfinite
from alignment.rollout.sampling import row_key
from alignment.runs.checkpoint_writer import BestBy, CheckpointWriter
from alignment.runs.directory import RunDirectory
from alignment.runs.made import MadeData
from alignment.runs.metrics import MetricSums, MetricsWriter
from alignment.runs.progress import Progress, show_samples
from alignment.runs.samples import SampleRecorder
from alignment.trainers.context import StepResult, Trainer, TrainingContext
from alignment.trainers.evaluation import Evaluator
from alignment.trainers.going_on import command_to_go_on
from alignment.trainers.memory import memory_events
from alignment.trainers.state import training_state
from alignment.types import AlignmentError, Rollout

# What the progress line shows, where a step has measured it.
SHOWN = {
    "reward/mean": "reward",
    "outcome/correct": "correct",
    "sft/nll": "nll",
    "sft/token_accuracy": "token accuracy",
    "dpo/reward/accuracy": "pair accuracy",
    "reward_model/accuracy": "pair accuracy",
    "process_reward_model/accuracy": "step accuracy",
    "kl/mean": "kl",
    "made/rows": "rows",
    "completion/length": "length",
    "optim/grad_norm": "grad norm",
}


class Stopped(AlignmentError):
    """The run was asked to stop (SIGINT, SIGTERM); the step was finished and saved.

    Args:
        progress: how far it came.
        run: what to go on with.
    """

    exit_code = 0

    def __init__(self, progress: str, run: RunDirectory) -> None:
        super().__init__(
            f"stopped after {progress}, which is saved; to go on: {command_to_go_on(run)}"
        )
        self.progress = progress


@dataclass(slots=True)
class Loop:
    """Drives a trainer from step `start` to its last, writing the run directory on the way."""

    trainer: Trainer
    context: TrainingContext
    directory: RunDirectory
    evaluator: Evaluator
    start: int = 0

    def run(self, stop: Sequence[int] = ()) -> None:
        """Train to the end.

        Args:
            stop: a step is the last one where something has come into it (`stop_requests`).

        Raises:
            Stopped: a signal asked to stop; everything up to the last finished step is saved.
            Exception: what an evaluation after a step failed by, once the step is saved.
        """
        trainer, recipe = self.trainer, self.context.recipe
        total = trainer.total_steps
        # Only rank 0 writes; the others hold a writer that goes nowhere.
        is_main = self.context.distributed.is_main
        writer = MetricsWriter(self.directory.metrics if is_main else os.devnull)
        with (
            closing(writer),
            self._checkpoints() as checkpoints,
            self._progress(total) as progress,
        ):
            if self.start == 0 and recipe.eval.at_start and recipe.eval.tasks:
                self._write(writer, 0, self.evaluator.run(0))
            for step in range(self.start + 1, total + 1):
                result, metrics = self.step(step)
                self._record(step, result)
                self._keep_rows(step, result)
                failure = None
                if self._is_due(step, recipe.eval.every, total):
                    with memory_events(self.context, step):
                        measured, failure = self.evaluator.attempt(step)
                    metrics |= measured
                self._write(writer, step, metrics)
                progress.update(step, metrics)
                checkpoints.collect()
                stopping, failed = self._any_rank(stop, failure)
                due = self._is_due(step, recipe.checkpoint.every, total)
                # An evaluation that fails takes nothing of what was trained, unless that is no
                # model any more.
                broken = failed and self._is_broken(failure)
                if not broken and (stopping or failed or due):
                    writer.sync()
                    self._save(step, checkpoints)
                if failed:
                    with doing("evaluation"):
                        raise failure or AlignmentError("the evaluation failed on another rank")
                if stopping and step < total:
                    checkpoints.wait()
                    raise Stopped(f"step {step} of {total}", self.directory)

    def step(self, step: int) -> tuple[StepResult, dict[str, float]]:
        """Make one step: what it gave on this rank, and its metrics over all ranks."""
        began = time.monotonic()
        ACTIVITY.begin(step, "step")
        self._seed(step)
        with memory_events(self.context, step):
            result = self.trainer.step(step)
        return result, self._measure(result, began)

    def _is_broken(self, failure: Exception | None) -> bool:
        """Whether the model gives no numbers, or has weights that are none, on any rank."""
        found = isinstance(failure, NonFiniteError) or first_nonfinite(self.context.trained.model)
        return self._any_rank(found)[0]

    def _seed(self, step: int) -> None:
        """Make what is drawn from generators (dropout, a reward of the user's own) depend on seed,
        step and rank alone.

        So neither an evaluation nor a restart changes it, and no generator has to be saved.
        """
        key = row_key(self.context.recipe.run.seed, step, self.context.distributed.rank, 0)
        torch.manual_seed(key >> 1)
        random.seed(key)
        np.random.seed(key % 2**32)

    def _progress(self, total: int) -> Any:
        if not self.context.distributed.is_main:
            return _Quiet()
        rewards = self.context.rewards
        shown = dict(SHOWN)
        if rewards is None or not rewards.has_verifier:
            del shown["outcome/correct"]  # nothing tells right from wrong
        return Progress(total, shown, start=self.start)

    def _measure(self, result: StepResult, began: float) -> dict[str, float]:
        """The step's metrics over all ranks."""
        distributed = self.context.distributed
        result.metrics.add("time/step_seconds", time.monotonic() - began)
        result.metrics.add_max("memory/peak_gigabytes", distributed.peak_gigabytes())
        merged = MetricSums()
        for part in distributed.gather([result.metrics]):
            merged.merge(part)
        return merged.result()

    def _record(self, step: int, result: StepResult) -> None:
        """All ranks' samples in the order they were drawn, in one file."""
        if result.rollout is None:
            return
        distributed = self.context.distributed
        parts = distributed.gather([(result.rollout, result.advantages)])
        if not distributed.is_main:
            return
        rows = [
            row
            for rollout, advantages in parts
            for row in zip(rollout.items, advantages or [None] * len(rollout.items), strict=True)
        ]
        rows.sort(key=lambda row: row[0].prompt.index)
        dropped = [item for rollout, _ in parts for item in rollout.dropped]
        dropped.sort(key=lambda item: item.prompt.index)
        group_size = result.rollout.group_size
        rollout = Rollout(tuple(item for item, _ in rows), group_size, step, tuple(dropped))
        if rows or dropped:
            SampleRecorder(self.directory.rollouts_dir).write(
                rollout, advantages=[advantage for _, advantage in rows]
            )
        if step == 1:
            show_samples(rollout, 3)

    def _keep_rows(self, step: int, result: StepResult) -> None:
        """All ranks' rows of the data set that the run makes, in the order of their prompts."""
        if needs_of(self.context.recipe.algorithm).makes != "data":
            return
        rows = self.context.distributed.gather(list(result.rows))
        if self.context.distributed.is_main:
            rows.sort(key=lambda row: row[0])
            MadeData(self.directory.made_dir).write(step, [row for _, row in rows])

    def _write(self, writer: MetricsWriter, step: int, metrics: Mapping[str, float]) -> None:
        if self.context.distributed.is_main:
            writer.write(step, metrics)

    @doing("saving")
    def _save(self, step: int, checkpoints: CheckpointWriter) -> None:
        """Hand the state of this step to rank 0's writer, which writes while the next step runs."""
        state = training_state(self.trainer, self.context, step)
        if self.context.distributed.is_main:
            checkpoints.submit(step, state)

    def _checkpoints(self) -> CheckpointWriter:
        config = self.context.recipe.checkpoint
        best = None
        if config.keep_best is not None:
            best = BestBy(self.directory.metrics, config.keep_best.metric, config.keep_best.mode)
        return CheckpointWriter(
            self.directory.checkpoints_dir, self.context.events, keep=config.keep, best=best
        )

    def _is_due(self, step: int, every: int, total: int) -> bool:
        return step == total or (every > 0 and step % every == 0)

    def _any_rank(self, *holds: object) -> list[bool]:
        """Whether each of these is true on any rank; what is empty or None is not."""
        return [most > 0 for most in self.context.distributed.max([float(bool(x)) for x in holds])]


@contextmanager
def stop_requests(received: list[int]) -> Iterator[None]:
    """Put a first SIGINT or SIGTERM into `received`; a second one acts as usual."""
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    try:
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

        def note(number: int, _: FrameType | None) -> None:
            received.append(number)
            signal.signal(number, previous[number])

        for number in signals:
            signal.signal(number, note)
    except ValueError:  # not the main thread: signals stay with whoever has it
        yield
        return
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, previous[number])


class _Quiet:
    """Progress on ranks that show none."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass
