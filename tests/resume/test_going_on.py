"""What is said to go on with a run goes on with it, and what cannot be gone on with is refused."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import replay_runs
from fault_runs import NO_TASKS, SAVED, PluginError, failing_step, trained
from tiny_runs import SFT, events_of, run
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.outputs import FINISHED
from alignment.trainers import run as run_module
from alignment.trainers.sft import SFTTrainer
from alignment.types import UserInputError

NOT_TO_BE_MET = "expect=['sft/nll[-1:] < 0.001']"


class Killed(Exception):
    """As if the process had ended there."""


def align(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def command_in(text: str) -> list[str]:
    """The arguments of the command to go on that a message ends with."""
    (command,) = re.findall(r"align (train .+)$", text, flags=re.MULTILINE)
    return shlex.split(command)


def pipeline_of(folder: Path, expect: str = "[]") -> Path:
    """A recipe of two stages of SFT."""
    settings = "".join(
        f"      {key}: {value.strip()}\n"
        for key, _, value in (setting.partition("=") for setting in (*SFT, *SAVED))
        if key not in ("run.name", "expect", "algorithm.steps")
    )
    stages = "".join(
        f"  - name: {name}\n    recipe: tiny/sft\n    set:\n{settings}"
        f"      algorithm.steps: 5\n      expect: {expect}\n"
        for name in ("first", "last")
    )
    path = folder / "pipe.yaml"
    path.write_text(f"run: {{name: pipe, dir: '{folder}/runs'}}\nstages:\n{stages}")
    return path


# -- a finished run ---------------------------------------------------------------------------


def test_a_run_killed_at_its_very_end_gets_its_report_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(directory: RunDirectory) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_report", killed)
        assert isinstance(trained("sft", tmp_path, NOT_TO_BE_MET).exception, Killed)
    directory = RunDirectory.open(tmp_path / "sft")
    assert (directory.path / FINISHED).is_file() and not directory.report.exists()
    again = trained("sft", tmp_path, NOT_TO_BE_MET)
    assert again.exit_code == 1
    assert "is finished already; nothing to train" in again.output
    assert "expect NOT MET: sft/nll[-1:] < 0.001" in again.output
    assert directory.report.is_file()


def test_expectations_that_failed_fail_the_second_time(tmp_path: Path) -> None:
    said = [trained("sft", tmp_path, NOT_TO_BE_MET) for _ in range(2)]
    assert [result.exit_code for result in said] == [1, 1]
    last_lines = [result.output.strip().splitlines()[-1] for result in said]
    assert last_lines[0] == last_lines[1]
    assert "1 of 1 expectations of the recipe were not met" in last_lines[0]


def test_a_stage_that_failed_its_expectations_stops_the_pipeline_each_time(tmp_path: Path) -> None:
    recipe = pipeline_of(tmp_path, "['sft/nll[-1:] < 0.001']")
    for _ in range(2):
        result = align("train", str(recipe))
        assert result.exit_code == 1
        assert "1 of 1 expectations of the recipe were not met" in result.output
        assert "stage last" not in result.output
        assert not (tmp_path / "runs" / "pipe" / "stages" / "last").exists()


# -- a checkpoint by name ---------------------------------------------------------------------


def test_a_new_run_is_not_begun_from_a_named_checkpoint(tmp_path: Path) -> None:
    other = run("sft", tmp_path, *SAVED)
    checkpoint = list_checkpoints(other.checkpoints_dir)[0][1]
    with pytest.raises(UserInputError, match=r"there is no run .*fresh yet.* leave out --resume"):
        run("sft", tmp_path, *SAVED, "run.name=fresh", resume=str(checkpoint))
    assert not (tmp_path / "fresh").exists()


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    other = run("sft", tmp_path, *SAVED, "run.name=other")
    with failing_step(5, PluginError()), pytest.raises(PluginError):
        run("sft", tmp_path, *SAVED)
    checkpoint = list_checkpoints(other.checkpoints_dir)[0][1]
    own = tmp_path / "sft" / "checkpoints"
    for folder in (checkpoint, own):
        with pytest.raises(UserInputError, match="is no checkpoint of the run") as refused:
            run("sft", tmp_path, *SAVED, resume=str(folder))
        assert f"give a step-NNNNNN folder in {own}" in str(refused.value)
    link = tmp_path / "link"
    link.symlink_to(own)
    taken = run("sft", tmp_path, *SAVED, resume=str(link / "step-000002"))
    (event,) = events_of(taken, "resume")
    assert event["step"] == 2


def test_a_finished_run_is_taken_back_to_a_checkpoint_only_when_it_is_opened_again(
    tmp_path: Path,
) -> None:
    whole = run("sft", tmp_path, *SAVED)
    checkpoint = str(whole.checkpoints_dir / "step-000004")
    with pytest.raises(UserInputError, match="is finished; leave out --resume, or delete") as said:
        run("sft", tmp_path, *SAVED, resume=checkpoint)
    finished = whole.path / FINISHED
    assert f"delete {finished} to train again from that checkpoint" in str(said.value)
    finished.unlink()
    run("sft", tmp_path, *SAVED, resume=checkpoint)
    (event,) = events_of(whole, "resume")
    assert event["step"] == 4 and finished.is_file()


def test_a_pipeline_is_not_gone_on_with_from_a_checkpoint(tmp_path: Path) -> None:
    result = align("train", str(pipeline_of(tmp_path)), "--resume", str(tmp_path))
    assert result.exit_code == 2
    assert "a pipeline has no checkpoints of its own" in result.output
    assert f"align train {tmp_path}/runs/pipe/stages/NAME/recipe.yaml --resume" in result.output
    assert not (tmp_path / "runs").exists()


# -- the command ------------------------------------------------------------------------------


def test_the_command_goes_on_with_a_run_on_recorded_rollouts(tmp_path: Path) -> None:
    source = replay_runs.run("raft", tmp_path / "a source")
    recipe = replay_runs.recipe_of("raft", tmp_path / "again", "algorithm.steps=3")

    def stopping(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignment.trainers.loop.show_samples", stopping)
        with pytest.raises(Exception, match="stopped after step 1 of 3") as stopped:
            replay_runs.train(recipe, rollouts_from=source.path)
    command = command_in(str(stopped.value))
    assert command[1:] == [
        str(tmp_path / "again" / "raft" / "recipe.yaml"),
        "--rollouts-from",
        str(source.path),
    ]
    result = align(*command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "raft" / FINISHED).is_file()


def test_a_failure_on_recorded_rollouts_names_them_too(tmp_path: Path) -> None:
    source = replay_runs.run("raft", tmp_path / "source")
    broken = source.rollouts_dir / "step-000003.parquet"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception) as failed:
        replay_runs.run("raft", tmp_path / "again", rollouts_from=source.path)
    broken.write_bytes(whole)
    command = command_in(failed.value.__notes__[-1])
    assert command[-2:] == ["--rollouts-from", str(source.path)]
    result = align(*command)
    assert result.exit_code == 0, result.output


def test_a_failed_stage_names_the_recipe_of_its_pipeline(tmp_path: Path) -> None:
    with failing_step(3, PluginError("no such column")):
        result = align("train", str(pipeline_of(tmp_path)))
    assert isinstance(result.exception, PluginError)
    command = command_in(result.exception.__notes__[-1])
    assert command == ["train", str(tmp_path / "runs" / "pipe" / "recipe.yaml")]
    result = align(*command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "pipe" / "stages" / "last" / FINISHED).is_file()


def test_a_stopped_stage_names_the_recipe_of_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SFTTrainer.step

    def signalled(self: SFTTrainer, step: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(SFTTrainer, "step", signalled)
    result = align("train", str(pipeline_of(tmp_path)))
    assert "stopped after step 1 of 5 of stage first, which is saved" in result.output
    command = command_in(result.output)
    assert command == ["train", str(tmp_path / "runs" / "pipe" / "recipe.yaml")]


def test_a_run_in_a_folder_called_stages_is_no_stage(tmp_path: Path) -> None:
    with failing_step(3, PluginError()), pytest.raises(PluginError) as failed:
        run("sft", tmp_path / "stages", *SAVED, NO_TASKS)
    recipe = tmp_path / "stages" / "sft" / "recipe.yaml"
    assert command_in(failed.value.__notes__[-1]) == ["train", str(recipe)]
