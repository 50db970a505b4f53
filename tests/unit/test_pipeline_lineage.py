"""Pipelines and where runs come from: inputs found, changes refused, mismatches explained."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import in_child

from alignment.config import PipelineRecipe, Recipe, dump_recipe, load_recipe
from alignment.config.load import parse_recipe
from alignment.config.model import ModelConfig
from alignment.runs import lineage, outputs
from alignment.runs.ancestry import trace
from alignment.runs.directory import RunDirectory
from alignment.runs.events import read_events
from alignment.runs.inputs import (
    ParentRecord,
    check_compatible,
    encoding_of,
    find_parents,
    refuse_changed_inputs,
)
from alignment.runs.lineage import run_info
from alignment.runs.lock import RunLock
from alignment.runs.outputs import Encoding, contents, write_finished
from alignment.trainers import pipeline as pipeline_module
from alignment.trainers import run as run_module
from alignment.trainers.compared import roles
from alignment.trainers.pipeline import run_pipeline, stage_outputs
from alignment.trainers.run import train
from alignment.types import AlignmentError, UserInputError

T, C, OTHER = "a" * 64, "b" * 64, "c" * 64
ENCODING = Encoding(T, C, 260)


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What git says is none of these tests' business, and takes it a second."""
    monkeypatch.setattr(lineage, "_git", lambda directory: None)


