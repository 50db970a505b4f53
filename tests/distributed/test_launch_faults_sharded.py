"""Runs of two processes that share out what is trained meet a stopped rank, the command's death, a
hang, a rank's death and a stop; in the end each is, bit for bit, the run that met none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sharded_faults_worker
from sharded_faults_worker import IMPATIENT, SETTINGS, STARTS, STRATEGIES
from test_two_processes import HERE

from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.events import read_events

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

cases = pytest.importorskip("cases")  # of `tests/faults`, whose path the worker adds
comparing = pytest.importorskip("comparing")

SECONDS = 300  # a hang is a failure
BY_COMMAND = {"fsdp2": ("standstill", *IMPATIENT), "zero3": ("launcher's death",)}
"""Strategy to what a run meets that the command starts, and its settings: the faults in which the
launcher has a part, whatever the strategy."""
GRADING = "grading of step 4 (reward 'faulty_rewards:even_tokens' on 8 samples of prompts 13 to 15)"


@dataclass(frozen=True)
class Ended:
    """How a start by the command ended, when, and how many steps were saved then."""

    code: int
    said: str
    time: float
    steps: int


@dataclass(frozen=True)
class Commanded:
    """A run that was started by the command, met a fault, and was started again."""

    run: RunDirectory
    broken: Ended
    gone_on: Ended


def started(folder: Path, strategy: str, *, meets: bool) -> subprocess.Popen[str]:
    fault, *settings = *BY_COMMAND[strategy], "checkpoint.every=1"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    environment["FAULT"] = fault if meets else ""
    options = ["--accelerate", strategy, "--processes", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "alignment", "train", "tiny/grpo", *SETTINGS, *settings, *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], run: RunDirectory) -> Ended:
    """What the command said comes to its end only with the last of its ranks."""
    try:
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    steps = [step for step, _ in list_checkpoints(run.checkpoints_dir)]
    return Ended(process.returncode, said, time.time(), max(steps, default=0))


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Commanded]:
    folders = {strategy: tmp_path_factory.mktemp(strategy) for strategy in BY_COMMAND}
    runs = {strategy: RunDirectory(folders[strategy] / "runs" / "run") for strategy in BY_COMMAND}

    def start_all(*, meets: bool) -> dict[str, Ended]:
        processes = {name: started(folders[name], name, meets=meets) for name in BY_COMMAND}
        return {name: ended(process, runs[name]) for name, process in processes.items()}

    broken, gone_on = start_all(meets=True), start_all(meets=False)
    return {name: Commanded(runs[name], broken[name], gone_on[name]) for name in BY_COMMAND}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The worker's folder, and how each start ended."""
    folder = tmp_path_factory.mktemp("forked")
    command = [sys.executable, sharded_faults_worker.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((folder / "starts.json").read_text("utf-8"))
    return folder, found


def met_none(folder: Path, strategy: str) -> RunDirectory:
    return RunDirectory.open(folder / "whole" / strategy / "runs" / "run")


def assert_the_same(run: RunDirectory, whole: RunDirectory) -> None:
    """Bit for bit: weights, optimizer, counters of all ranks, metrics, samples."""
    assert comparing.differences(run, whole, holds={"model", "rollouts"}, last_step=6) == []


def hangs_of(log: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(log) if event["kind"] == "hang"]


# -- started by the command -------------------------------------------------------------------


def test_a_stopped_rank_is_named(commanded: dict[str, Commanded]) -> None:
    met = commanded["fsdp2"]
    assert met.broken.code == 1
    assert "Traceback" not in met.broken.said
    (said,) = [line for line in met.broken.said.splitlines() if line.startswith("align: ")]
    place = "update of step 2"
    assert said.startswith(f"align: rank 0 waited in {place} for ")
    assert f" for rank 1, which is in {place} since " in said
    assert " and has given no sign of life since " in said
    assert " is stopped, or in a call that lets no other thread run; " in said
    (event,) = hangs_of(met.run.events)
    assert (event["rank"], event["ranks"], event["step"]) == (0, [1], 2)
    assert event["seconds"] >= 4.2


def test_a_stopped_rank_does_not_keep_the_command_from_ending(
    commanded: dict[str, Commanded],
) -> None:
    met = commanded["fsdp2"]
    (event,) = hangs_of(met.run.events)
    # torch would kill it after half a minute.
    assert met.broken.time - datetime.fromisoformat(event["time"]).timestamp() < 20.0


def test_the_ranks_do_not_outlive_the_command(commanded: dict[str, Commanded]) -> None:
    met = commanded["zero3"]
    assert met.broken.code == -signal.SIGKILL
    logs = (met.run.events, met.run.path / "events-rank1.jsonl")
    said = [e["message"] for log in logs for e in read_events(log) if e["kind"] == "error"]
    assert said[0] == "the launcher of rank 0 is gone; it ends too"
    # Rank 0 may have been the first to see it.
    assert said[1].endswith(
        said[0] if "lost the connection" in said[1] else "rank 1 is gone; it ends too"
    )


@pytest.mark.parametrize("strategy", BY_COMMAND)
def test_i45_the_same_command_goes_on_with_sharded_weights(
    commanded: dict[str, Commanded], forked: tuple[Path, Any], strategy: str
) -> None:
    met = commanded[strategy]
    assert met.broken.steps == 1
    assert met.gone_on.code == 0, met.gone_on.said
    assert_the_same(met.run, met_none(forked[0], strategy))


# -- started as the command starts them -------------------------------------------------------


@pytest.mark.parametrize("strategy", [name for name in STARTS if "hang" in STARTS[name]])
def test_a_hung_grader_is_named_with_sharded_weights(
    forked: tuple[Path, dict[str, dict[str, Any]]], strategy: str
) -> None:
    hung = forked[1][strategy]["hang"]
    assert hung["codes"] == [1, 1]
    assert "Traceback" not in hung["said"]
    assert f"align: rank 1 hangs in {GRADING}" in hung["said"]
    (waited,) = [line for line in hung["said"].splitlines() if line.startswith("align: rank 0")]
    assert f"rank 1, which is in {GRADING}" in waited or f"ended in {GRADING}" in waited


@pytest.mark.parametrize("strategy", STARTS)
def test_a_rank_that_dies_in_a_backward_pass_is_named(
    forked: tuple[Path, dict[str, dict[str, Any]]], strategy: str
) -> None:
    dead = forked[1][strategy]["death in backward"]
    assert dead["codes"] == [1, -signal.SIGKILL]
    assert "Traceback" not in dead["said"]
    place = f"update of step {5 if 'hang' in STARTS[strategy] else 4}"
    (said,) = [line for line in dead["said"].splitlines() if line.startswith("align: ")]
    assert said.startswith(f"align: rank 0, in {place}, lost the connection to rank 1, which is de")
    assert f" in {place} (process " in said


@pytest.mark.parametrize("strategy", STARTS)
def test_a_stop_saves_sharded_weights_and_says_how_to_go_on(
    forked: tuple[Path, dict[str, dict[str, Any]]], strategy: str
) -> None:
    stopped = forked[1][strategy]["stop"]
    assert (stopped["codes"], stopped["steps"]) == ([0, 0], 2)  # it was not due
    lines = [line for line in stopped["said"].splitlines() if line.startswith("align: ")]
    assert lines == 2 * [  # no launcher speaks for them
        "align: stopped after step 2 of 6, which is saved; to go on: align train "
        "runs/run/recipe.yaml"
    ]


@pytest.mark.parametrize("strategy", STARTS)
def test_i45_after_all_of_it_the_sharded_run_is_the_one_that_met_none(
    forked: tuple[Path, dict[str, dict[str, Any]]], strategy: str
) -> None:
    folder, starts = forked
    # Every third one is saved, and the one that a stop finished.
    saved = [starts[strategy][fault]["steps"] for fault in STARTS[strategy]]
    assert saved == {4: [2, 3, 3, 6], 3: [2, 3, 6]}[len(saved)]
    whole = met_none(folder, strategy)
    assert (whole.path / "events-rank1.jsonl").is_file()  # there was a second rank
    assert_the_same(RunDirectory.open(folder / "met" / strategy / "runs" / "run"), whole)


def test_what_make_faults_sets_is_what_the_command_sets() -> None:
    for strategy, variables in cases.STRATEGIES.items():
        assert variables == STRATEGIES[strategy]
