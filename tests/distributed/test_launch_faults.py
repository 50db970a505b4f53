"""One run of two processes, started by one command, that meets a hang, a death and a stop.

Each start goes on where the one before it was broken off; in the end it is the run that met none.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import rollouts_of, steps_of, weights_of

from alignment.cli.launch import plan_launch
from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.runs.checkpoint import list_checkpoints, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.trainers.run import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
SECONDS = 200  # a hang is a failure
STARTS = ("hang", "death", "stop", "none")
SETTINGS = (
    "run.name=run",
    "data={type: arithmetic, operation: add, operands: 2, low: 1, high: 9, held_out: 8}",
    "algorithm.steps=6",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "rollout.max_new_tokens=4",
    "rewards=[{type: 'faulty_rewards:even_tokens'}]",
    "optim={lr: 3e-3, schedule: constant, eps: 1e-3}",
    "checkpoint.every=1",
    "eval={}",
    "expect=[]",
    "limits.hang_minutes=0.07",
)


@dataclass(frozen=True)
class Start:
    """How one start of the command ended, and what the run's folder held then."""

    code: int
    said: str
    events: dict[int, list[dict[str, Any]]]
    files: set[str]
    steps: int


def start(folder: Path, fault: str) -> Start:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault, "PYTHONPATH": str(HERE)}
    options = ["--accelerate", "ddp", "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "alignment", "train", "tiny/grpo", *options, *SETTINGS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    run = RunDirectory.open(folder / "runs" / "run")
    logs = {0: run.events, 1: run.path / "events-rank1.jsonl"}
    events = {
        rank: [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        for rank, log in logs.items()
    }
    saved = list_checkpoints(run.checkpoints_dir)
    files = {path.name for path in run.path.iterdir()}
    return Start(done.returncode, done.stderr, events, files, saved[-1][0])


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Start]]:
    folder = tmp_path_factory.mktemp("launched")
    return folder, {fault: start(folder, fault) for fault in STARTS}


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same run in one process, from start to end."""
    folder = tmp_path_factory.mktemp("untroubled")
    recipe = load_recipe("tiny/grpo", [*SETTINGS, f"run.dir={folder}"])
    assert isinstance(recipe, Recipe)
    return train(recipe)


def test_a_hung_grader_is_named_and_the_run_ends(starts: tuple[Path, dict[str, Start]]) -> None:
    hung = starts[1]["hang"]
    assert hung.code == 1
    assert "Traceback" not in hung.said
    (said,) = [line for line in hung.said.splitlines() if line.startswith("align: ")]
    place = "grading of step 2 (reward 'faulty_rewards:even_tokens' on 8 samples of prompts 5 to 7)"
    assert f"rank 1 hangs in {place}" in said or f"rank 1, which is in {place}" in said
    (event,) = [event for event in hung.events[1] if event["kind"] == "hang"]
    assert (event["rank"], event["phase"], event["step"]) == (1, "grading", 2)
    assert event["seconds"] >= 4.2
    assert "hang-rank1.txt" in hung.files


def test_the_stacks_of_a_hung_rank_show_where(starts: tuple[Path, dict[str, Start]]) -> None:
    folder, _ = starts
    stacks = (folder / "runs" / "run" / "hang-rank1.txt").read_text(encoding="utf-8")
    assert "faulty_rewards.py" in stacks
    assert "in _fault" in stacks


def test_a_dead_rank_is_named(starts: tuple[Path, dict[str, Start]]) -> None:
    dead = starts[1]["death"]
    assert dead.code == 1
    assert "Traceback" not in dead.said
    assert "align: rank 1 was killed by signal 9" in dead.said
    named = [event for event in dead.events[0] if event.get("signal") == 9]
    assert [(event["kind"], event["ranks"]) for event in named] == [("error", [1])]


def test_the_rank_that_is_left_names_the_dead_one(starts: tuple[Path, dict[str, Start]]) -> None:
    errors = [e["message"] for e in starts[1]["death"].events[0] if e["kind"] == "error"]
    (lost,) = [message for message in errors if "which is dead" in message]
    assert lost.startswith("rank 0, in rollout of step 3, lost the connection to rank 1")


def test_a_stop_finishes_the_step_and_says_how_to_go_on(
    starts: tuple[Path, dict[str, Start]],
) -> None:
    before, stopped = starts[1]["death"], starts[1]["stop"]
    assert stopped.code == 0
    assert stopped.steps == before.steps + 2  # the step of the second call is finished
    recipe = Path("runs") / "run" / "recipe.yaml"
    assert stopped.said.splitlines()[-1] == (
        f"align: stopped after step {stopped.steps} of 6, which is saved; to go on: align train "
        f"{recipe} --accelerate ddp --processes 2"
    )
    assert ".heartbeat" not in stopped.files


def test_no_finished_step_is_lost(starts: tuple[Path, dict[str, Start]]) -> None:
    assert [starts[1][fault].steps for fault in STARTS] == [1, 2, 4, 6]


def test_after_all_of_it_the_run_is_the_one_that_met_none(
    starts: tuple[Path, dict[str, Start]], untroubled: RunDirectory
) -> None:
    folder, done = starts
    assert done["none"].code == 0, done["none"].said
    run = RunDirectory.open(folder / "runs" / "run")
    for ours, theirs in zip(steps_of(run), steps_of(untroubled), strict=True):
        for name, value in theirs.items():
            assert math.isclose(ours[name], value, rel_tol=1e-6, abs_tol=1e-6), name
    for name, weight in weights_of(untroubled).items():
        torch.testing.assert_close(weights_of(run)[name], weight, rtol=0.0, atol=1e-6)
    for ours, theirs in zip(rollouts_of(run), rollouts_of(untroubled), strict=True):
        ids = [[row["completion_ids"] for row in rows] for rows in (ours, theirs)]
        assert ids[0] == ids[1]


def test_the_reward_of_each_rank_goes_on_with_what_it_kept(
    starts: tuple[Path, dict[str, Start]],
) -> None:
    run = RunDirectory.open(starts[0] / "runs" / "run")
    _, last = list_checkpoints(run.checkpoints_dir)[-1]
    kept = [state["faulty_rewards:even_tokens"] for state in load_checkpoint(last)["rewards"]]
    assert [state["batches"] for state in kept] == [6, 6]
    recorded = [sum(row["completion_ids"]) for rows in rollouts_of(run) for row in rows]
    assert sum(state["ids"] for state in kept) == sum(recorded)
    assert kept[0] != kept[1]


def test_the_command_stands_in_the_run(starts: tuple[Path, dict[str, Start]]) -> None:
    folder, _ = starts
    info = RunDirectory.open(folder / "runs" / "run").read_info()
    assert info["command"][:3] == ["align", "train", "tiny/grpo"]
    assert info["command"][-4:] == plan_launch("ddp", 2).options.split()
