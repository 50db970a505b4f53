"""What may be asked otherwise of a pipeline that is there: its comparison, its expectations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pipeline_runs import PIPELINE, Stages, begin, change, finish, pipeline, remove, sft

from alignment.config import PipelineRecipe, dump_recipe, load_recipe
from alignment.config.load import parse_recipe
from alignment.runs import lineage
from alignment.runs.directory import RunDirectory
from alignment.runs.outputs import contents
from alignment.trainers import pipeline as pipeline_module
from alignment.trainers import run as run_module
from alignment.trainers.compared import roles
from alignment.trainers.pipeline import run_pipeline
from alignment.trainers.run import train
from alignment.types import AlignmentError, UserInputError


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What git says is none of these tests' business, and takes it a second."""
    monkeypatch.setattr(lineage, "_git", lambda directory: None)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


ALL = ["first", "aside", "last"]


def evals(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.evals_dir.iterdir())


def left(run: RunDirectory) -> dict[str, str]:
    """What the comparison wrote, and that it is complete."""
    paths = [run.metrics, run.path / "finished.json", *run.path.glob("comparison*")]
    return {path.name: path.read_text() for path in (*paths, *run.evals_dir.iterdir())}


def test_another_comparison_is_made_and_trains_nothing(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    before = run.recipe.read_text()
    mine = ["last-mine.json", "mine-step-000003.json", "mine.json"]
    for name in mine:
        (run.evals_dir / name).write_text("{}")
    (run.path / "comparison-mine.json").write_text("{}")
    stages.compared.clear()
    capsys.readouterr()
    other = pipeline(tmp_path, "compare: {", "compare: {seed: 5, models: [last], ")
    run_pipeline(other)
    assert "comparing again; not as before: compare\n" in capsys.readouterr().out
    assert (stages.trained, len(stages.compared)) == (ALL, 1)
    assert run.recipe.read_text() == dump_recipe(other)
    assert (run.path / "recipe-1.yaml").read_text() == before
    assert evals(run) == sorted(["last-held_out_loss.json", "last-held_out_loss.jsonl", *mine])
    assert (run.path / "comparison-mine.json").read_text() == "{}"
    run_pipeline(other)
    assert (stages.trained, len(stages.compared)) == (ALL, 1)
    assert len(list(run.path.glob("recipe-*.yaml"))) == 1


def test_a_comparison_of_fewer_tasks_leaves_none_of_the_others(
    tmp_path: Path, stages: Stages
) -> None:
    tasks = "[{type: held_out_loss}"
    two = pipeline(tmp_path, tasks, f"{tasks}, {{type: held_out_loss, name: again}}")
    run = run_pipeline(two)
    assert (run.path / "comparison-again.json").is_file() and len(evals(run)) == 16
    run_pipeline(pipeline(tmp_path))
    assert not (run.path / "comparison-again.json").exists() and len(evals(run)) == 8
    assert (run.path / "comparison.txt").read_text() == "a table of held_out_loss\n"


def test_a_comparison_stands_until_another_can_take_its_place(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    before = left(run)
    other = pipeline(tmp_path, "compare: {", "compare: {seed: 5, ")
    stages.error = AlignmentError("out of memory")
    with pytest.raises(AlignmentError, match="out of memory"):
        run_pipeline(other)
    assert left(run) == before
    stages.error = None

    def refuses(*_: Any) -> str:
        raise UserInputError("no scored problem in common")

    tables = SimpleNamespace(get=lambda *_: refuses)
    ours = pipeline_module.registry
    monkeypatch.setattr(pipeline_module, "registry", tables)
    with pytest.raises(UserInputError, match="no scored problem"):
        run_pipeline(other)
    assert left(run) == before
    assert list(run.path.glob(".tmp-*")) == []
    monkeypatch.setattr(pipeline_module, "registry", ours)
    run_pipeline(other)
    assert left(run)["metrics.jsonl"] != before["metrics.jsonl"]


def test_a_comparison_that_is_taken_out_leaves_nothing(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    assert (run.path / "comparison.txt").is_file() and run.metrics.read_text()
    without = pipeline(tmp_path, "compare: {tasks: [{type: held_out_loss}]}", "")
    removed = "the recipe compares nothing now: the comparison is removed\n"
    run_pipeline(without)
    assert removed in capsys.readouterr().out
    assert not list(run.path.glob("comparison*")) and evals(run) == []
    assert run.metrics.read_text() == ""
    run_pipeline(without)
    assert removed not in capsys.readouterr().out
    stages.compared.clear()
    run_pipeline(pipeline(tmp_path))  # the first recipe again, whose comparison is gone
    assert (stages.trained, len(stages.compared)) == (ALL, 4)


def of_an_earlier_version(run: RunDirectory, *, hashes: bool) -> None:
    """Make its record one that has the models' hashes, or nothing."""
    path = run.path / "finished.json"
    record = json.loads(path.read_text())
    models = {name: run.path / "stages" / name / "model" for name in ALL}
    record["compared"] = {"base": None} | {name: contents(at).hash for name, at in models.items()}
    if not hashes:
        del record["compared"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("hashes", [True, False])
def test_the_comparison_of_an_earlier_version_is_taken_as_it_is(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str], hashes: bool
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    of_an_earlier_version(run, hashes=hashes)
    stages.compared.clear()
    run_pipeline(pipeline(tmp_path))
    assert (stages.trained, stages.compared) == (ALL, [])
    assert (
        "an earlier version made the comparison; it is taken as it is\n" in capsys.readouterr().out
    )
    run_pipeline(pipeline(tmp_path))
    assert "an earlier version" not in capsys.readouterr().out


@pytest.mark.parametrize("hashes", [True, False])
def test_the_comparison_of_an_earlier_version_is_replaced_by_another(
    tmp_path: Path, stages: Stages, hashes: bool
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    of_an_earlier_version(run, hashes=hashes)
    stages.compared.clear()
    other = pipeline(tmp_path, "compare: {", "compare: {seed: 5, ")
    stages.error = AlignmentError("out of memory")
    with pytest.raises(AlignmentError):
        run_pipeline(other)  # the new recipe is the run's now
    stages.error = None
    run_pipeline(other)
    assert (stages.trained, len(stages.compared)) == (ALL, 4)
    of_an_earlier_version(run, hashes=hashes)
    run_pipeline(pipeline(tmp_path, "compare: {tasks: [{type: held_out_loss}]}", ""))
    assert evals(run) == []


def test_the_comparison_of_an_earlier_version_is_of_the_models_it_notes(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    of_an_earlier_version(run, hashes=True)
    change(run.path / "stages" / "last" / "model" / "model.safetensors", "9")
    stages.compared.clear()
    run_pipeline(pipeline(tmp_path))
    assert (stages.trained, len(stages.compared)) == (ALL, 4)
    assert "comparing again; not as before: a model, or compare\n" in capsys.readouterr().out


def test_the_reference_is_loaded_as_the_stage_that_starts_from_it_does(
    tmp_path: Path, stages: Stages
) -> None:
    first = "{name: first, recipe: tiny/sft"
    pinned = f"{first}, set: {{model.path: org/base, model.revision: abc}}"
    text = PIPELINE.format(folder=tmp_path).replace(first, pinned)
    recipe = parse_recipe(text.replace("compare: {", "compare: {reference: org/base, "))
    assert isinstance(recipe, PipelineRecipe)
    run = run_pipeline(recipe)
    loaded = [(one.path, one.revision) for one in stages.references if one is not None]
    assert loaded == [("org/base", "abc")] * 4
    stages.references.clear()
    made = 'compare: {reference: "${stages.aside.model}", '
    recipe = parse_recipe(text.replace("compare: {", made))
    assert isinstance(recipe, PipelineRecipe)
    run_pipeline(recipe)
    assert {(one.path, one.revision) for one in stages.references if one is not None} == {
        (str(run.path / "stages" / "aside" / "model"), None)
    }


def test_other_expectations_neither_train_nor_compare(tmp_path: Path, stages: Stages) -> None:
    run = run_pipeline(pipeline(tmp_path))
    stages.compared.clear()
    old = "compare: {tasks: [{type: held_out_loss}]}"
    other = pipeline(tmp_path, old, f"{old}\nexpect: ['held_out_loss/last/loss < 2']")
    run_pipeline(other)
    first = "{name: first, recipe: tiny/sft"
    run_pipeline(pipeline(tmp_path, first, f"{first}, set: {{expect: ['loss < 9']}}"))
    assert (stages.trained, stages.compared) == (ALL, [])
    assert "loss < 9" in run.recipe.read_text()


def test_another_setting_of_a_stage_is_still_refused(tmp_path: Path, stages: Stages) -> None:
    run_pipeline(pipeline(tmp_path))
    first = "{name: first, recipe: tiny/sft"
    other = pipeline(tmp_path, first, f"{first}, set: {{optim.lr: 9.0, expect: []}}")
    with pytest.raises(UserInputError, match="was made with another recipe") as caught:
        run_pipeline(other)
    assert "optim.lr: 9.0" in str(caught.value) and "expect" not in str(caught.value)


def test_a_comparison_that_could_not_be_made_is_corrected(tmp_path: Path, stages: Stages) -> None:
    """Such as one of a version that noticed only in the end."""
    run = run_pipeline(pipeline(tmp_path))
    (run.path / "finished.json").unlink()
    run.recipe.write_text(run.recipe.read_text().replace("type: held_out_loss", "type: held_loss"))
    stages.compared.clear()
    run_pipeline(pipeline(tmp_path))
    assert (stages.trained, len(stages.compared)) == (ALL, 4)


def test_an_edited_reference_is_noticed(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = finish(begin(sft(tmp_path, "elsewhere")), "1")
    options = f"compare: {{reference: '{elsewhere.model_dir}', "
    run_pipeline(pipeline(tmp_path, "compare: {", options))
    stages.compared.clear()
    change(elsewhere.model_dir / "model.safetensors", "9")
    capsys.readouterr()
    run_pipeline(pipeline(tmp_path, "compare: {", options))
    assert "comparing again; not as before: the reference\n" in capsys.readouterr().out
    assert (stages.trained, len(stages.compared)) == (ALL, 4)


def test_the_comparison_rests_on_the_stage_that_serves_it(tmp_path: Path, stages: Stages) -> None:
    """A stage that came out bit-equal from another recipe may hold out other rows."""
    run = run_pipeline(pipeline(tmp_path))
    remove(run.path / "stages" / "last")
    path = "set: {model.path"
    text = PIPELINE.format(folder=tmp_path).replace(path, f"set: {{data.held_out: 3, {path[6:]}")
    run.recipe.write_text(dump_recipe(parse_recipe(text)))
    stages.compared.clear()
    recipe = parse_recipe(text)
    assert isinstance(recipe, PipelineRecipe)
    run_pipeline(recipe)
    assert (stages.trained[3:], len(stages.compared)) == (["last"], 4)


def test_what_models_are_to_the_reference(tmp_path: Path) -> None:
    """base -> a -> b -> c, and d beside them from b's very weights."""
    a = finish(begin(sft(tmp_path, "a", "model.path=hub/base")), "a")
    b = finish(begin(sft(tmp_path, "b", f"model.path={a.model_dir}")), "b")
    c = finish(begin(sft(tmp_path, "c", f"model.path={b.model_dir}")), "c")
    d = finish(begin(sft(tmp_path, "d", f"model.path={c.model_dir}")), "d")
    copy = finish(begin(sft(tmp_path, "copy", "model.path=hub/base")), "b")
    runs = {"a": a, "b": b, "c": c, "d": d}
    recipes = {name: load_recipe(run.recipe) for name, run in runs.items()}
    made = {name: str(run.model_dir) for name, run in runs.items()}
    models = {"d": made["d"], "c": made["c"], "base": "hub/base", "b": made["b"], "a": made["a"]}
    expected = {"c": "start", "b": "itself", "a": "ancestor", "base": "ancestor"}
    assert roles(models, made["b"], recipes, made) == expected
    assert roles(models, str(copy.model_dir), recipes, made) == expected
    assert roles({"c": made["c"]}, made["b"], recipes, made) == {"c": "start"}
    assert roles(models, "hub/base", recipes, made) == {"base": "itself", "a": "start"}
    assert roles(models, None, recipes, made) == {}


def test_a_finished_run_is_judged_by_what_is_expected_of_it_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Path] = []
    monkeypatch.setattr(run_module, "write_report", lambda run: reports.append(run.path))
    high, low = (sft(tmp_path, "one", f"expect=[loss < {limit}]") for limit in (1, 3))
    run = finish(begin(high), "1")
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    run.report.write_text("")
    with pytest.raises(AlignmentError, match=r"lower the expectations \(expect in the recipe\)"):
        train(high)
    assert reports == []
    train(low)
    assert run.recipe.read_text() == dump_recipe(low)
    assert (run.path / "recipe-1.yaml").read_text() == dump_recipe(high)
    assert reports == [run.path]
    with pytest.raises(UserInputError, match="was made with another recipe"):
        train(sft(tmp_path, "one", "optim.lr=1"))
