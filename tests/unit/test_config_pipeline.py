"""Pipelines: stages checked before the first one runs, references filled in as they finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignment import registry
from alignment.config import PipelineRecipe, describe_counts, dump_recipe, load_recipe, load_stage
from alignment.config.load import parse_recipe
from alignment.types import UserInputError

SFT = """\
run: {name: own}
model: {path: base}
data: {type: toy, size: 5}
algorithm: {type: sft, steps: 10, samples_per_step: 4}
optim: {lr: 1e-4}
"""
GRPO = """\
run: {name: own, seed: 3}
model: {path: base, lora: {rank: 4}}
data: {type: toy, size: 5}
algorithm: {type: grpo, steps: 5, prompts_per_step: 2, group_size: 4}
rollout: {max_new_tokens: 48}
rewards: [{type: good}]
optim: {lr: 1e-4}
"""
PIPELINE = """\
run: {name: two, seed: 7, dir: out}
stages:
  - name: sft
    recipe: parts/sft.yaml
  - name: rl
    recipe: parts/grpo.yaml
    set:
      model.path: "${stages.sft.model}"
      optim.lr: 3e-5
compare:
  tasks: [{type: quiz}]
"""


class Good: ...


def toy(size: int, path: str = "") -> None: ...


def quiz() -> None: ...


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "reward", {"good": Good})
    monkeypatch.setitem(registry._registered, "source", {"toy": toy})
    monkeypatch.setitem(registry._registered, "task", {"quiz": quiz})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "sft.yaml").write_text(SFT)
    (tmp_path / "parts" / "grpo.yaml").write_text(GRPO)
    (tmp_path / "two.yaml").write_text(PIPELINE)
    return tmp_path


def load(folder: Path, *overrides: str) -> PipelineRecipe:
    pipeline = load_recipe(folder / "two.yaml", overrides)
    assert isinstance(pipeline, PipelineRecipe)
    return pipeline


def refusal(folder: Path, old: str, new: str) -> str:
    assert old in PIPELINE
    (folder / "two.yaml").write_text(PIPELINE.replace(old, new, 1))
    with pytest.raises(UserInputError) as caught:
        load(folder)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_stage_takes_what_an_earlier_one_made(folder: Path) -> None:
    pipeline = load(folder)
    stage = load_stage(pipeline, "rl", {"sft": {"model": "/made/model", "run": "/made"}})
    assert stage.model.path == "/made/model"
    assert stage.optim.lr == 3e-5
    assert stage.model.reference.mode == "adapter_off"


def test_stages_live_in_the_pipelines_folder_under_its_seed(folder: Path) -> None:
    stage = load_stage(load(folder), "rl")
    assert (stage.run.dir, stage.run.name, stage.run.seed) == ("out/two/stages", "rl", 7)
    assert stage.model.path == "${stages.sft.model}"
    own = load_stage(load(folder, "stages.rl.set.run.seed=9"), "rl")
    assert own.run.seed == 9


def test_an_output_that_is_not_there_yet_is_an_error(folder: Path) -> None:
    with pytest.raises(UserInputError, match=r"\$\{stages.sft.model\}: there is no such output"):
        load_stage(load(folder), "rl", {})
    with pytest.raises(UserInputError, match="no stage 'dpo'; it has sft, rl"):
        load_stage(load(folder), "dpo")


def test_overrides_reach_into_stages_by_name(folder: Path) -> None:
    pipeline = load(folder, "stages.rl.set.optim.lr=1e-6", "stages.0.set.algorithm.steps=3")
    assert load_stage(pipeline, "rl").optim.lr == 1e-6
    assert load_stage(pipeline, "rl").model.path == "${stages.sft.model}"
    sft: Any = load_stage(pipeline, "sft")
    assert sft.algorithm.steps == 3


def test_a_pipeline_round_trips_from_any_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    pipeline = load_recipe("two.yaml")
    text = dump_recipe(pipeline)
    monkeypatch.chdir("/")
    again = parse_recipe(text)
    assert again == pipeline
    assert dump_recipe(again) == text


def test_the_arithmetic_of_every_stage(folder: Path) -> None:
    lines = describe_counts(load(folder))
    assert lines[0] == "sft: 4 samples a step, 1 update a step; 10 steps = 40 samples"
    assert lines[1].startswith("rl: 2 prompts x 4 completions = 8 samples a step")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "${stages.sft.model}",
            "${stages.stf.model}",
            "two.yaml:8: stages.1.set.model.path: ${stages.stf.model}: no earlier stage is called "
            "'stf'; did you mean 'sft'? earlier stages: sft",
        ),
        (
            "${stages.sft.model}",
            "${stages.sft.modle}",
            "${stages.sft.modle}: a stage has no output 'modle'; did you mean 'model'?",
        ),
        (
            "${stages.sft.model}",
            "${stages.rl.model}",
            "${stages.rl.model} refers to the stage itself; only earlier stages have outputs",
        ),
        (
            "${stages.sft.model}",
            "${sft}",
            "${sft} is not of the form ${stages.NAME.model}",
        ),
        ("name: rl", "name: sft", "stages.1.name: another stage is called 'sft'; rename one"),
        (
            "optim.lr: 3e-5",
            "optim.rl: 3e-5",
            "stage 'rl' of two.yaml: two.yaml:9: optim.rl: unknown key; did you mean 'lr'? ",
        ),
        (
            "parts/grpo.yaml",
            "parts/gropo.yaml",
            "stage 'rl' of two.yaml: there is no recipe file 'parts/gropo.yaml'",
        ),
        ("parts/grpo.yaml", "two.yaml", "is itself a pipeline; name a recipe of one run"),
        ("  - name: sft\n    recipe", "  - recipe", "two.yaml:3: stages.0.name: required, but mis"),
        ("stages:\n  - name: sft", "stages: []\nx:\n  - name: sft", "x: unknown key"),
        ("recipe: parts/sft.yaml", "recpie: parts/sft.yaml", "unknown key; did you mean 'recipe'?"),
        (
            "{type: quiz}",
            "{type: quizz}",
            "compare.tasks.0.type: unknown task 'quizz'; did you mea",
        ),
    ],
)
def test_a_mistake_in_a_pipeline(folder: Path, old: str, new: str, message: str) -> None:
    assert message in refusal(folder, old, new)


def test_a_pipeline_without_stages_is_refused(folder: Path) -> None:
    (folder / "two.yaml").write_text("run: {name: t}\nstages: []\n")
    with pytest.raises(UserInputError, match="stages: a pipeline needs at least one stage"):
        load(folder)


def test_a_mistake_inside_a_stages_file_names_that_file(folder: Path) -> None:
    (folder / "parts" / "grpo.yaml").write_text(GRPO.replace("group_size", "grup_size"))
    with pytest.raises(UserInputError) as caught:
        load(folder)
    assert "grpo.yaml:4: algorithm.grup_size: unknown key; did you mean 'group_size'?" in str(
        caught.value
    )
