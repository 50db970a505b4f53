"""The watch before the first step: a run that hangs while it loads says where, and ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import in_child
from tiny_runs import events_of, recipe_of

from alignment.activity import ACTIVITY
from alignment.config import dump_recipe
from alignment.runs import watch as watch_module
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.watch import LOADED_BYTES, Watch, bytes_moved
from alignment.trainers.run import train

SETTINGS = ("data={type: 'test_watch_phases:never'}", "limits.hang_minutes=0.01")


def never() -> Sequence[dict[str, Any]]:
    """A source that gives nothing, such as a mount that has gone."""
    time.sleep(60)
    return []


def test_a_new_run_that_hangs_while_loading_says_where_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = recipe_of("sft", tmp_path / "runs", *SETTINGS)
    code, said = in_child(lambda: train(recipe), tmp_path / "log")
    assert code == 1
    assert "align: the run hangs in loading (the data) since" in said
    assert "(limits.hang_minutes is 0.01); the stacks of its threads are above" in said
    assert said.index("in never") < said.index("align: the run hangs")
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_that_hangs_while_loading_has_it_in_its_events(tmp_path: Path) -> None:
    recipe = recipe_of("sft", tmp_path, *SETTINGS)
    run = RunDirectory.create(tmp_path, "sft", recipe_yaml=dump_recipe(recipe), info={})
    code, said = in_child(lambda: train(recipe), tmp_path / "log")
    stacks = run.path / "hang-rank0.txt"
    assert code == 1 and f"the stacks of its threads are in {stacks}" in said.replace("\n", "")
    assert "in never" in stacks.read_text()
    (event,) = events_of(run, "hang")
    assert (event["phase"], event["detail"], event["step"]) == ("loading", "the data", 0)
    assert 0.6 <= event["seconds"] < 30


@pytest.mark.parametrize(("phase", "moves"), [("loading", True), ("grading", False)])
def test_bytes_are_movement_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, moves: bool
) -> None:
    """A download is no hang, and a reward that polls a file may be one."""
    total = 10 * LOADED_BYTES
    monkeypatch.setattr(watch_module, "bytes_moved", lambda: total)
    watch = Watch(None, EventLog(tmp_path / "e"), rank=0, world_size=1, hang_minutes=1.0)
    ACTIVITY.begin(0, phase)

    def moved(by: int) -> bool:
        nonlocal total
        total += by
        ACTIVITY.moved = 0.0
        watch._note_loading()
        return ACTIVITY.moved > 0.0

    first = moved(0)
    assert (first, moved(LOADED_BYTES - 1), moved(1), moved(0)) == (moves, False, moves, False)


def test_bytes_written_are_counted() -> None:
    before = bytes_moved()
    if before == 0:
        pytest.skip("this system does not count them")
    with open("/dev/null", "wb") as nowhere:
        nowhere.write(bytes(2 * LOADED_BYTES))
    assert 2 * LOADED_BYTES <= bytes_moved() - before < 3 * LOADED_BYTES


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "none" / "events.jsonl")
    with Watch(None, log, rank=1, world_size=2, hang_minutes=1.0):
        ACTIVITY.move()
    with pytest.raises(ValueError), Watch(None, log, rank=1, world_size=2, hang_minutes=1.0):
        raise ValueError
    assert not list(tmp_path.iterdir())
