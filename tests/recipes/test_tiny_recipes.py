"""Every tiny recipe, from the command line to what one does with the run afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from documented import undocumented
from tiny_runs import events_of, metrics_of, steps_of
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.config.load import load_recipe, shipped_recipes
from alignment.runs.directory import RunDirectory
from alignment.runs.lock import LOCK
from alignment.runs.metrics import read_metrics
from alignment.trainers import pipeline as pipeline_module
from alignment.trainers.sft import SFTTrainer

TINY = [name for name in shipped_recipes() if name.startswith("tiny/")]
FINISH_SECONDS = 60.0  # each takes under ten on a quiet machine


def align(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@dataclass(frozen=True)
class Finished:
    """A recipe's run, and what the command printed."""

    run: RunDirectory
    result: Result
    seconds: float


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Every tiny recipe, run to the end. RL from verifiable rewards starts from the SFT model."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Finished] = {}
    for name in sorted(TINY, key=lambda name: name != "tiny/sft"):
        overrides = [f"run.dir={folder}"]
        if name == "tiny/rlvr":
            overrides.append(f"model.path={done['tiny/sft'].run.model_dir}")
        began = time.monotonic()
        result = align("train", name, *overrides)
        seconds = time.monotonic() - began
        path = folder / load_recipe(name).run.name
        assert result.exit_code == 0, result.output
        done[name] = Finished(RunDirectory.open(path), result, seconds)
    return done


def test_all_tiny_recipes_are_covered() -> None:
    assert set(TINY) >= {"tiny/sft", "tiny/grpo", "tiny/rlvr", "tiny/quickstart"}


def test_every_metric_of_every_method_is_documented(finished: dict[str, Finished]) -> None:
    folders = {one.run.path for one in finished.values()}
    recorded = {
        name
        for folder in folders
        for path in folder.rglob("metrics.jsonl")
        for record in read_metrics(path)
        for name in record
        if not is_comparison(path)
    } - {"step"}
    assert undocumented(recorded) == []


def is_comparison(metrics: Path) -> bool:
    """Whether the file is a pipeline's own, whose names have a model's name in them."""
    return (metrics.parent / "stages").is_dir()


@pytest.mark.parametrize("name", TINY)
def test_a_recipe_runs_in_seconds_and_meets_its_expectations(
    finished: dict[str, Finished], name: str
) -> None:
    one = finished[name]
    assert "NOT MET" not in one.result.output
    assert one.seconds < FINISH_SECONDS
    assert (one.run.path / "finished.json").is_file()
    assert one.run.report.read_text(encoding="utf-8").startswith("<!")


@pytest.mark.parametrize("name", TINY)
def test_a_run_can_be_verified(finished: dict[str, Finished], name: str) -> None:
    result = align("verify", finished[name].run.path)
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    assert "pass" in result.output


@pytest.mark.parametrize("name", TINY)
def test_a_report_can_be_written_again(finished: dict[str, Finished], name: str) -> None:
    report = finished[name].run.report
    before = report.stat().st_mtime_ns
    result = align("report", finished[name].run.path)
    assert result.exit_code == 0, result.output
    assert report.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("tiny/sft", "held_out_loss", "loss"),
        ("tiny/rlvr", "held_out_loss", "loss"),
        ("tiny/rlvr", "verifiable", "accuracy"),
        ("tiny/grpo", "verifiable", "reward"),
    ],
)
def test_a_run_can_be_evaluated(
    finished: dict[str, Finished], name: str, task: str, metric: str
) -> None:
    options = ["--samples", "2"] if task == "verifiable" else []
    result = align("eval", finished[name].run.path, "--task", task, *options)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    (value,) = (float(row[2]) for row in rows if row[:2] == [task, metric])
    if (name, task) == ("tiny/sft", "held_out_loss"):
        last = json.loads(finished[name].run.metrics.read_text().splitlines()[-1])
        assert value == pytest.approx(last["eval/held_out_loss/loss"], rel=1e-3)


def test_a_model_can_be_evaluated_with_the_recipe_of_another_run(
    finished: dict[str, Finished],
) -> None:
    graded = align("eval", finished["tiny/sft"].run.path, "--task", "verifiable")
    assert graded.exit_code == 2
    assert "--recipe RECIPE" in graded.output
    recipe = ["--recipe", "tiny/rlvr", "--samples", "4"]
    result = align("eval", finished["tiny/sft"].run.path, "--task", "verifiable", *recipe)
    assert result.exit_code == 0, result.output


def test_the_doctor_knows_the_tiny_model(finished: dict[str, Finished]) -> None:
    result = align("doctor")
    assert "tiny-random" in result.output
    assert ("no problems found" in result.output) == (result.exit_code == 0)
    assert result.exit_code in (0, 1)


