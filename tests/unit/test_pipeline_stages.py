"""Pipelines: which stages are trained, skipped or refused, and what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import in_child
from pipeline_runs import Stages, begin, change, finish, pipeline, remove, sft

from alignment.config import PipelineRecipe
from alignment.runs import lineage
from alignment.runs.directory import RunDirectory
from alignment.runs.events import read_events
from alignment.runs.lock import RunLock
from alignment.trainers.pipeline import run_pipeline, stage_outputs
from alignment.types import UserInputError


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What git says is none of these tests' business, and takes it a second."""
    monkeypatch.setattr(lineage, "_git", lambda directory: None)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def test_parents_are_the_stages_referred_to(tmp_path: Path, stages: Stages) -> None:
    run = run_pipeline(pipeline(tmp_path))
    parents = {
        name: RunDirectory.open(run.path / "stages" / name).read_info()["parents"]
        for name in ("first", "aside", "last")
    }
    assert parents == {"first": [], "aside": [], "last": [str(run.path / "stages" / "first")]}


def test_finished_stages_with_unchanged_inputs_are_skipped(tmp_path: Path, stages: Stages) -> None:
    run_pipeline(pipeline(tmp_path))
    assert stages.trained == ["first", "aside", "last"]
    assert len(stages.compared) == 4
    run_pipeline(pipeline(tmp_path))
    assert stages.trained == ["first", "aside", "last"]
    assert len(stages.compared) == 4


def test_a_pipeline_that_is_running_is_not_started_again(tmp_path: Path, stages: Stages) -> None:
    run = run_pipeline(pipeline(tmp_path))
    other_start = RunLock(run.path)
    assert other_start.take() is None
    with pytest.raises(UserInputError, match=rf"{run.path} is being trained by process \d+ on"):
        run_pipeline(pipeline(tmp_path))
    other_start.release()
    run_pipeline(pipeline(tmp_path))
    assert stages.trained == ["first", "aside", "last"]


def test_a_comparison_that_hangs_is_named_and_ended(tmp_path: Path, stages: Stages) -> None:
    """Stages are compared under the limit of the last one."""
    recipe = pipeline(tmp_path, "set: {model.path", "set: {limits.hang_minutes: 0.01, model.path")
    stages.hangs = True
    code, said = in_child(lambda: run_pipeline(recipe), tmp_path / "log")
    assert code == 1
    assert "align: the run hangs in comparison (model base) since" in said
    (event,) = read_events(tmp_path / "pipe" / "events.jsonl")
    assert (event["kind"], event["phase"], event["detail"]) == ("hang", "comparison", "model base")
    assert "in evaluate" in (tmp_path / "pipe" / "hang-rank0.txt").read_text()
    stages.hangs = False
    run_pipeline(recipe)  # the next start makes the comparison
    assert len(stages.compared) == 4


def test_a_stage_whose_parent_came_out_otherwise_is_refused(tmp_path: Path, stages: Stages) -> None:
    run = run_pipeline(pipeline(tmp_path))
    first, last = run.path / "stages" / "first", run.path / "stages" / "last"
    remove(first)
    stages.weights["first"] = "others"
    with pytest.raises(UserInputError, match=r"stage 'last' was made from what has changed") as e:
        run_pipeline(pipeline(tmp_path))
    assert f"delete {last} to run it again" in str(e.value)
    assert stages.trained[3:] == ["first"]
    assert (last / "model" / "model.safetensors").read_text() == "last"
    remove(last)
    stages.compared.clear()
    run_pipeline(pipeline(tmp_path))
    assert stages.trained[4:] == ["last"]
    assert len(stages.compared) == 4  # the tables were of models that are no more


def test_a_stage_that_comes_out_the_same_again_changes_nothing(
    tmp_path: Path, stages: Stages
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    remove(run.path / "stages" / "first")
    stages.compared.clear()
    run_pipeline(pipeline(tmp_path))
    assert stages.trained[3:] == ["first"]
    assert stages.compared == []


def test_an_edited_model_is_noticed(tmp_path: Path, stages: Stages) -> None:
    run = run_pipeline(pipeline(tmp_path))
    change(run.path / "stages" / "first" / "model" / "model.safetensors", "edited")
    with pytest.raises(UserInputError, match="stage 'last' was made from what has changed since"):
        run_pipeline(pipeline(tmp_path))


def test_an_interrupted_stage_is_not_continued_on_another_parent(
    tmp_path: Path, stages: Stages
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    (run.path / "stages" / "last" / "finished.json").unlink()
    change(run.path / "stages" / "first" / "model" / "model.safetensors", "edited")
    with pytest.raises(UserInputError, match="stage 'last' was made from what has changed since"):
        run_pipeline(pipeline(tmp_path))


def test_stages_of_an_older_version_are_taken_and_said_to_be(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pipeline(pipeline(tmp_path))
    last = RunDirectory.open(run.path / "stages" / "last")
    text = last.info.read_text().replace('"inputs"', '"not-inputs"')
    last.info.write_text(text)
    capsys.readouterr()
    run_pipeline(pipeline(tmp_path))
    assert "stage 'last' did not record its inputs" in capsys.readouterr().out


def test_the_comparison_is_of_base_and_every_stage(tmp_path: Path, stages: Stages) -> None:
    run = run_pipeline(pipeline(tmp_path))
    of_stage = {n: str(run.path / "stages" / n / "model") for n in ("first", "aside", "last")}
    assert stages.compared == [("tiny-random", None), *((p, None) for p in of_stage.values())]


def test_each_compared_model_is_loaded_as_its_own_recipe_says(
    tmp_path: Path, stages: Stages
) -> None:
    """A revision is that of the path beside it, and of no model that a stage made."""
    last = "{{name: aside, recipe: tiny/sft}}".format()
    revisions = "{{name: aside, recipe: tiny/sft, set: {{model.revision: b}}}}".format()
    first = pipeline(tmp_path, last, revisions).model_dump()
    first["stages"][0]["set"] = {"model.revision": "a", "model.trust_remote_code": True}
    run_pipeline(PipelineRecipe.model_validate(first))
    found = [(model.revision, model.trust_remote_code) for model in stages.models]
    assert found == [("a", True), (None, True), (None, False), (None, False)]


def test_the_comparison_can_be_of_some_and_from_a_reference(tmp_path: Path, stages: Stages) -> None:
    options = 'compare: {{models: [last, base], reference: "${{stages.first.model}}", '.format()
    run = run_pipeline(pipeline(tmp_path, "compare: {", options))
    folder = run.path / "stages"
    reference = str(folder / "first" / "model")
    expected = [(str(folder / "last" / "model"), reference), ("tiny-random", reference)]
    assert stages.compared == expected


def test_a_stage_offers_what_it_made(tmp_path: Path) -> None:
    run = begin(sft(tmp_path, "one"))
    assert stage_outputs(run.path) == {"run": str(run.path)}
    finish(run, "1", data="{}\n")
    made = {"run": run.path, "model": run.model_dir, "data": run.data}
    assert stage_outputs(run.path) == {name: str(path) for name, path in made.items()}
