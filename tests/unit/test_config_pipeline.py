"""Pipelines: stages checked before the first one runs, references filled in as they finish."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

from alignment import registry
from alignment.config import (
    PipelineRecipe,
    Recipe,
    describe_counts,
    dump_recipe,
    load_recipe,
    load_stage,
)
from alignment.config.load import dump_making, load_making, parse_recipe
from alignment.config.methods.base import Needs
from alignment.config.methods.sft import SFTConfig
from alignment.config.pipeline import compared_models, makes_policy
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


# -- what stages make, and what is compared -----------------------------------------------------

MADE = """\
run: {name: t}
stages:
  - {name: maker, recipe: parts/maker.yaml}
  - {name: sft, recipe: parts/sft.yaml, set: {data.path: "${stages.maker.data}"}}
  - {name: rm, recipe: parts/scalar.yaml, set: {model.path: "${stages.sft.model}"}}
  - name: rl
    recipe: parts/grpo.yaml
    set: {model.path: "${stages.sft.model}"}
compare:
  tasks: [{type: quiz}]
"""


@pytest.fixture
def with_makers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline with a stage that makes data alone, and one that makes a reward model."""

    def method(name: str, needs: Needs) -> Any:
        class Config(SFTConfig):
            NEEDS: ClassVar[Needs] = needs
            type: Any

        return types.SimpleNamespace(Config=Config)

    trainers = {
        "maker": method("maker", Needs(data="samples", makes="data", reference="never")),
        "scalar": method("scalar", Needs(data="samples", model="scalar", reference="never")),
    }
    monkeypatch.setitem(registry._registered, "trainer", trainers)
    for name in trainers:
        text = SFT.replace("type: sft", f"type: {name}")
        (folder / "parts" / f"{name}.yaml").write_text(text)
    (folder / "two.yaml").write_text(MADE)
    return folder


def recipes_of(pipeline: PipelineRecipe) -> dict[str, Recipe]:
    return {stage.name: load_stage(pipeline, stage.name) for stage in pipeline.stages}


def test_a_stage_takes_the_data_that_an_earlier_one_made(with_makers: Path) -> None:
    pipeline = load(with_makers)
    stage = load_stage(pipeline, "sft", {"maker": {"data": "/made/data.jsonl", "run": "/made"}})
    assert stage.data.options["path"] == "/made/data.jsonl"


def test_an_output_that_a_stage_did_not_make_is_an_error(with_makers: Path) -> None:
    with pytest.raises(UserInputError, match=r"stage 'maker' made no data; it made run, model"):
        load_stage(load(with_makers), "sft", {"maker": {"run": "/made", "model": "/made/model"}})


def test_base_and_every_stage_that_trains_a_policy_are_compared(with_makers: Path) -> None:
    pipeline = load(with_makers)
    recipes = recipes_of(pipeline)
    made = {name: makes_policy(recipe) for name, recipe in recipes.items()}
    assert made == {"maker": False, "sft": True, "rm": False, "rl": True}
    assert compared_models(pipeline, recipes) == ("base", "sft", "rl")
    chosen = load(with_makers, "compare.models=[rl, base]")
    assert compared_models(chosen, recipes) == ("rl", "base")
    assert chosen.compare is not None
    assert chosen.compare.reference is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.set.model.path=${stages.maker.model}", "'maker' makes no model; write $"),
        ("stages.rm.set.data.path=${stages.sft.data}", "'sft' makes no data; write ${stages.sft."),
        ("stages.rl.set.model.path=${stages.rm.model}", "'rm' makes a reward model, which is no"),
        ("compare.models=[sft, rm]", "compare.models.1: stage 'rm' trains no policy that could"),
        ("compare.models=[stf]", "no stage is called 'stf'; did you mean 'sft'? there are base, "),
        ("compare.models=[sft, base, sft]", "compare.models.2: 'sft' is named twice; keep one"),
        ("compare.models=[]", "compare.models: names nothing to compare; leave it out"),
        ("compare.reference=${stages.stf.model}", "compare.reference: ${stages.stf.model}: no ear"),
        ("compare.reference=${stages.rm.model}", "stage 'rm' makes no policy to measure from"),
        ("stages.sft.name=base", "a stage is called 'base', as the model that the first one"),
    ],
)
def test_a_mistake_about_what_stages_make(with_makers: Path, override: str, message: str) -> None:
    with pytest.raises(UserInputError) as caught:
        load(with_makers, override)
    assert message in str(caught.value)


