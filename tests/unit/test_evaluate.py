"""`align eval` saves what it finds, where `align compare` and `align report` look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import metrics_of, recipe_of, run
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.config import dump_recipe
from alignment.config.load import load_task
from alignment.runs.directory import RunDirectory
from alignment.trainers.evaluate import evaluation_name

TASKS = "eval={tasks: [{type: held_out_loss}]}"
FILES = "held_out_loss,seed=0-step-000002"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with an evaluation in training."""
    return run("sft", tmp_path_factory.mktemp("runs"), TASKS, "run.seed=3", "model.dtype=float32")


def align(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def evaluated(*arguments: object) -> Result:
    result = align("eval", *arguments)
    assert result.exit_code == 0, result.output
    return result


def rewards(folder: Path, stem: str) -> list[float]:
    """What each record of a saved evaluation holds."""
    lines = (folder / "evals" / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["reward"] for line in lines]


def test_a_runs_evaluation_is_saved_in_the_run(trained: RunDirectory) -> None:
    result = evaluated(trained.path, "--task", "held_out_loss", "--overwrite")
    assert result.stdout.splitlines()[-1] == f"saved in {trained.evals_dir}"
    # The model that was saved is the one that was evaluated in training.
    at_the_end = rewards(trained.path, "held_out_loss-step-000002")
    assert len(at_the_end) == 3
    assert rewards(trained.path, FILES) == pytest.approx(at_the_end, abs=1e-6)
    summary = json.loads((trained.evals_dir / f"{FILES}.json").read_text())
    logged = metrics_of(trained)[-1]["eval/held_out_loss/loss"]
    assert summary["metrics"]["loss"] == pytest.approx(logged, abs=1e-6)


def test_a_saved_evaluation_is_not_overwritten_unasked(trained: RunDirectory) -> None:
    task = (trained.path, "--task", "held_out_loss")
    evaluated(*task, "--overwrite")
    before = {path.name: path.read_bytes() for path in trained.evals_dir.iterdir()}
    refused = align("eval", *task)
    assert refused.exit_code == 2
    assert f"{FILES}.json exists already and is not overwritten" in refused.output
    evaluated(*task, "--samples", "2")
    evaluated(*task, "--seed", "1")
    evaluated(*task, "--base")
    evaluated(*task, "--set", "name=mine")
    now = {path.name: path.read_bytes() for path in trained.evals_dir.iterdir()}
    assert now.keys() - before.keys() == {
        f"{name}.{form}"
        for form in ("json", "jsonl")
        for name in (
            "held_out_loss,samples=2,seed=0-step-000002",
            "held_out_loss,seed=1-step-000002",
            "held_out_loss,seed=0-step-000000",
            "mine,seed=0-step-000002",
        )
    }
    assert all(now[name] == content for name, content in before.items())
    assert len(rewards(trained.path, "held_out_loss,samples=2,seed=0-step-000002")) == 2
    # What was handed over was evaluated in training, too, before the first step.
    assert rewards(trained.path, "held_out_loss,seed=0-step-000000") == pytest.approx(
        rewards(trained.path, "held_out_loss-step-000000"), abs=1e-6
    )


def test_a_model_is_saved_where_out_says_and_compared_with_a_run(
    trained: RunDirectory, tmp_path: Path
) -> None:
    task = ("--task", "held_out_loss", "--recipe", trained.recipe)
    unsaved = evaluated("tiny-random", *task)
    assert unsaved.stdout.splitlines()[-1] == "not saved: no --out FOLDER"
    assert not list(tmp_path.iterdir())
    base = tmp_path / "base"
    evaluated("tiny-random", *task, "--out", base)
    evaluated(trained.path, "--task", "held_out_loss", "--out", tmp_path / "tuned")
    before = rewards(base, "held_out_loss,seed=0-step-000000")
    after = rewards(tmp_path / "tuned", FILES)
    # The loss is the negative mean log-probability a token, which is what records hold.
    difference = sum(b - a for a, b in zip(before, after, strict=True)) / len(before)
    compared = align("compare", base, tmp_path / "tuned")
    assert compared.exit_code == 0, compared.output
    assert f" {-difference:+.3f} " in compared.stdout.splitlines()[-1]
    shown = align("report", base)
    assert shown.exit_code == 0, shown.output
    page = (base / "report.html").read_text(encoding="utf-8")
    assert "held_out_loss,seed=0" in page and "trained elsewhere" in page


def test_a_report_shows_base_and_run(trained: RunDirectory) -> None:
    for options in ([], ["--base"]):
        evaluated(trained.path, "--task", "held_out_loss", "--overwrite", *options)
    assert align("report", trained.path).exit_code == 0
    page = trained.report.read_text(encoding="utf-8")
    assert "held_out_loss,seed=0, step 2" in page


def test_other_problems_and_other_seeds_are_not_paired(
    trained: RunDirectory, tmp_path: Path
) -> None:
    data = "data={type: arithmetic, operation: add, operands: 3, low: 1, high: 9, held_out: 3}"
    other = run("sft", tmp_path, data, "model.dtype=float32", "algorithm.steps=1")
    task = ("--task", "held_out_loss")
    evaluated(trained.path, *task, "--overwrite")
    evaluated(other.path, *task)
    pair = ("compare", trained.path, other.path, "--task", "held_out_loss,seed=0")
    refused = align(*pair)
    assert refused.exit_code == 2
    assert "evaluated on different problems" in refused.output
    evaluated(other.path, *task, "--recipe", trained.recipe, "--seed", "5")
    (other.evals_dir / "held_out_loss,seed=0-step-000001.json").unlink()
    refused = align(*pair)
    assert refused.exit_code == 2
    assert "no evaluation 'held_out_loss,seed=0' in both runs" in refused.output
    assert "held_out_loss,seed=5. Evaluate both alike by align eval" in refused.output


def test_what_has_no_model_is_refused(trained: RunDirectory, tmp_path: Path) -> None:
    task = ("--task", "held_out_loss")
    recipe = dump_recipe(recipe_of("sft", tmp_path))
    begun = RunDirectory.create(tmp_path, "begun", recipe_yaml=recipe, info={})
    assert "not finished; go on with it by" in align("eval", begun.path, *task).output
    assert "there is no data to evaluate on" in align("eval", "tiny-random", *task).output
    with_data = (*task, "--recipe", trained.recipe, "--base")
    refused = align("eval", "tiny-random", *with_data)
    assert refused.exit_code == 2 and "--base: tiny-random is not a run" in refused.output


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], "verifiable,seed=7"),
        (["temperature=0.5", "samples=2"], "verifiable,samples=2,temperature=0.5,seed=7"),
        (["ks=[1, 2]"], "verifiable,ks=[1,2],seed=7"),
        (["name=hard", "prompts=4"], "hard,prompts=4,seed=7"),
    ],
)
def test_a_name_says_what_was_asked_for(settings: list[str], name: str) -> None:
    assert evaluation_name(load_task("verifiable", settings), 7) == name


def test_options_that_no_file_name_can_hold_are_hashed() -> None:
    def name(best_of: Any, gold: str) -> str:
        options = [f"best_of={best_of}", f"gold={gold}"]
        return evaluation_name(load_task("reward_kl", options), 0)

    one, other = name([1, 2], "a/b"), name([1, 2], "a/c")
    assert one != other
    assert all(
        len(text) == len("reward_kl,12345678,seed=0") and "/" not in text for text in (one, other)
    )
