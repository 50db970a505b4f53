"""`align check` looks for the files and folders that a recipe names, and `align train` says why it
refuses in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.cli.check import describe
from alignment.config import PipelineRecipe, load_recipe
from alignment.trainers.local_paths import check_pipeline_paths
from alignment.types import UserInputError
from evals.preference_task import preference
from evals.process_task import process
from evals.reward_kl_task import reward_kl
from evals.tasks import held_out_loss, verifiable


def align(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("sft", "data={type: file, path: no.jsonl}", "data.path: data file 'no.jsonl' does not"),
        ("sft", "model.path=/nowhere", "model.path: model path '/nowhere': no such directory"),
        ("sft", "model.path=../a/b", "model.path: model path '../a/b': no such directory"),
        ("sft", "model.chat_template=t.jinja", "model.chat_template: chat template 't.jinja' is"),
        ("ppo", "algorithm.critic.path=/nowhere", "algorithm.critic.path: model path '/nowhere'"),
        (
            "grpo",
            "rewards=[{type: regex, pattern: a}, {type: reward_model, path: ./none}]",
            "rewards.1.path: model path './none': no such directory",
        ),
        (
            "constitutional",
            "algorithm.judge={kind: local, path: /nowhere}",
            "algorithm.judge.path: model path '/nowhere': no such directory",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_its_key(recipe: str, override: str, message: str) -> None:
    for command in ("check", "train"):
        result = align(command, f"tiny/{recipe}", override)
        assert result.exit_code == 2, (command, result.output)
        assert f"align: {message}" in result.stderr


@pytest.mark.parametrize("path", ["smollm2-135m-instruct", "org/Name-1.7B", "name"])
def test_catalogue_names_and_hub_ids_are_not_looked_for(path: str) -> None:
    result = align("check", "tiny/sft", f"model.path={path}")
    assert result.exit_code == 0, result.output
    assert "caution" not in result.stdout


def test_what_another_recipe_makes_is_a_caution() -> None:
    result = align("check", "smollm2-135m/sentiment-ppo")
    assert result.exit_code == 0, result.output
    cautions = [line for line in result.stdout.splitlines() if line.startswith("caution")]
    keys = ("model.path", "algorithm.critic.path", "rewards.0.path")
    for caution, key in zip(cautions, keys, strict=True):
        assert caution.split()[1] == f"{key}:"
        assert caution.endswith("run the recipe that makes it first")


def test_the_folder_of_runs_may_be_another_one(tmp_path: Path) -> None:
    made = ("tiny/sft", f"model.path={tmp_path}/mine/a/model")
    assert align("check", *made).exit_code == 2
    result = align("check", *made, f"run.dir={tmp_path}/mine")
    assert result.exit_code == 0, result.output
    assert "caution" in result.stdout


def test_what_an_earlier_stage_makes_is_not_looked_for() -> None:
    result = align("check", "smollm2-135m/rlhf-sentiment")
    assert result.exit_code == 0, result.output
    assert "caution" not in result.stdout


REFERENCE = "compare.reference=runs/x/modle"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (REFERENCE, "compare.reference: model path 'runs/x/modle': no such directory"),
        (
            "compare.tasks=[{type: reward_kl, select_by: proxy, gold: glod}]",
            "gold is 'glod', and the run's rewards are proxy, gold; name one of them (its data and "
            "rewards are those of stage 'ppo')",
        ),
        (
            "compare.tasks=[{type: reward_kl, samples: 8, best_of: [16], select_by: proxy}]",
            "best of 16 needs 1 <= n <= samples, and samples is 8",
        ),
        ("compare.reference=null", "measures the distance from a reference and there is none"),
        ("stages.ppo.set.data.held_out=0", "task 'reward_kl' has no held-out prompts"),
        ("stages.rm.set.data.path=no.jsonl", "stage 'rm': data.path: data file 'no.jsonl' does"),
    ],
)
def test_a_mistake_in_a_comparison_or_a_later_stage_is_refused_before_the_first_runs(
    tmp_path: Path, override: str, message: str
) -> None:
    for command in ("check", "train"):
        result = align(command, "tiny/rlhf", override)
        assert result.exit_code == 2, (command, result.output)
        assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_reference_that_is_there_is_accepted_and_shown(tmp_path: Path) -> None:
    (tmp_path / "runs" / "x" / "modle").mkdir(parents=True)
    result = align("check", "tiny/rlhf", REFERENCE)
    assert result.exit_code == 0, result.output
    assert "reference  runs/x/modle" in result.stdout


def test_what_a_finished_stage_started_from_may_be_gone(tmp_path: Path) -> None:
    gone = ("tiny/rlhf", "stages.sft.set.data={type: file, path: gone.jsonl}")
    pipeline = load_recipe(*gone[:1], gone[1:])
    assert isinstance(pipeline, PipelineRecipe)
    with pytest.raises(UserInputError, match=r"stage 'sft': data\.path: data file 'gone\.jsonl'"):
        check_pipeline_paths(pipeline)
    stage = tmp_path / "runs" / "tiny-rlhf" / "stages" / "sft"
    stage.mkdir(parents=True)
    (stage / "finished.json").write_text("{}")
    check_pipeline_paths(pipeline)
    assert "a valid pipeline of" in describe(pipeline)


def test_a_task_that_grades_needs_prompts_and_rewards() -> None:
    for task in (verifiable(), reward_kl()):
        task.check_needs(rewards=["a"], held_out=1, reference=True, ranks_alone=False)
        with pytest.raises(UserInputError, match="grades completions, and there are no rewards"):
            task.check_needs(rewards=[], held_out=1, reference=True, ranks_alone=False)
        with pytest.raises(UserInputError, match="has no held-out prompts"):
            task.check_needs(rewards=["a"], held_out=0, reference=True, ranks_alone=False)
    with pytest.raises(UserInputError, match="best_of needs select_by where there are several"):
        reward_kl(best_of=[2]).check_needs(
            rewards=["a", "b"], held_out=1, reference=True, ranks_alone=False
        )


def test_tasks_say_before_the_stages_run_what_they_would_lack() -> None:
    there: dict[str, Any] = {"rewards": [], "held_out": 1, "reference": True, "ranks_alone": False}
    preference().check_needs(**there)
    preference().check_needs(**there | {"reference": False, "ranks_alone": True})
    held_out_loss().check_needs(**there)
    with pytest.raises(UserInputError, match=r"a pipeline a compare\.reference"):
        preference().check_needs(**there | {"reference": False})
    with pytest.raises(UserInputError, match="no held-out preference pairs"):
        preference().check_needs(**there | {"held_out": 0})
    with pytest.raises(UserInputError, match="no held-out samples"):
        held_out_loss().check_needs(**there | {"held_out": 0})
    with pytest.raises(UserInputError, match="needs a model that scores steps"):
        process().check_needs(**there)
