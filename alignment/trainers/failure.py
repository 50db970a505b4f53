"""What a run leaves behind where it fails: an event that says what and where, and how to go on.

Nothing of the step in which it failed is saved: its state is consistent only between steps. The
last checkpoint stands as it is. An evaluation comes after its step, which is saved where it fails.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from alignment.activity import ACTIVITY
from alignment.modeling.memory import OutOfMemory, is_out_of_memory
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog, read_events
from alignment.runs.outputs import FINISHED
from alignment.trainers.going_on import command_to_go_on
from alignment.types import AlignmentError, UserInputError


@contextmanager
def recorded_failure(run: RunDirectory, events: EventLog) -> Iterator[None]:
    """Write an `error` event for what ends the run inside, and note on the error how to go on.

    Errors pass through as they are, so that a plug-in's keeps its traceback; an allocator's own
    becomes one with a remedy.

    Raises:
        OutOfMemory: memory ran out where nothing smaller is tried, such as in the optimizer.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if getattr(error, "exit_code", 1) == 0:  # it was asked to stop, and is saved
            raise
        if is_out_of_memory(error):
            told = OutOfMemory(_no_memory(error))
            _record(run, events, told)
            raise told from error
        _record(run, events, error)
        raise


def _record(run: RunDirectory, events: EventLog, error: BaseException) -> None:
    expected = isinstance(error, AlignmentError | KeyboardInterrupt)
    message = str(error) if isinstance(error, AlignmentError) else _described(error)
    fields = {
        "step": ACTIVITY.step,
        "phase": ACTIVITY.phase,
        "detail": ACTIVITY.detail,
        "type": type(error).__name__,
        "traceback": None if expected else traceback.format_exception(error),
    }
    kinds = [kind for kind in (getattr(error, "event", None), "error") if kind]
    with suppress(AlignmentError):  # a full disk may be what has failed
        said = _events_of_this_start(events)
        for kind in kinds:
            if not any((event["kind"], event["message"]) == (kind, message) for event in said):
                events.write(kind, message, logged=False, **fields)
    advice = _how_to_go_on(run, error)
    if advice:
        error.add_note(advice)


def _events_of_this_start(events: EventLog) -> list[dict[str, Any]]:
    """What has happened since the run was started or resumed last."""
    said = read_events(events.path)
    starts = [place for place, event in enumerate(said) if event["kind"] == "start"]
    return said[starts[-1] :] if starts else said


def _how_to_go_on(run: RunDirectory, error: BaseException) -> str:
    """What is saved, and the command; "" where there is nothing to go on with."""
    if (run.path / FINISHED).is_file():
        return ""
    command = command_to_go_on(run)
    saved = list_checkpoints(run.checkpoints_dir)
    if saved:
        return f"{saved[-1][1].name} is the last checkpoint; to go on from there: {command}"
    if isinstance(error, UserInputError):  # the run could not begin
        return ""
    return f"no checkpoint was saved yet; to begin again from the start: {command}"


def _described(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _no_memory(error: BaseException) -> str:
    detail = f" ({ACTIVITY.detail})" if ACTIVITY.detail else ""
    return (
        f"step {ACTIVITY.step}, {ACTIVITY.phase}{detail}: out of memory "
        f"({_described(error).splitlines()[0][:200]}). Lower optim.micro_batch_tokens or "
        "rollout.max_rows, train an adapter (model.lora), take a smaller model, or leave more "
        "memory to the run"
    )
