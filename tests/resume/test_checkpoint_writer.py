"""Writing checkpoints while training goes on: what is saved, when it counts, what failures do."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.runs import checkpoint_writer
from alignment.runs.checkpoint import (
    checkpoint_problem,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    write_checkpoint,
)
from alignment.runs.checkpoint_writer import CheckpointWriter
from alignment.runs.events import EventLog, read_events
from alignment.types import AlignmentError

FULL = OSError(errno.ENOSPC, "No space left on device")


class Gate:
    """Holds every write of a checkpoint until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        self.entered.set()
        assert self.opened.wait(20)
        return write_checkpoint(*args, **kwargs)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", gate)
    yield gate
    gate.opened.set()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., CheckpointWriter]:
    def writer(keep: int = 3) -> CheckpointWriter:
        events = EventLog(tmp_path / "events.jsonl")
        return CheckpointWriter(tmp_path / "checkpoints", events, keep=keep)

    return writer


def saved(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder / "checkpoints")]


def told(folder: Path, kind: str = "checkpoint") -> list[Any]:
    events = read_events(folder / "events.jsonl")
    return [event.get("step") for event in events if event["kind"] == kind]


def fail_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full when one of these steps is written."""

    def failing(directory: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step in steps:
            raise AlignmentError(f"cannot write step {step}") from FULL
        return write_checkpoint(directory, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", failing)


def test_the_state_is_that_of_the_moment_it_was_handed_over(
    tmp_path: Path, gate: Gate, make: Callable[..., CheckpointWriter]
) -> None:
    """Weights, masters and counters move on before the first byte is written."""
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"w": weight, "view": weight.t(), "low": weight.bfloat16(), "step": 1, "list": [1]}
    with make() as writer:
        writer.submit(1, state)
        assert gate.entered.wait(20)
        with torch.no_grad():
            weight.zero_()
            state["low"].add_(5.0)
        state["list"].append(2)
        state["step"] = 2
        gate.opened.set()
    back = load_checkpoint(tmp_path / "checkpoints" / "step-000001")
    assert back["step"] == 1 and back["list"] == [1]
    assert torch.equal(back["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(back["view"], torch.arange(6.0).reshape(2, 3).t())
    assert torch.equal(back["low"], torch.arange(6.0).reshape(2, 3).bfloat16())


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, gate: Gate, make: Callable[..., CheckpointWriter]
) -> None:
    with make() as writer:
        writer.submit(1, {"step": 1})  # would wait for 20 seconds and fail
        assert gate.entered.wait(20)
        writer.collect()
        assert told(tmp_path) == saved(tmp_path) == []
        gate.opened.set()
        writer.wait()
        assert told(tmp_path) == saved(tmp_path) == [1]
        (event,) = read_events(tmp_path / "events.jsonl")
        assert event["message"] == "step 1: saved step-000001"
        assert event["copy_seconds"] >= 0.0 and event["write_seconds"] > 0.0
        writer.collect()
        writer.wait()
    assert told(tmp_path) == [1]


def test_at_most_one_is_being_written(
    tmp_path: Path, gate: Gate, make: Callable[..., CheckpointWriter]
) -> None:
    with make() as writer:
        writer.submit(1, {"step": 1})
        threading.Timer(0.1, gate.opened.set).start()
        writer.submit(2, {"step": 2})
        assert told(tmp_path)[:1] == [1] == saved(tmp_path)[:1]
    assert told(tmp_path) == saved(tmp_path) == [1, 2]


@pytest.mark.parametrize("opportunity", ["submit", "collect", "wait", "leave"])
def test_a_failed_write_is_raised_at_the_next_opportunity_and_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[..., CheckpointWriter],
    opportunity: str,
) -> None:
    fail_at(monkeypatch, 2)
    writer = make()
    writer.__enter__()
    writer.submit(1, {"step": 1})
    writer.wait()
    writer.submit(2, {"step": 2})
    acts: dict[str, Callable[[], object]] = {
        "submit": lambda: writer.submit(3, {"step": 3}),
        "collect": lambda: collect_until_done(writer),
        "wait": writer.wait,
        "leave": lambda: writer.__exit__(None, None, None),
    }
    with pytest.raises(AlignmentError, match="cannot write step 2") as raised:
        acts[opportunity]()
    assert raised.value.__cause__ is FULL
    writer.wait()
    writer.__exit__(None, None, None)
    assert saved(tmp_path) == told(tmp_path) == [1]
    assert checkpoint_problem(tmp_path / "checkpoints" / "step-000001") is None


def collect_until_done(writer: CheckpointWriter) -> None:
    for _ in range(2000):
        writer.collect()
        threading.Event().wait(0.01)


def test_whatever_ends_the_run_the_write_in_flight_is_finished(
    tmp_path: Path, gate: Gate, make: Callable[..., CheckpointWriter]
) -> None:
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), make() as writer:
        writer.submit(1, {"step": 1})
        threading.Timer(0.1, gate.opened.set).start()
        raise Interrupted
    assert saved(tmp_path) == told(tmp_path) == [1]
    assert checkpoint_problem(tmp_path / "checkpoints" / "step-000001") is None


def test_what_ended_the_run_is_not_hidden_by_a_write_that_failed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., CheckpointWriter]
) -> None:
    fail_at(monkeypatch, 1)
    with pytest.raises(ZeroDivisionError), make() as writer:
        writer.submit(1, {"step": 1})
        raise ZeroDivisionError
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["kind"], event["message"]) == ("error", "cannot write step 1")


def test_a_state_that_cannot_be_saved_is_refused_at_once(
    tmp_path: Path, make: Callable[..., CheckpointWriter]
) -> None:
    with make() as writer, pytest.raises(AlignmentError, match="'hook'"):
        writer.submit(1, {"hook": print})
    assert saved(tmp_path) == []


CHILD = """
import sys, threading, torch
from pathlib import Path
from alignment.runs import checkpoint
from alignment.runs.checkpoint_writer import CheckpointWriter
from alignment.runs.events import EventLog

folder, stop_at, armed = Path(sys.argv[1]), sys.argv[2], False
original = {name: getattr(checkpoint, name) for name in ("write_synced", "_put_in_place")}

inside = threading.Event()

def halt():
    inside.set()
    threading.Event().wait()

def write_synced(path, data):
    if armed and path.name == stop_at:
        path.write_bytes(data[: len(data) // 2])
        halt()
    original["write_synced"](path, data)

def put_in_place(temporary, path):
    if armed and stop_at == "rename":
        halt()
    original["_put_in_place"](temporary, path)

checkpoint.write_synced, checkpoint._put_in_place = write_synced, put_in_place
with CheckpointWriter(folder / "checkpoints", EventLog(folder / "events.jsonl"), keep=1) as writer:
    writer.submit(1, {"step": 1, "w": torch.full((50,), 1.0)})
    writer.wait()
    armed = True
    writer.submit(2, {"step": 2, "w": torch.full((50,), 2.0)})
    inside.wait()
    print("training goes on", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("moment", ["tensors-00001.safetensors", "rename"])
def test_a_kill_during_the_background_write_leaves_the_previous_checkpoint(
    tmp_path: Path, moment: str
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), moment], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        heard = child.stdout.readline()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert heard == "training goes on\n"
    folder = tmp_path / "checkpoints"
    assert len(list(folder.glob(".tmp-*"))) == 1  # the kill did land in the write
    latest = latest_checkpoint(folder)
    assert latest == folder / "step-000001"
    assert torch.equal(load_checkpoint(latest)["w"], torch.ones(50))
    assert told(tmp_path) == [1]
