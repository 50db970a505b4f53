"""Where runs come from: inputs found, changes refused, mismatches explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import ENCODING, OTHER, C, begin, change, finish, sft

from alignment.config import Recipe, dump_recipe, load_recipe
from alignment.runs import lineage, outputs
from alignment.runs.ancestry import trace
from alignment.runs.directory import RunDirectory
from alignment.runs.inputs import (
    ParentRecord,
    check_compatible,
    encoding_of,
    find_parents,
    refuse_changed_inputs,
)
from alignment.runs.outputs import Encoding, contents
from alignment.trainers.run import train
from alignment.types import UserInputError


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What git says is none of these tests' business, and takes it a second."""
    monkeypatch.setattr(lineage, "_git", lambda directory: None)


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


def test_a_run_does_not_start_from_a_model_of_another_template(tmp_path: Path) -> None:
    """In a run, where nothing was pretended."""
    short = ("algorithm={type: sft, steps: 1, samples_per_step: 2}", "expect=[]", "eval.tasks=[]")
    first = train(sft(tmp_path, "one", *short))
    template = tmp_path / "other.jinja"
    own = (first.model_dir / "chat_template.jinja").read_text()
    template.write_text("{# another #}" + own)
    settings = (*short, f"model.path={first.model_dir}", f"model.chat_template={template}")
    with pytest.raises(UserInputError, match="another chat template"):
        train(sft(tmp_path, "two", *settings))
    assert not (tmp_path / "two").exists()


def test_an_encoding_is_read_from_the_end_of_a_run_or_from_its_start(tmp_path: Path) -> None:
    run = begin(sft(tmp_path, "one"), tokenizer_hash=OTHER)
    assert encoding_of(run.path) == Encoding(OTHER, C)
    finish(run, "1")
    assert encoding_of(run.path) == ENCODING
    unknown = begin(sft(tmp_path, "two"), tokenizer_hash=None, template_hash=None)
    assert encoding_of(unknown.path) is None
