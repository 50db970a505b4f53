"""Whatever is wrong with a run: the message names it and the remedy, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tiny_runs import GRPO, SFT, metrics_of, run
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.runs import checkpoint, files
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.files import TEMPORARY_PREFIX
from alignment.runs.jsonl import JsonLinesFile
from alignment.trainers import run as run_module
from alignment.types import AlignmentError, UserInputError

BASE = {"sft": ("tiny/sft", SFT), "grpo": ("tiny/grpo", GRPO)}


def trained(method: str, folder: Path, *overrides: str) -> Result:
    """The command's result."""
    recipe, settings = BASE[method]
    return CliRunner().invoke(app, ["train", recipe, *settings, f"run.dir={folder}", *overrides])


def assert_refused(result: Result, folder: Path, *words: str) -> None:
    """Exit code 2, these words in the message, no traceback, and no run."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output
    assert not folder.exists() or not any(folder.iterdir())


# -- data -------------------------------------------------------------------------------------

LONG = {"prompt": "x" * 3000, "completion": "y", "answer": "1"}
GOOD = {"prompt": "hello", "completion": "you", "answer": "1"}


def data_file(folder: Path, *rows: Any) -> str:
    path = folder / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return f"data={{type: file, path: '{path}'}}"


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_prompt_longer_than_the_context_is_dropped_and_counted(
    tmp_path: Path, method: str
) -> None:
    data = data_file(tmp_path, GOOD, LONG, GOOD | {"prompt": "bye"})
    result = trained(method, tmp_path / "runs", data, "eval={tasks: []}")
    assert result.exit_code == 0, result.output
    events = (tmp_path / "runs" / method / "events.jsonl").read_text()
    place = f"({tmp_path / 'data.jsonl'}:2)"
    assert f"2 of 3 rows kept; 1 dropped, the prompt leaves no room for a completion {place}" in (
        events
    )


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_prompts_that_are_all_too_long_are_refused(tmp_path: Path, method: str) -> None:
    result = trained(method, tmp_path / "runs", data_file(tmp_path, LONG))
    assert_refused(
        result, tmp_path / "runs", "no row can be used", "data.jsonl:1)", "Raise the token"
    )


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_an_empty_file_is_refused(tmp_path: Path, method: str) -> None:
    result = trained(method, tmp_path / "runs", data_file(tmp_path))
    assert_refused(result, tmp_path / "runs", "data.jsonl", "holds no rows", "give a file")


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_malformed_line_is_named(tmp_path: Path, method: str) -> None:
    result = trained(method, tmp_path / "runs", data_file(tmp_path, GOOD, '{"prompt": "a", '))
    assert_refused(result, tmp_path / "runs", "data.jsonl:2: not valid JSON at column")


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_row_without_its_columns_is_named(tmp_path: Path, method: str) -> None:
    result = trained(method, tmp_path / "runs", data_file(tmp_path, GOOD, {"text": "a"}))
    assert_refused(
        result, tmp_path / "runs", "data.jsonl:2: ", "the columns 'text'", "rename columns"
    )


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_blank_prompt_is_dropped_and_counted(tmp_path: Path, method: str) -> None:
    data = data_file(tmp_path, GOOD, GOOD | {"prompt": " "}, GOOD | {"prompt": "bye"})
    result = trained(method, tmp_path / "runs", data, "eval={tasks: []}")
    assert result.exit_code == 0, result.output
    events = (tmp_path / "runs" / method / "events.jsonl").read_text()
    assert f"1 dropped, a user's message is blank ({tmp_path / 'data.jsonl'}:2)" in events


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_a_reward_names_the_row_by_its_line(tmp_path: Path, shuffle: str) -> None:
    rows = [GOOD | {"prompt": f"question {n}"} for n in range(7)]
    data = data_file(tmp_path, *rows[:5], {"prompt": "lacking"}, *rows[5:])
    result = trained(
        "grpo",
        tmp_path / "runs",
        data,
        f"data.shuffle={shuffle}",
        "eval={tasks: []}",
        "algorithm.steps=4",
        "rewards=[{type: exact}]",
    )
    assert result.exit_code == 2, result.output
    words = " ".join(result.output.split())
    assert f"{tmp_path}/data.jsonl:6 has no text in the column 'answer'" in words


def test_too_many_held_out_rows_are_refused_by_their_key(tmp_path: Path) -> None:
    result = trained("sft", tmp_path / "runs", data_file(tmp_path, GOOD), "data.held_out=9")
    assert_refused(result, tmp_path / "runs", "data.held_out: 9 of 1 rows cannot be held out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = trained("sft", tmp_path / "runs", f"data={{type: file, path: {tmp_path}/no.jsonl}}")
    assert_refused(result, tmp_path / "runs", "no.jsonl", "does not exist", "relative to")


# -- model and template -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "grpo"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role here') }}", "no such role here"),
        ("{% for message in messages %}", "endfor"),
    ],
)
def test_a_chat_template_that_fails_is_named(
    tmp_path: Path, method: str, template: str, message: str
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(template, encoding="utf-8")
    result = trained(method, tmp_path / "runs", f"model.chat_template={path}")
    words = ("the chat template rejects it", message, "another template with model.chat_template")
    assert_refused(result, tmp_path / "runs", *words)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = trained("sft", tmp_path / "runs", "model.path=./no-model")
    assert_refused(result, tmp_path / "runs", "./no-model", "no such directory", "tiny-random")


# -- rewards ----------------------------------------------------------------------------------


def raises(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward with a mistake in it."""
    raise ZeroDivisionError("one over nothing")


