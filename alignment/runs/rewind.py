"""Taking a run back to the step it resumes from, so that every step is recorded exactly once."""

from __future__ import annotations

import re

from alignment.runs.checkpoint import clear_up, discard_checkpoints_after
from alignment.runs.directory import RunDirectory
from alignment.runs.files import readable_errors
from alignment.runs.made import MadeData
from alignment.runs.metrics import MetricsWriter
from alignment.runs.samples import SampleRecorder

_EVALUATION = re.compile(r".+-step-(?P<step>[0-9]+)\.jsonl?")


def rewind(run: RunDirectory, step: int) -> None:
    """Drop metrics, samples, made rows, evaluations and checkpoints of the steps after `step` (0:
    all of them), and what killed writes left.

    Events stay: they tell what happened, the steps that are run again included. Call it before
    a `MetricsWriter` of the run is opened.

    Raises:
        AlignmentError: something cannot be removed, with the reason.
    """
    clear_up(run.checkpoints_dir)
    discard_checkpoints_after(run.checkpoints_dir, step)
    SampleRecorder(run.rollouts_dir).truncate_after(step)
    MadeData(run.made_dir).truncate_after(step)
    _drop_evaluations(run, step)
    metrics = MetricsWriter(run.metrics)
    metrics.truncate_after(step)
    metrics.close()


def _drop_evaluations(run: RunDirectory, step: int) -> None:
    for path in sorted(run.evals_dir.glob("*")):  # a summary before its records
        name = _EVALUATION.fullmatch(path.name)
        if name is not None and int(name["step"]) > step:
            with readable_errors("remove the evaluation", path):
                path.unlink()
