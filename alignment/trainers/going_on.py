"""Going on with a run: the command that does it, and the checkpoints it may be told to take."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from alignment.runs.directory import RunDirectory
from alignment.runs.launched import launch_options
from alignment.runs.outputs import FINISHED
from alignment.trainers.recorded import MARK, OPTION
from alignment.types import AlignmentError, UserInputError

_NO_FOLDERS = ("auto", "never")


def command_to_go_on(run: RunDirectory) -> str:
    """`align train RECIPE` with the options that the run needs to be gone on with.

    The recipe is the pipeline's where the run is a stage of one. A run that trains on another
    one's rollouts is named with them, and one of several processes with as many.
    """
    pipeline = RunDirectory(run.path.parent.parent)
    is_stage = run.path.parent.name == "stages"
    if is_stage and pipeline.recipe.is_file() and pipeline.info.is_file():
        run = pipeline
    source = None
    with suppress(AlignmentError):  # a failed run tells the rest all the same
        source = run.read_info().get(MARK)
    rollouts = "" if source is None else f" {OPTION} {shlex.quote(source)}"
    return f"align train {shlex.quote(str(run.recipe))}{rollouts}{launch_options()}"


def names_checkpoint(resume: str) -> bool:
    """Whether `--resume` is given a folder, and not `auto` or `never`."""
    return resume not in _NO_FOLDERS


def check_named_checkpoint(run: Path, resume: str) -> None:
    """Refuse a checkpoint folder that a run cannot go on from.

    Args:
        run: its folder, whether it is there or not.
        resume: what `--resume` was given; `auto` and `never` pass.

    Raises:
        UserInputError: there is no such run yet, it is finished, or the folder is not among its
            checkpoints.
    """
    if not names_checkpoint(resume):
        return
    own = RunDirectory(run).checkpoints_dir
    if not run.exists():
        raise UserInputError(
            f"--resume {resume}: there is no run {run} yet that could go on from it; give the "
            "recipe and the run.name of the run that saved the checkpoint, or leave out --resume "
            "to begin a new run"
        )
    if Path(resume).resolve().parent != own.resolve():
        raise UserInputError(
            f"--resume {resume} is no checkpoint of the run {run}; give a step-NNNNNN folder in "
            f"{own}, or choose the recipe and the run.name of the run that saved it"
        )
    if (run / FINISHED).is_file():
        raise UserInputError(
            f"--resume {resume}: the run {run} is finished; leave out --resume, or delete "
            f"{run / FINISHED} to train again from that checkpoint"
        )