def not_a_number(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that is NaN."""
    return [float("nan")] * len(completions)


def too_few(completions: Sequence[str], **_: Any) -> list[float]:
    """One score for all."""
    return [1.0]


def a_word(completions: Sequence[str], **_: Any) -> list[str]:
    """No number."""
    return ["good"] * len(completions)


def reward(function: Callable[..., Any]) -> str:
    return f"rewards=[{{type: 'test_trainers_bad_input:{function.__name__}'}}]"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raises, "raised ZeroDivisionError: one over nothing"),
        (not_a_number, "returned nan"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_can_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], words: str
) -> None:
    result = trained("grpo", tmp_path, reward(function))
    assert result.exit_code == 1
    assert "100% of 16 completions could not be scored" in result.output
    assert f"test_trainers_bad_input:{function.__name__}" in result.output
    assert words in result.output
    assert "Correct the reward" in result.output

    def mended(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(ids[0] % 7) for ids in completion_ids]

    monkeypatch.setattr(f"test_trainers_bad_input.{function.__name__}", mended)
    assert trained("grpo", tmp_path, reward(function)).exit_code == 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (too_few, ("returned 1 scores for 16 completions", "return exactly one per completion")),
        (a_word, ("returned 'good' (str) for sample 0 of prompt 0", "return a number")),
    ],
)
def test_a_reward_that_is_programmed_wrongly_is_refused(
    tmp_path: Path, function: Callable[..., Any], words: Sequence[str]
) -> None:
    result = trained("grpo", tmp_path / "runs", reward(function))
    assert_refused(
        result, tmp_path / "runs", f"test_trainers_bad_input:{function.__name__}", *words
    )


def test_a_run_that_made_a_step_is_kept_when_its_reward_is_refused(tmp_path: Path) -> None:
    result = trained("grpo", tmp_path, reward(wrong_later), "algorithm.steps=3")
    assert result.exit_code == 2
    assert len(metrics_of(RunDirectory.open(tmp_path / "grpo"))) == 1


def wrong_later(
    completion_ids: Sequence[Sequence[int]], expression: Sequence[str], **_: Any
) -> list[float]:
    """Right once, then too few scores."""
    wrong_later.calls = getattr(wrong_later, "calls", 0) + 1  # type: ignore[attr-defined]
    scores = [float(ids[0] % 7) for ids in completion_ids]
    return scores if wrong_later.calls == 1 else scores[1:]  # type: ignore[attr-defined]


# -- evaluation -------------------------------------------------------------------------------


def test_a_graded_task_without_rewards_is_refused(tmp_path: Path) -> None:
    result = trained("sft", tmp_path / "runs", "eval={tasks: [{type: verifiable}]}")
    assert_refused(result, tmp_path / "runs", "the run's recipe has no rewards", "--recipe RECIPE")


def test_a_task_without_held_out_data_is_refused(tmp_path: Path) -> None:
    tasks = "eval={tasks: [{type: verifiable}]}"
    result = trained("grpo", tmp_path / "runs", tasks, "data.held_out=0")
    assert_refused(result, tmp_path / "runs", "no held-out prompts", "give the run's data")


# -- names and expectations -------------------------------------------------------------------


def test_an_existing_name_is_refused(tmp_path: Path) -> None:
    assert trained("sft", tmp_path).exit_code == 0
    result = trained("sft", tmp_path, "optim.lr=0.5")
    assert result.exit_code == 2
    assert "was made with another recipe" in result.output
    assert "choose another run.name, or delete the run" in result.output


@pytest.mark.parametrize("name", ["file", "file/runs"])
def test_a_file_where_the_folder_of_runs_should_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    result = trained("sft", tmp_path / name)
    assert result.exit_code == 2, result.output
    assert f"run.dir: cannot create the folder {tmp_path / name}: " in result.output


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_of_runs_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.mkdir

    def mkdir(path: str, *rest: Any, **options: Any) -> None:
        if TEMPORARY_PREFIX in str(path):
            raise OSError(number, os.strerror(number))
        real(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(AlignmentError) as caught:
        RunDirectory.create(tmp_path, "name", recipe_yaml="", info={})
    mistake = number != errno.ENOSPC  # a disk that is full now may have had room before
    assert isinstance(caught.value, UserInputError) == mistake
    assert str(caught.value).startswith("run.dir: cannot create a run in ") == mistake


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "thesis.txt").write_text("years of work")
    result = trained("sft", tmp_path)
    assert result.exit_code == 2
    assert "is not a run" in result.output
    assert (tmp_path / "sft" / "thesis.txt").read_text() == "years of work"


def test_an_expectation_that_is_not_met_is_a_failure_after_a_whole_run(tmp_path: Path) -> None:
    result = trained("sft", tmp_path, "expect=['sft/nll[-1:] < 0.001']")
    assert result.exit_code == 1
    assert "1 of 1 expectations of the recipe were not met" in result.output
    assert (tmp_path / "sft" / "finished.json").is_file()
    assert (tmp_path / "sft" / "report.html").is_file()


# -- a full disk ------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_resumable_after(folder: Path, *settings: str) -> None:
    """Nothing half-written is there, and the run goes on once there is room."""
    assert not list(folder.rglob(f"{TEMPORARY_PREFIX}*"))
    directory = run("sft", folder, "algorithm.steps=4", "checkpoint.every=1", *settings)
    assert len(metrics_of(directory)) == 4


FULL = ("algorithm.steps=4", "checkpoint.every=1")


def test_a_disk_that_fills_up_while_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = JsonLinesFile._write_all

    def half(self: JsonLinesFile, line: bytes) -> None:
        if b'"step": 3' in line and b"nll" in line:
            write(self, line[: len(line) // 2])
            no_space()
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLinesFile, "_write_all", half)
        with pytest.raises(AlignmentError, match=r"metrics\.jsonl.*the disk is full; free some"):
            run("sft", tmp_path, *FULL)
    lines = (tmp_path / "sft" / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert_resumable_after(tmp_path)


@pytest.mark.parametrize("name", ["write_synced", "sync_directory"])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = getattr(files, name)

    def full(path: Path, *rest: Any) -> None:
        later = [step for step, _ in list_checkpoints(tmp_path / "sft" / "checkpoints")]
        if later and max(later) >= 2:
            no_space()
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, full)
        with pytest.raises(AlignmentError, match=r"write the checkpoint .*the disk is full"):
            run("sft", tmp_path, *FULL)
    kept = [step for step, _ in list_checkpoints(tmp_path / "sft" / "checkpoints")]
    assert max(kept) >= 2
    assert_resumable_after(tmp_path)


def test_a_disk_without_room_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("alignment.runs.checkpoint.shutil.disk_usage", lambda _: usage)
        with pytest.raises(AlignmentError, match=r"does not fit into .* free some space"):
            run("sft", tmp_path, *FULL)
    assert not list_checkpoints(tmp_path / "sft" / "checkpoints")
    assert_resumable_after(tmp_path)


def test_a_disk_that_fills_up_while_samples_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        result = trained("grpo", tmp_path)
    assert result.exit_code == 1
    assert "the disk is full; free some space" in result.output
    assert not list(tmp_path.rglob(f"{TEMPORARY_PREFIX}*"))


def no_space_for_tensors(*_: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [no_space, no_space_for_tensors])
def test_a_disk_that_fills_up_while_the_model_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_policy", failure)
        with pytest.raises(AlignmentError, match=r"save the model to .*the disk is full"):
            run("sft", tmp_path, *FULL)
    assert not (tmp_path / "sft" / "finished.json").exists()
    assert_resumable_after(tmp_path)