def test_a_comparison_needs_a_policy(with_makers: Path) -> None:
    head, _, _ = MADE.partition("  - {name: sft")
    (with_makers / "two.yaml").write_text(head + "compare: {tasks: [{type: quiz}]}\n")
    with pytest.raises(UserInputError, match="compare: no stage trains a policy, so there is no"):
        load(with_makers)


def test_a_model_of_rewards_may_be_anything_but_a_start(with_makers: Path) -> None:
    options = ["stages.rl.set.data.path=${stages.rm.model}", "compare.reference=${stages.rl.model}"]
    assert load(with_makers, *options).stages[3].set["data.path"] == "${stages.rm.model}"


# -- mistakes in the comparison, known before a stage has run -----------------------------------


class Choosy:
    """A task that wants a reward called `best`, from four rows and a reference."""

    def check_needs(
        self, *, rewards: list[str], held_out: int, reference: bool, ranks_alone: bool
    ) -> None:
        if (rewards, held_out, reference) != (["best"], 4, True):
            raise UserInputError(f"wants more than {rewards}, {held_out}, {reference}")


def choosy(low: int = 0, high: int = 1) -> Choosy:
    if low > high:
        raise UserInputError(f"low {low} is above high {high}")
    return Choosy()


CHOOSY = ["compare.tasks=[{type: choosy}]", "compare.reference=${stages.sft.model}"]
SERVED = ["stages.rl.set.rewards=[{type: good, name: best}]", "stages.rl.set.data.held_out=4"]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "task", {"quiz": quiz, "choosy": choosy})


@pytest.mark.usefixtures("tasks")
def test_a_comparisons_tasks_are_made_when_the_pipeline_is_read(folder: Path) -> None:
    load(folder, *CHOOSY, *SERVED)
    with pytest.raises(UserInputError, match=r"compare\.tasks\.0: low 2 is above high 1"):
        load(folder, *SERVED, "compare.tasks=[{type: choosy, low: 2}]")


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([*CHOOSY, SERVED[0]], "['best'], 0, True"),
        ([*CHOOSY, SERVED[1]], "['good'], 4, True"),
        ([CHOOSY[0], *SERVED], "['best'], 4, False"),
    ],
)
def test_a_task_is_told_what_the_stage_that_serves_it_has(
    folder: Path, overrides: list[str], found: str
) -> None:
    with pytest.raises(UserInputError) as caught:
        load(folder, *overrides)
    message = f"wants more than {found} (its data and rewards are those of stage 'rl')"
    assert f"compare.tasks.0: {message}" in str(caught.value)


def test_expectations_of_no_comparison_are_refused(folder: Path) -> None:
    with pytest.raises(UserInputError, match="expect: there is no comparison whose metrics"):
        load(folder, "compare=null", "expect=[a > 0]")
    load(folder, "compare=null")
    with pytest.raises(UserInputError, match=r"compare\.tasks: names no task to compare on"):
        load(folder, "compare.tasks=[]")


def test_what_a_run_makes_is_told_from_what_is_asked_of_it(folder: Path) -> None:
    asked = ["compare.seed=3", "expect=[a > 0]", "stages.rl.set.expect=[b > 1]"]
    whole, other = load(folder), load(folder, *asked)
    assert dump_recipe(whole) != dump_recipe(other)
    assert dump_making(whole) == dump_making(other)
    assert dump_making(whole) != dump_making(load(folder, "stages.rl.set.optim.lr=1"))
    path = folder / "stored.yaml"
    path.write_text(dump_recipe(other).replace("type: quiz", "type: gone"))
    assert load_making(path) == dump_making(whole)
    path.write_text(SFT + "expect: ['a > 0', nonsense]\n")
    assert load_making(path) == dump_making(load_stage(whole, "sft")).replace(
        "name: sft", "name: own"
    ).replace("seed: 7", "seed: 0").replace("dir: out/two/stages", "dir: runs")
