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
from saved_state import save_checkpoint
from test_resume import Interrupted, assert_same_run, fail_when, settings_of
from tiny_runs import events_of, run, steps_of

from alignment.runs import checkpoint_writer
from alignment.runs.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
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


@pytest.mark.parametrize(
    ("step", "number", "said"),
    [
        (1, errno.ENOSPC, "disk is full"),
        (4, errno.ENOSPC, "disk is full"),
        (6, errno.ENOSPC, "disk is full"),
        (4, errno.EROFS, "read-only"),
        (4, errno.EACCES, "permission denied"),
    ],
)
def test_a_disk_that_is_full_or_locked_stops_the_run_with_its_last_checkpoint_intact(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: RunDirectory,
    step: int,
    number: int,
    said: str,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    def failing(directory: Path, at: int, *args: Any, **kwargs: Any) -> Path:
        with monkeypatch.context() as patch:
            if at == step:
                patch.setattr(os, "fsync", full)
            return write_checkpoint(directory, at, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_checkpoint", failing)
        # The next step's own files may be the first to meet the full disk.
        with pytest.raises(AlignmentError, match=said):
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


OTHER_PARAMETERS = "optimizer's state in the checkpoint is of other parameters"


def moments_of_one(state: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, Any] = next(iter(state["model"]["optimizer"]["moments"].values()))
    return moments


def drop_moments_of_one(state: dict[str, Any]) -> str:
    name = next(iter(state["model"]["optimizer"]["moments"]))
    del state["model"]["optimizer"]["moments"][name]
    return OTHER_PARAMETERS


def drop_all_moments(state: dict[str, Any]) -> str:
    state["model"]["optimizer"]["moments"] = {}
    return "holds no moments of the optimizer, and counts 2 updates"


def moments_before_any_update(state: dict[str, Any]) -> str:
    state["trainer"]["update"]["policy_version"] = 0
    return "holds moments of the optimizer, and counts 0 updates"


def unknown_moment(state: dict[str, Any]) -> str:
    moments = moments_of_one(state)
    moments["max_exp_avg_sq"] = moments["exp_avg_sq"].clone()
    return OTHER_PARAMETERS


def drop_moment(state: dict[str, Any]) -> str:
    del moments_of_one(state)["exp_avg"]
    return OTHER_PARAMETERS


def short_moment(state: dict[str, Any]) -> str:
    moments = moments_of_one(state)
    moments["exp_avg"] = moments["exp_avg"].flatten()[:1]  # the fused step would read on
    return OTHER_PARAMETERS


def moment_in_another_format(state: dict[str, Any]) -> str:
    moments = moments_of_one(state)
    moments["exp_avg_sq"] = moments["exp_avg_sq"].to(torch.bfloat16)
    return OTHER_PARAMETERS


def long_step(state: dict[str, Any]) -> str:
    moments = moments_of_one(state)
    moments["step"] = moments["step"].expand(2).clone()
    return OTHER_PARAMETERS


def drop_counter(state: dict[str, Any]) -> str:
    del state["trainer"]["update"]["policy_version"]
    return r"the checkpoint of step 2 cannot be restored: KeyError 'policy_version'; resume with"


def no_part(state: dict[str, Any]) -> str:
    state["trainer"]["order"] = None
    return r"the checkpoint of step 2 cannot be restored: TypeError .*; resume with"


def other_shape(state: dict[str, Any]) -> str:
    name, weight = max(state["model"]["weights"].items(), key=lambda item: item[1].numel())
    state["model"]["weights"][name] = weight[:1]  # would be spread over all rows
    return r"shape \(1, 64\) was saved where this run has one of shape \(260, 64\)"


def other_format(state: dict[str, Any]) -> str:
    for name, weight in state["model"]["weights"].items():
        state["model"]["weights"][name] = weight.double()
    return r"cannot be restored exactly: the tensor 'model\.weights\.model.* differs"


CHANGES = (
    add_part,
    drop_moments_of_one,
    drop_all_moments,
    moments_before_any_update,
    unknown_moment,
    drop_moment,
    short_moment,
    moment_in_another_format,
    long_step,
    drop_counter,
    no_part,
    other_shape,
    other_format,
)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where a run was cut short, and its checkpoint as it was saved."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        fail_when(patch, SFTTrainer, "step", 3)
        with pytest.raises(Interrupted):
            run("sft", folder, *settings_of("sft"))
    saved = shutil.move(folder / "sft" / "checkpoints" / "step-000002", folder / "saved")
    return folder, Path(saved)


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_something_else_is_refused(
    interrupted: tuple[Path, Path], change: Callable[[dict[str, Any]], str]
) -> None:
    """Whole, and of this run as far as its manifest can tell."""
    folder, saved = interrupted
    state = load_checkpoint(saved)
    said = change(state)
    save_checkpoint(folder / "sft" / "checkpoints", 2, state, keep=3)
    with pytest.raises(AlignmentError, match=said):
        run("sft", folder, *settings_of("sft"))


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
