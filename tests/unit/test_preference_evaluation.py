"""Task `preference` on policies: in training with every reference, and by align eval."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import drift, made_up_pairs, own_cache, parts_of, recipe_of, run
from tiny_runs import events_of, metrics_of
from tiny_runs import recipe_of as sft_recipe_of
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.config.load import load_recipe
from alignment.config.schema import Recipe
from alignment.modeling.finite import NonFiniteError
from alignment.modeling.policy import PolicyWithReference
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.trainers.dpo import DPOTrainer
from alignment.trainers.evaluation import Evaluator, eval_context, evaluate_model, make_evaluator
from alignment.trainers.run import train
from alignment.types import AlignmentError, Sample, UserInputError

AT_THE_END = "eval={at_start: false, tasks: [{type: preference}]}"
LEARNS = ("algorithm.steps=4", "optim.lr=1e-2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Any:
    with own_cache(tmp_path / "cache"):
        yield


def align(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def margins(folder: Path, stem: str) -> list[float]:
    lines = (folder / "evals" / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["reward"] for line in lines]


# -- in training ------------------------------------------------------------------------------


def test_a_precomputed_reference_gives_the_numbers_of_a_copy(tmp_path: Path) -> None:
    copy = run("dpo", tmp_path / "a", *LEARNS, AT_THE_END)
    once = run("dpo", tmp_path / "b", *LEARNS, AT_THE_END, "model.reference=precomputed")
    found = margins(once.path, "preference-step-000004")
    assert found == pytest.approx(margins(copy.path, "preference-step-000004"), abs=1e-4)
    assert max(map(abs, found)) > 0.01


def test_the_reference_is_the_start_after_a_resumption_too(tmp_path: Path) -> None:
    """Also where it has to be scored again: the weights of the checkpoint come later."""
    settings = (*LEARNS, AT_THE_END, "model.reference=precomputed", "checkpoint={every: 2}")
    whole = run("dpo", tmp_path, *settings)
    expected = margins(whole.path, "preference-step-000004")
    for path in ("finished.json", "checkpoints/step-000004", "evals/preference-step-000004.json"):
        place = whole.path / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    shutil.rmtree(tmp_path / "cache")
    again = run("dpo", tmp_path, *settings)
    assert events_of(again, "resume")[0]["step"] == 2
    assert margins(again.path, "preference-step-000004") == expected


@pytest.mark.parametrize("kind", ["simpo", "cpo", "orpo"])
def test_a_kind_without_a_reference_ranks_by_the_policy_alone(tmp_path: Path, kind: str) -> None:
    context = parts_of(
        "dpo", tmp_path, f"algorithm.loss={{kind: {kind}}}", "model.reference=none", AT_THE_END
    )
    pairs = made_up_pairs(3)
    view = eval_context(context)
    assert view.pair_scores is not None and view.pair_scores_are_logits
    chosen, rejected = view.pair_scores(pairs)

    def score(sample: Sample) -> float:
        (row,) = context.policy.logprobs([sample], 1)
        logprobs = row[torch.tensor(sample.loss_mask)].double()
        mean = float(logprobs.mean())
        odds = mean - float(torch.log(-torch.expm1(torch.tensor(mean))))
        return {"simpo": 2.0 * mean, "cpo": 0.1 * float(logprobs.sum()), "orpo": odds}[kind]

    assert chosen == pytest.approx([score(s) for s in pairs.chosen], abs=1e-4)
    assert rejected == pytest.approx([score(s) for s in pairs.rejected], abs=1e-4)


def test_held_out_scores_are_those_that_training_logs(tmp_path: Path) -> None:
    """Both leave out tokens that do not count."""
    context = parts_of("dpo", tmp_path, "algorithm.pairs_per_step=7")
    pairs = made_up_pairs()
    assert not all(all(s.loss_mask) for s in (*pairs.chosen, *pairs.rejected))
    drift(context)
    view = eval_context(context)
    assert view.pair_scores is not None
    chosen, rejected = view.pair_scores(pairs)
    trainer = DPOTrainer(context)
    samples = [s for pair in zip(pairs.chosen, pairs.rejected, strict=True) for s in pair]
    own = context.policy.logprobs(samples, 4096)
    reference = context.policy.logprobs(samples, 4096, of_reference=True)
    rewards = [
        0.1 * float((a - b)[torch.tensor(s.loss_mask)].sum())
        for a, b, s in zip(own, reference, samples, strict=True)
    ]
    assert trainer.config.loss.beta == 0.1
    assert chosen == pytest.approx(rewards[::2], abs=1e-4)
    assert rejected == pytest.approx(rewards[1::2], abs=1e-4)


def test_other_pairs_than_the_held_out_ones_have_no_precomputed_reference(tmp_path: Path) -> None:
    context = parts_of("dpo", tmp_path, "model.reference=precomputed", AT_THE_END)
    evaluator = make_evaluator(context, tmp_path)
    view = eval_context(context, precomputed=evaluator.precomputed)
    assert view.pair_scores is not None and view.reference_score is None
    assert view.pair_scores(context.held_out.pairs)[0] == pytest.approx([0.0] * 4, abs=1e-5)
    with pytest.raises(Exception, match="6 of 6 completions are none of the held-out pairs"):
        view.pair_scores(made_up_pairs(3))


REFUSED = {
    "preference, none": ("sft", ("eval={tasks: [{type: preference}]}",)),
    "preference, synced": ("dpo", (AT_THE_END, "model.reference={mode: synced, every: 2}")),
    "reward_kl, precomputed": (
        "dpo",
        ("eval={tasks: [{type: reward_kl}]}", "model.reference=precomputed"),
    ),
    "reward_kl, synced": (
        "dpo",
        ("eval={tasks: [{type: reward_kl}]}", "model.reference={mode: synced, every: 2}"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_task_without_its_reference_is_refused_with_the_recipe(tmp_path: Path, case: str) -> None:
    method, settings = REFUSED[case]
    make = sft_recipe_of if method == "sft" else recipe_of
    with pytest.raises(UserInputError, match=r"eval\.tasks\.0: task (preference|reward_kl)"):
        make(method, tmp_path, *settings)


def test_a_loss_without_a_reference_may_be_evaluated_beside_a_synced_one(tmp_path: Path) -> None:
    recipe_of(
        "dpo",
        tmp_path,
        AT_THE_END,
        "model.reference={mode: synced, every: 2}",
        "algorithm.loss.kind=cpo",
    )


# -- an evaluation that fails -----------------------------------------------------------------


def test_a_failing_evaluation_loses_nothing_of_the_model(tmp_path: Path) -> None:
    """The step before it is saved; going on finishes the run without it."""
    # No pair is held out, which shows when the task runs.
    settings = (AT_THE_END, "data.held_out=0", "checkpoint={every: 0}", "algorithm.steps=1")
    with pytest.raises(UserInputError, match="no held-out preference pairs") as failed:
        run("dpo", tmp_path, *settings)
    assert "step-000001 is the last checkpoint; to go on" in "".join(failed.value.__notes__)
    directory = RunDirectory.open(tmp_path / "dpo")
    assert [step for step, _ in list_checkpoints(directory.checkpoints_dir)] == [1]
    assert metrics_of(directory)[-1]["step"] == 1 and "loss" in metrics_of(directory)[-1]
    (event,) = events_of(directory, "error")
    assert (event["step"], event["phase"]) == (1, "evaluation")
    again = run("dpo", tmp_path, *settings)
    assert (again.model_dir / "model.safetensors").is_file()


def nan_logprobs(_: Evaluator, __: int) -> dict[str, float]:
    raise NonFiniteError("a log-probability is nan")


def nan_weights(evaluator: Evaluator, _: int) -> dict[str, float]:
    """As where a task finds that its metrics are none."""
    next(evaluator.context.policy.model.parameters()).data.fill_(math.nan)
    raise AlignmentError("a margin is nan")


@pytest.mark.parametrize("broken", [nan_logprobs, nan_weights])
def test_a_model_that_gives_no_numbers_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    monkeypatch.setattr(Evaluator, "_run", broken)
    with pytest.raises(AlignmentError, match="is nan"):
        run("dpo", tmp_path, AT_THE_END, "checkpoint={every: 0}")
    assert not list_checkpoints(RunDirectory.open(tmp_path / "dpo").checkpoints_dir)


def test_what_fails_while_ranks_work_together_is_not_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for this rank in there, and not where ranks agree on what failed."""

    @contextmanager
    def gathered(*_: object, **__: object) -> Iterator[None]:
        raise AlignmentError("no room for the whole weights")
        yield

    monkeypatch.setattr(PolicyWithReference, "gathered", gathered)
    with pytest.raises(AlignmentError, match="no room"):
        run("dpo", tmp_path, AT_THE_END, "checkpoint={every: 0}")
    assert not list_checkpoints(RunDirectory.open(tmp_path / "dpo").checkpoints_dir)


