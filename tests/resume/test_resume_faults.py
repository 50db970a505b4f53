"""Runs whose checkpoints are slow, cannot be written, are damaged or of something else."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import Interrupted, assert_same_run, fail_when, settings_of
from tiny_runs import events_of, run, steps_of

from alignment.runs import checkpoint_writer
from alignment.runs.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from alignment.runs.directory import RunDirectory
from alignment.trainers.loop import Stopped
from alignment.trainers.sft import SFTTrainer
from alignment.types import AlignmentError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of six steps from start to end."""
    return run("sft", tmp_path_factory.mktemp("whole"), *settings_of("sft"))


def steps_with_checkpoints(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder / "sft" / "checkpoints")]


def test_the_next_step_runs_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    """Each write but the last waits for the step after it to be made: were the loop to wait for
    the write, neither would come. The result is that of a run whose writes are quick."""
    made = [threading.Event() for _ in range(8)]
    original = SFTTrainer.step

    def step_made(self: SFTTrainer, step: int) -> Any:
        result = original(self, step)
        made[step].set()
        return result

    def slow(directory: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        assert step == 6 or made[step + 1].wait(20)
        return write_checkpoint(directory, step, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "step", step_made)
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    result = run("sft", tmp_path, *settings_of("sft"))
    assert_same_run(result, whole)
    assert [event["step"] for event in events_of(result, "checkpoint")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_disk_that_is_full_stops_the_run_with_its_last_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory, step: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def failing(directory: Path, at: int, *args: Any, **kwargs: Any) -> Path:
        with monkeypatch.context() as patch:
            if at == step:
                patch.setattr(os, "fsync", full)
            return write_checkpoint(directory, at, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_checkpoint", failing)
        # The next step's own files may be the first to meet the full disk.
        with pytest.raises(AlignmentError, match="disk is full"):
            run("sft", tmp_path, *settings_of("sft"))
    assert steps_with_checkpoints(tmp_path) == [at for at in range(1, step) if at > step - 4]
    resumed = run("sft", tmp_path, *settings_of("sft"))
    (event,) = events_of(resumed, "resume")
    assert event["step"] == step - 1
    assert_same_run(resumed, whole)


def test_a_signal_waits_for_the_checkpoint_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    original = SFTTrainer.step

    def signalled(self: SFTTrainer, step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    def slow(*args: Any, **kwargs: Any) -> Path:
        threading.Event().wait(0.2)
        return write_checkpoint(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "step", signalled)
        patch.setattr(checkpoint_writer, "write_checkpoint", slow)
        with pytest.raises(Stopped, match="stopped after step 3 of 6, which is saved"):
            run("sft", tmp_path, *settings_of("sft", every=0))
    assert steps_with_checkpoints(tmp_path) == [3]
    assert_same_run(run("sft", tmp_path, *settings_of("sft", every=0)), whole)


def test_a_signal_does_not_promise_a_checkpoint_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SFTTrainer.step

    def signalled(self: SFTTrainer, step: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    def failing(*args: Any, **kwargs: Any) -> Path:
        raise AlignmentError("the disk is full")

    monkeypatch.setattr(SFTTrainer, "step", signalled)
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", failing)
    with pytest.raises(AlignmentError, match="the disk is full") as raised:
        run("sft", tmp_path, *settings_of("sft"))
    assert not isinstance(raised.value, Stopped)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_each_file_of_a_runs_checkpoint_is_missed(
    tmp_path: Path, whole: RunDirectory, damage: Callable[[Path], None]
) -> None:
    names = sorted(path.name for path in latest(whole).iterdir())
    assert len(names) == 3
    for name in names:
        folder = tmp_path / name
        shutil.copytree(whole.checkpoints_dir, folder)
        damage(folder / "step-000006" / name)
        warnings: list[str] = []
        assert latest_checkpoint(folder, warn=warnings.append) == folder / "step-000005"
        (warning,) = warnings
        assert f"{folder}/step-000006 is damaged and passed over: {name}" in warning


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    with monkeypatch.context() as patch:
        fail_when(patch, SFTTrainer, "step", 5)
        with pytest.raises(Interrupted):
            run("sft", tmp_path, *settings_of("sft"))
    newest = tmp_path / "sft" / "checkpoints" / "step-000004"
    flip(newest / "tensors-00001.safetensors")
    resumed = run("sft", tmp_path, *settings_of("sft"))
    (resume,) = events_of(resumed, "resume")
    assert resume["step"] == 3
    (warning,) = events_of(resumed, "warning")
    assert f"{newest} is damaged and passed over: tensors-00001" in warning["message"]
    assert_same_run(resumed, whole)


def latest(run: RunDirectory) -> Path:
    path = latest_checkpoint(run.checkpoints_dir)
    assert path is not None
    return path


def add_part(state: dict[str, Any]) -> str:
    state["trainer"]["order"]["weights"] = [1, 2]
    return r"'trainer\.order\.weights', which one of them does not have"


def drop_moment(state: dict[str, Any]) -> str:
    name = next(iter(state["model"]["optimizer"]["moments"]))
    del state["model"]["optimizer"]["moments"][name]
    return "optimizer's state in the checkpoint is of other parameters"


def other_shape(state: dict[str, Any]) -> str:
    name, weight = max(state["model"]["weights"].items(), key=lambda item: item[1].numel())
    state["model"]["weights"][name] = weight[:1]  # would be spread over all rows
    return r"shape \(1, 64\) was saved where this run has one of shape \(260, 64\)"


def other_format(state: dict[str, Any]) -> str:
    for name, weight in state["model"]["weights"].items():
        state["model"]["weights"][name] = weight.double()
    return r"cannot be restored exactly: the tensor 'model\.weights\.model.* differs"


@pytest.mark.parametrize("change", [add_part, drop_moment, other_shape, other_format])
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], str],
) -> None:
    """Whole, and of this run as far as its manifest can tell."""
    with monkeypatch.context() as patch:
        fail_when(patch, SFTTrainer, "step", 3)
        with pytest.raises(Interrupted):
            run("sft", tmp_path, *settings_of("sft"))
    folder = tmp_path / "sft" / "checkpoints"
    state = load_checkpoint(folder / "step-000002")
    said = change(state)
    save_checkpoint(folder, 2, state, keep=3)
    with pytest.raises(AlignmentError, match=said):
        run("sft", tmp_path, *settings_of("sft"))


def by_lot(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """What a reward of the user's own may do: draw from whatever generator is at hand."""
    return [
        random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in completion_ids
    ]


def test_a_reward_that_draws_from_the_global_generators_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*settings_of("grpo"), "rewards=[{type: 'test_resume_faults:by_lot'}]")
    whole = run("grpo", tmp_path / "whole", *settings, "algorithm.steps=3")
    rewards = [step["reward/mean"] for step in steps_of(whole)]
    assert len(set(rewards)) == 3
    with monkeypatch.context() as patch:
        fail_when(patch, checkpoint_writer.CheckpointWriter, "submit", 3)
        with pytest.raises(Interrupted):
            run("grpo", tmp_path, *settings, "algorithm.steps=3")
    assert_same_run(run("grpo", tmp_path, *settings, "algorithm.steps=3"), whole)
