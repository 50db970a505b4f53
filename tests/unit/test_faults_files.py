"""Data that changes, files that are damaged, disks that are full: named, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from fault_runs import NO_TASKS, SAVED, PluginError, assert_resumes, failing_step, trained
from tiny_runs import events_of, metrics_of, weights_of

from alignment.data.arithmetic import arithmetic
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.jsonl import JsonLinesFile
from alignment.runs.made import MadeData
from alignment.runs.metrics import read_metrics
from alignment.trainers.sft import SFTTrainer
from alignment.types import AlignmentError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nothing happens to."""
    return tiny_runs.run("sft", tmp_path_factory.mktemp("whole"), *SAVED)


# -- data -------------------------------------------------------------------------------------


def data_file(folder: Path, rows: int = 12) -> Path:
    path = folder / "data.jsonl"
    made = arithmetic(operation="add", operands=2, low=1, high=4)[:rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


@pytest.mark.parametrize("change", ["a row", "the order", "fewer rows"])
def test_data_that_changed_since_the_start_is_refused(tmp_path: Path, change: str) -> None:
    path = data_file(tmp_path)
    original = path.read_text()
    settings = (*SAVED, f"data={{type: file, path: '{path}'}}")
    with failing_step(3, PluginError()):
        assert trained("sft", tmp_path, *settings).exit_code == 1
    lines = original.splitlines(keepends=True)
    changed = {
        "a row": [lines[0].replace("1", "2"), *lines[1:]],
        "the order": [*lines[1:], lines[0]],
        "fewer rows": lines[:-1],
    }
    path.write_text("".join(changed[change]))
    result = trained("sft", tmp_path, *settings)
    assert result.exit_code == 2
    assert f"the rows of data, {path}, " in result.output
    assert "Put it back as it was" in result.output
    assert metrics_of(RunDirectory.open(tmp_path / "sft"))  # the run is still there
    path.write_text(original)
    assert trained("sft", tmp_path, *settings).exit_code == 0


def test_data_damaged_while_the_run_goes_on_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read once, at the start; the run of this process has them in memory."""
    path = data_file(tmp_path)
    settings = (*SAVED, f"data={{type: file, path: '{path}'}}")
    expected = weights_of(tiny_runs.run("sft", tmp_path / "whole", *settings))
    original = SFTTrainer.step

    def step(self: SFTTrainer, step: int) -> Any:
        if step == 2:
            path.write_bytes(b"\0" * 100)
        return original(self, step)

    monkeypatch.setattr(SFTTrainer, "step", step)
    directory = tiny_runs.run("sft", tmp_path / "damaged", *settings)
    for name, weight in weights_of(directory).items():
        assert torch.equal(weight, expected[name])


def test_weights_that_changed_since_the_start_are_refused(tmp_path: Path) -> None:
    base = tiny_runs.run("sft", tmp_path / "base", "algorithm.steps=1", NO_TASKS).model_dir
    other = tiny_runs.run("sft", tmp_path / "other", "algorithm.steps=2", NO_TASKS).model_dir
    model = tmp_path / "model"
    model.symlink_to(base)
    settings = (*SAVED, f"model.path={model}")
    with failing_step(3, PluginError()):
        assert trained("sft", tmp_path, *settings).exit_code == 1
    model.unlink()
    model.symlink_to(other)
    result = trained("sft", tmp_path, *settings)
    assert result.exit_code == 2
    assert "has changed since" in result.output and str(model) in result.output


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-4], "its last line has no end"),
        (lambda content: content.replace(b'"a"', b'"a'), "damaged"),
        (lambda content: b"\xff" + content[1:], "utf-8"),
    ],
    ids=["cut off", "changed", "no text"],
)
def test_made_rows_that_were_damaged_are_named(tmp_path: Path, damage: Any, said: str) -> None:
    made = MadeData(tmp_path / "made")
    for step in (1, 2):
        made.write(step, [{"a": "x\u2028y"}, {"a": step}])
    assert made.join(tmp_path / "data.jsonl") == 4
    path = tmp_path / "made" / "step-000002.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AlignmentError, match=r"step-000002\.jsonl is damaged") as caught:
        made.join(tmp_path / "data.jsonl")
    assert said in str(caught.value)


def test_a_resume_needs_no_rollout_of_earlier_steps(tmp_path: Path) -> None:
    """A truncated one is only ever read by what reads rollouts, which names it."""
    settings = ("algorithm.steps=3", "checkpoint.every=1", NO_TASKS)
    tiny_runs.run("grpo", tmp_path, "algorithm.steps=3", "checkpoint.every=1", NO_TASKS)
    directory = RunDirectory.open(tmp_path / "grpo")
    (directory.path / "finished.json").unlink()
    for path in directory.rollouts_dir.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    result = trained("grpo", tmp_path, *settings)
    assert result.exit_code == 0, result.output
    assert "Could not be read" in directory.report.read_text()


# -- disks ------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow_stops_the_run_with_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    """The operating system refuses the bytes of the second checkpoint."""
    original = SFTTrainer.step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self: SFTTrainer, step: int) -> Any:
        if step == 3:
            while not list_checkpoints(tmp_path / "sft" / "checkpoints"):
                time.sleep(0.01)  # the first one is written meanwhile
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "step", step)
        try:
            result = trained("sft", tmp_path, *SAVED)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "cannot write the checkpoint" in result.output
    assert "larger than this file system or limit allows" in result.output
    assert "step-000002 is the last checkpoint; to go on from there" in result.output
    assert len(events_of(RunDirectory.open(tmp_path / "sft"), "error")) == 1
    assert_resumes(tmp_path, whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_any_more_is_named_though_no_event_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory, number: int
) -> None:
    write = JsonLinesFile._write_all
    full: list[bool] = []

    def nothing(self: JsonLinesFile, line: bytes) -> None:
        if full or b'"step": 4' in line:
            full.append(True)
            raise OSError(number, os.strerror(number))
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLinesFile, "_write_all", nothing)
        result = trained("sft", tmp_path, *SAVED)
    assert result.exit_code == 1
    assert "cannot write to" in result.output and "metrics.jsonl" in result.output
    assert "step-000002 is the last checkpoint; to go on from there" in result.output
    assert [record["step"] for record in read_metrics(tmp_path / "sft" / "metrics.jsonl")][-1] == 3
    assert not events_of(RunDirectory.open(tmp_path / "sft"), "error")
    assert_resumes(tmp_path, whole)