def sft(folder: Path, name: str, *overrides: str) -> Recipe:
    recipe = load_recipe("tiny/sft", [f"run.dir={folder}", f"run.name={name}", *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def change(path: Path, text: str) -> None:
    """Change a file as time passes: its time of last change differs."""
    path.write_text(text)
    later = path.stat().st_mtime_ns + 5_000_000_000
    os.utime(path, ns=(later, later))


def begin(recipe: Recipe, **hashes: str | None) -> RunDirectory:
    """The folder of a run that has started."""
    text = dump_recipe(recipe)
    known: dict[str, Any] = {"model_hash": "0" * 64, "data_hash": "d" * 64}
    known |= {"tokenizer_hash": T, "template_hash": C, **hashes}
    info = run_info(recipe=text, command=[], seed=0, inputs=find_parents(recipe), **known)
    return RunDirectory.create(recipe.run.dir, recipe.run.name, recipe_yaml=text, info=info)


def finish(run: RunDirectory, weights: str, data: str | None = None) -> RunDirectory:
    """What a run leaves, with a text for weights."""
    run.model_dir.mkdir()
    (run.model_dir / "model.safetensors").write_text(weights)
    if data is not None:
        run.data.write_text(data)
    write_finished(run.path, steps=3, encoding=ENCODING)
    return run


# -- inputs -----------------------------------------------------------------------------------


def test_settings_that_lead_into_runs_are_inputs(tmp_path: Path) -> None:
    parent = finish(begin(sft(tmp_path, "one")), "1", data='{"prompt": "a"}\n')
    recipe = sft(
        tmp_path,
        "two",
        f"model.path={parent.model_dir / 'adapter'}",
        f"data={{type: file, path: '{parent.data}'}}",
        f"model.chat_template={parent.path}/recipe.yaml",
    )
    (parent.model_dir / "adapter").mkdir()
    found = {record.key: (record.output, record.hash) for record in find_parents(recipe)}
    assert found == {
        "model.path": ("model", contents(parent.model_dir).hash),
        "data.path": ("data", contents(parent.data).hash),
        "model.chat_template": ("recipe.yaml", contents(parent.recipe).hash),
    }
    assert {record.run for record in find_parents(recipe)} == {str(parent.path)}


def test_a_cache_of_replies_is_no_input(tmp_path: Path) -> None:
    """It changes while the run goes on that shares it."""
    parent = finish(begin(sft(tmp_path, "one")), "1")
    cache = parent.path / "judge.sqlite"
    cache.write_text("a reply")
    server = f"base_url: 'http://a/v1', model: m, cache: '{cache}'"
    reward = f"rewards=[{{type: judge, {server}}}]"
    assert find_parents(sft(tmp_path, "two", reward)) == ()
    judge = f"algorithm.judge={{kind: endpoint, {server}}}"
    text = ["algorithm.verdict=text", "algorithm.require_consistent=true"]
    recipe = load_recipe("tiny/ai_feedback", [judge, *text])
    assert isinstance(recipe, Recipe)
    assert find_parents(recipe) == ()


def test_names_and_other_folders_are_no_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(begin(sft(tmp_path, "sft")), "1")  # as the method is called
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "stages").mkdir()  # where a run is kept is not what it takes
    recipe = sft(tmp_path / "sft" / "stages", "two", f"model.path={tmp_path}/plain/model")
    assert find_parents(recipe) == ()
    for template in ("{{ 1 }}/" + "x" * 5000, "{{ '/\0' }}"):
        settings = recipe.model.model_copy(update={"chat_template": template})
        assert find_parents(recipe.model_copy(update={"model": settings})) == ()


def test_run_json_lists_inputs_and_the_runs_they_are_of(tmp_path: Path) -> None:
    parent = finish(begin(sft(tmp_path, "one")), "1")
    info = begin(sft(tmp_path, "two", f"model.path={parent.model_dir}")).read_info()
    made = contents(parent.model_dir).hash
    entry = {"key": "model.path", "run": str(parent.path), "output": "model", "hash": made}
    assert info["inputs"] == [entry]
    assert info["parents"] == [str(parent.path)]
    assert parent.read_info()["inputs"] == []


# -- changes ----------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    """A run, and one that started from its model."""
    parent = finish(begin(sft(tmp_path, "one")), "1")
    return parent, finish(begin(sft(tmp_path, "two", f"model.path={parent.model_dir}")), "2")


def test_unchanged_inputs_are_accepted(family: tuple[RunDirectory, RunDirectory]) -> None:
    parent, child = family
    assert refuse_changed_inputs(child.path, "stage 'two'")
    change(parent.model_dir / "model.safetensors", "1")  # the same again, later
    assert refuse_changed_inputs(child.path, "stage 'two'")
    (parent.model_dir / "model.safetensors").unlink()
    parent.model_dir.rmdir()
    assert refuse_changed_inputs(child.path, "stage 'two'")


def test_changed_inputs_are_refused_with_the_remedy(
    family: tuple[RunDirectory, RunDirectory],
) -> None:
    parent, child = family
    before = contents(parent.model_dir).hash
    change(parent.model_dir / "model.safetensors", "9")
    after = contents(parent.model_dir).hash
    assert before != after
    with pytest.raises(UserInputError) as caught:
        refuse_changed_inputs(child.path, "stage 'two'")
    assert str(caught.value) == (
        "stage 'two' was made from what has changed since: model.path is the model of "
        f"{parent.path}, which was {before[:8]} when stage 'two' started and is {after[:8]} now. "
        f"It is neither used as it is nor overwritten: delete {child.path} to run it again, or "
        "choose another run.name"
    )
    assert (child.model_dir / "model.safetensors").read_text() == "2"


def test_a_run_without_a_record_is_told_apart(tmp_path: Path) -> None:
    recipe = sft(tmp_path, "old")
    info = {"parents": []}
    RunDirectory.create(tmp_path, "old", recipe_yaml=dump_recipe(recipe), info=info)
    assert not refuse_changed_inputs(tmp_path / "old", "stage 'old'")


def test_another_file_of_a_run_is_an_input_by_what_is_in_it(tmp_path: Path) -> None:
    parent = finish(begin(sft(tmp_path, "one")), "1")
    template = parent.path / "notes" / "t.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    child = begin(sft(tmp_path, "two", f"model.chat_template={template}"))
    change(parent.path / "finished.json", "{}")  # as of a run that came out the same again, later
    assert refuse_changed_inputs(child.path, "stage 'two'")
    change(template, "{{ other }}")
    with pytest.raises(UserInputError, match=r"is the notes/t\.jinja of .*, which was [0-9a-f]{8}"):
        refuse_changed_inputs(child.path, "stage 'two'")


def test_a_model_elsewhere_in_a_run_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the one that `align export` writes, of which its run notes nothing."""
    reads: list[str] = []
    original = outputs.file_hash

    def hashed(path: Path) -> str:
        reads.append(path.name)
        return original(path)

    parent = finish(begin(sft(tmp_path, "one")), "1")
    export = parent.path / "export"
    export.mkdir()
    (export / "model.safetensors").write_text("merged")
    monkeypatch.setattr(outputs, "file_hash", hashed)
    recipe = sft(tmp_path, "two", f"model.path={export}")
    child = begin(recipe)
    assert reads == ["model.safetensors"]
    (entry,) = child.read_info()["inputs"]
    assert (entry["output"], entry["hash"]) == ("export", contents(export).hash)
    reads.clear()
    assert refuse_changed_inputs(child.path, "stage 'two'")
    assert [one.hash for one in find_parents(recipe)] == [entry["hash"]]
    (link,) = trace(child.path).nodes[str(child.path)].parents
    assert (link.state, reads) == ("unchanged", [])
    change(export / "model.safetensors", "merged again")
    with pytest.raises(UserInputError, match="is the export of"):
        refuse_changed_inputs(child.path, "stage 'two'")
    assert find_parents(recipe)[0].hash == contents(export).hash != entry["hash"]


# -- compatibility ----------------------------------------------------------------------------


def parent_of(key: str, output: str = "model", **differing: Any) -> ParentRecord:
    return ParentRecord(key, "runs/p", output, "0", dataclasses.replace(ENCODING, **differing))


@pytest.mark.parametrize("output", ["model", "data", "run", "notes/t.jinja"])
def test_equal_encodings_fit(output: str) -> None:
    check_compatible(ENCODING, [parent_of("model.path", output)])


def test_what_is_not_known_is_not_compared() -> None:
    check_compatible(ENCODING, [parent_of("model.path", tokenizer=None, template=None)])
    check_compatible(ENCODING, [ParentRecord("model.path", "runs/p", "model", "0", None)])
    check_compatible(Encoding(None, None), [parent_of("model.path")])
    check_compatible(ENCODING, [parent_of("x", "run", tokenizer=OTHER)])
    check_compatible(ENCODING, [parent_of("x", "notes/t.jinja", tokenizer=OTHER)])


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        (
            parent_of("model.path", template=OTHER),
            [
                "model.path: the model of runs/p has another chat template (cccccccc) than this "
                "run (bbbbbbbb)",
                "what it learned is tied to the one it was trained with",
                "Set model.chat_template to the same in both",
            ],
        ),
        (
            parent_of("model.path", tokenizer=OTHER, vocab_size=49152),
            ["another tokenizer (cccccccc) than this run (aaaaaaaa), 49152 tokens and not 260;"],
        ),
        (
            parent_of("rewards.0.path", tokenizer=OTHER),
            [
                "rewards.0.path: the reward model of runs/p has another tokenizer",
                "of the same 260 tokens in number",
                "tokens that mean something else",
            ],
        ),
        (
            parent_of("algorithm.critic.path", tokenizer=OTHER, vocab_size=None),
            ["the critic of runs/p has another tokenizer (cccccccc) than this run (aaaaaaaa);"],
        ),
        (
            parent_of("data.path", "data", template=OTHER),
            ["data.path: the data of runs/p has another chat template", "texts were made"],
        ),
    ],
)
def test_a_mismatch_is_refused_with_its_reason(parent: ParentRecord, words: list[str]) -> None:
    with pytest.raises(UserInputError) as caught:
        check_compatible(ENCODING, [parent_of("model.path"), parent])
    assert len(str(caught.value).splitlines()) == 1
    for part in words:
        assert part in str(caught.value)


def test_all_mismatches_are_named_at_once() -> None:
    both = parent_of("model.path", tokenizer=OTHER, template=OTHER)
    with pytest.raises(UserInputError) as caught:
        check_compatible(ENCODING, [both, parent_of("rewards.0.path", template=OTHER)])
    assert len(str(caught.value).splitlines()) == 3


def test_rows_of_another_tokenizer_can_be_copied_out_of_their_run(tmp_path: Path) -> None:
    """As the message says: a reward model of another family learns from the policy's pairs."""
    parent = finish(begin(sft(tmp_path, "one")), "1", data='{"prompt": "a"}\n')
    own = Encoding(OTHER, OTHER)

    def inputs(data: Path) -> tuple[ParentRecord, ...]:
        recipe = sft(tmp_path, "two", f"data={{type: file, path: '{data}'}}")
        return find_parents(recipe)

    with pytest.raises(UserInputError) as caught:
        check_compatible(own, inputs(parent.data))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert f"copy {parent.data} to a place outside of any run, and set data.path to" in line
    copy = tmp_path / "pairs.jsonl"
    copy.write_bytes(parent.data.read_bytes())
    check_compatible(own, inputs(copy))


def test_an_encoding_is_read_from_the_end_of_a_run_or_from_its_start(tmp_path: Path) -> None:
    run = begin(sft(tmp_path, "one"), tokenizer_hash=OTHER)
    assert encoding_of(run.path) == Encoding(OTHER, C)
    finish(run, "1")
    assert encoding_of(run.path) == ENCODING
    unknown = begin(sft(tmp_path, "two"), tokenizer_hash=None, template_hash=None)
    assert encoding_of(unknown.path) is None


# -- pipelines --------------------------------------------------------------------------------

PIPELINE = """
run: {{name: pipe, dir: '{folder}'}}
stages:
  - {{name: first, recipe: tiny/sft}}
  - {{name: aside, recipe: tiny/sft}}
  - name: last
    recipe: tiny/sft
    set: {{model.path: "${{stages.first.model}}"}}
compare: {{tasks: [{{type: held_out_loss}}]}}
"""


class Stages:
    """Stands in for training and evaluation: notes what was asked for, leaves a run's files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.compared: list[tuple[str, str | None]] = []
        self.models: list[ModelConfig] = []
        self.weights: dict[str, str] = {}
        self.hangs = False
        self.error: Exception | None = None
        self.references: list[ModelConfig | None] = []
        monkeypatch.setattr(pipeline_module, "train", self.train)
        monkeypatch.setattr(pipeline_module, "evaluate_model", self.evaluate)
        monkeypatch.setattr(pipeline_module, "write_report", lambda directory: None)
        monkeypatch.setattr(pipeline_module, "check_expectations", lambda directory: None)
        tables = SimpleNamespace(get=lambda *_: self.tables)
        monkeypatch.setattr(pipeline_module, "registry", tables)
        monkeypatch.setattr(pipeline_module, "gc", SimpleNamespace(collect=lambda: None))

    def train(self, recipe: Recipe, **_: Any) -> RunDirectory:
        path = Path(recipe.run.dir) / recipe.run.name
        if (path / "finished.json").is_file():
            return RunDirectory.open(path)
        self.trained.append(recipe.run.name)
        run = begin(recipe)
        return finish(run, self.weights.get(recipe.run.name, recipe.run.name))

    def evaluate(
        self, recipe: Recipe, model: ModelConfig, tasks: Any, *, seed: int, reference: Any
    ) -> dict[str, Any]:
        if self.hangs:
            time.sleep(60)
        if self.error is not None:
            raise self.error
        self.models.append(model)
        self.references.append(reference)
        self.compared.append((model.path, reference and reference.path))
        loss = float(len(self.compared))
        return {task.name or task.type: SimpleNamespace(metrics={"loss": loss}) for task in tasks}

    @staticmethod
    def tables(results: dict[str, Any], folder: Path, task: str, _: Any) -> str:
        (folder / "evals").mkdir(exist_ok=True)
        first = folder / "comparison.json"
        (folder / f"comparison-{task}.json" if first.exists() else first).write_text(task)
        for name, result in results.items():
            for suffix in ("json", "jsonl"):
                text = str(result.metrics["loss"])
                (folder / "evals" / f"{name}-{task}.{suffix}").write_text(text)
        return f"a table of {task}"


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def pipeline(folder: Path, old: str = "", new: str = "") -> PipelineRecipe:
    text = PIPELINE.format(folder=folder)
    assert old in text
    recipe = parse_recipe(text.replace(old, new))
    assert isinstance(recipe, PipelineRecipe)
    return recipe


def remove(run: Path) -> None:
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run.rmdir()


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


# -- what may be asked otherwise of what is there ----------------------------------------------

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