# -- align eval -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run("dpo", tmp_path_factory.mktemp("runs"), *LEARNS, AT_THE_END)


def test_a_run_is_compared_with_where_it_started(trained: RunDirectory) -> None:
    task = ("--task", "preference", "--overwrite")
    assert align("eval", trained.path, *task).exit_code == 0
    found = margins(trained.path, "preference,seed=0-step-000004")
    in_training = margins(trained.path, "preference-step-000004")
    assert found == pytest.approx(in_training, abs=1e-4)
    assert max(map(abs, in_training)) > 0.01
    # Its own model as the reference: no margin is left, and the name says what was asked for.
    own = align("eval", trained.path, *task, "--reference", trained.path, "--set", "name=own")
    assert own.exit_code == 0, own.output
    (path,) = trained.evals_dir.glob("own,*-step-000004.json")
    assert path.name != "own,seed=0-step-000004.json"
    assert margins(trained.path, path.stem) == pytest.approx([0.0] * 4, abs=1e-5)


def test_a_model_that_is_no_run_needs_a_reference_named(trained: RunDirectory) -> None:
    command = ("eval", trained.model_dir, "--recipe", trained.recipe, "--task", "preference")
    refused = align(*command)
    assert refused.exit_code == 2 and "--reference MODEL" in refused.output
    shown = align(*command, "--reference", "tiny-random")
    assert shown.exit_code == 0, shown.output