def test_the_lineage_of_a_run_is_recorded(finished: dict[str, Finished]) -> None:
    info = finished["tiny/sft"].run.read_info()
    for key in ("model_hash", "tokenizer_hash", "template_hash", "data_hash", "recipe_hash"):
        assert len(info[key]) == 64
    # Both read the same rows, and train another model.
    other = finished["tiny/rlvr"].run.read_info()
    assert other["data_hash"] == info["data_hash"]
    assert other["model_hash"] != info["model_hash"]


def test_the_same_recipe_gives_the_same_run(finished: dict[str, Finished], tmp_path: Path) -> None:
    assert align("train", "tiny/sft", f"run.dir={tmp_path}").exit_code == 0
    again = RunDirectory.open(tmp_path / "tiny-sft")
    assert steps_of(again) == steps_of(finished["tiny/sft"].run)


# -- the pipeline -----------------------------------------------------------------------------


def test_the_pipeline_hands_models_on(finished: dict[str, Finished]) -> None:
    path = finished["tiny/quickstart"].run.path
    sft, rl = (RunDirectory.open(path / "stages" / name) for name in ("sft", "rl"))
    assert f"path: {sft.model_dir}" in rl.recipe.read_text(encoding="utf-8")
    assert rl.read_info()["parents"] == [str(sft.path)]
    # The RL stage's KL is measured from the SFT model, not from the base.
    assert metrics_of(rl)[0]["kl/mean"] == 0.0
    rewards = [record["reward/mean"] for record in metrics_of(rl)]
    assert sum(rewards[-5:]) > sum(rewards[:5])


def test_a_finished_pipeline_is_not_run_again(finished: dict[str, Finished]) -> None:
    path = finished["tiny/quickstart"].run.path
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    began = time.monotonic()
    result = align("train", "tiny/quickstart", f"run.dir={path.parent}")
    assert result.exit_code == 0, result.output
    assert time.monotonic() - began < 5.0
    assert result.output.count("is finished already") == 2
    after = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    changed = {file.name for file in after if after[file] != before.get(file)}
    assert changed == {"report.html", LOCK}


PIPELINE = """
run: {{name: pipe, dir: '{folder}'}}
stages:
  - name: first
    recipe: tiny/sft
    set: {{algorithm.steps: 3, expect: []}}
  - name: second
    recipe: tiny/sft
    set: {{algorithm.steps: 3, expect: [], model.path: "${{stages.first.model}}"}}
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of two stages that take no time."""
    path = tmp_path / "pipe.yaml"
    path.write_text(PIPELINE.format(folder=tmp_path / "runs"), encoding="utf-8")
    return path


def test_an_interrupted_pipeline_goes_on_where_it_was(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SFTTrainer.step
    calls = 0

    def signalled(self: SFTTrainer, step: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second step of the second stage
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(SFTTrainer, "step", signalled)
    stopped = align("train", pipeline)
    recipe = tmp_path / "runs" / "pipe" / "recipe.yaml"
    assert stopped.exit_code == 0
    message = stopped.output.replace("\n", " ")
    assert "stopped after step 2 of 3 of stage second, which is saved" in message
    assert f"to go on: align train {recipe}" in message
    first = tmp_path / "runs" / "pipe" / "stages" / "first" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    resumed = align("train", recipe)
    assert resumed.exit_code == 0, resumed.output
    assert calls == 6
    assert first.stat().st_mtime_ns == before
    second = RunDirectory.open(tmp_path / "runs" / "pipe" / "stages" / "second")
    assert [event["step"] for event in events_of(second, "resume")] == [2]


def test_a_pipeline_without_rewards_can_be_compared(pipeline: Path) -> None:
    text = pipeline.read_text(encoding="utf-8")
    pipeline.write_text(text + "compare: {tasks: [{type: held_out_loss}]}\n", encoding="utf-8")
    result = align("train", pipeline)
    assert result.exit_code == 0, result.output
    evaluated = [line.split()[1] for line in result.output.splitlines() if "evaluating" in line]
    assert evaluated == ["base", "first", "second"]


def test_a_pipeline_whose_comparison_failed_compares_again(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pipeline.read_text(encoding="utf-8")
    pipeline.write_text(text + "compare: {tasks: [{type: held_out_loss}]}\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "evaluate_model", lambda *_, **__: 1 / 0)
        assert align("train", pipeline).exit_code == 1
    result = align("train", pipeline)
    assert result.exit_code == 0, result.output
    assert result.output.count("is finished already") == 2
    assert (tmp_path / "runs" / "pipe" / "finished.json").is_file()