def test_a_reward_model_is_compared_with_nothing(tmp_path: Path) -> None:
    """Also where its recipe names a reference, which no reward model needs."""
    settings = ("model.reference=frozen_copy", "algorithm.steps=1", "expect=[]")
    folder = ("run.name=rm", f"run.dir={tmp_path}")
    recipe = load_recipe("tiny/reward_model", [*settings, *folder])
    assert isinstance(recipe, Recipe)
    train(recipe)
    result = align("eval", tmp_path / "rm", "--task", "preference", "--overwrite")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("method", "trained_on", "said"),
    [
        ("reward_model", "data.style=plain", "set data.style: plain"),
        ("process_reward_model", "algorithm.separator=' ## '", "set algorithm.separator"),
    ],
)
def test_a_scalar_model_is_not_shown_what_it_never_read(
    tmp_path: Path, method: str, trained_on: str, said: str
) -> None:
    settings = (f"run.dir={tmp_path}", "run.name=rm", "algorithm.steps=1", "expect=[]")
    recipe = load_recipe(f"tiny/{method}", [*settings, trained_on])
    assert isinstance(recipe, Recipe)
    train(recipe)
    task = ("--task", recipe.eval.tasks[0].type, "--overwrite")
    assert align("eval", tmp_path / "rm", *task).exit_code == 0
    refused = align("eval", tmp_path / "rm", *task, "--recipe", f"tiny/{method}")
    assert refused.exit_code == 2
    assert said in " ".join(refused.output.split())


def test_a_policy_is_not_evaluated_as_a_reward_model(trained: RunDirectory) -> None:
    recipe = ("--recipe", "tiny/reward_model")
    refused = align("eval", trained.path, "--task", "preference", *recipe)
    assert refused.exit_code == 2 and "give a recipe of the same kind" in refused.output


def test_rewards_against_kl_are_measured_from_where_the_run_started(
    trained: RunDirectory, tmp_path: Path
) -> None:
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(
        "run: {name: graded}\nmodel: {path: tiny-random, dtype: float32}\n"
        "data: {type: arithmetic, operation: add, operands: 2, low: 1, high: 9, held_out: 2}\n"
        "algorithm: {type: grpo, steps: 1, prompts_per_step: 2, group_size: 2}\n"
        "rollout: {max_new_tokens: 4}\nrewards: [{type: 'tiny_runs:even_tokens'}]\n"
        "optim: {lr: 1.0e-3}\n"
    )
    options = ("--recipe", recipe, "--task", "reward_kl", "--out", tmp_path / "out")
    result = align("eval", trained.path, *options, "--samples", "2")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out" / "evals").glob("reward_kl,*.json")
    assert json.loads(path.read_text())["metrics"]["kl"] != 0.0


def test_a_reference_with_another_tokenizer_is_refused(
    trained: RunDirectory, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.model_dir, other)
    tokenizer: Any = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    refused = align("eval", trained.path, "--task", "preference", "--reference", other, "--seed", 5)
    assert refused.exit_code == 2
    assert "has another tokenizer than the model" in refused.output


def test_a_model_is_loaded_as_the_recipe_says_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(recipe: Any) -> Any:
        raise UserInputError(repr([recipe.model.path, recipe.model.revision, recipe.model.dtype]))

    monkeypatch.setattr("alignment.trainers.evaluation.load_parts", seen)
    data = recipe_of("dpo", tmp_path, "model.revision=theirs")
    named = recipe_of("dpo", tmp_path, "model.revision=own", "model.dtype=bfloat16").model
    with pytest.raises(UserInputError, match=r"\['tiny-random', 'own', 'float32'\]"):
        evaluate_model(data, named, [], seed=0)
