"""Training on what another run sampled: the same weights without an engine, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from replay_runs import SAMPLING, change_row, forbid, made_once, recipe_of, run
from safetensors.torch import load_file
from tiny_runs import events_of, metrics_of, rollouts_of, steps_of
from typer.testing import CliRunner

from alignment.cli import app
from alignment.config.load import dump_recipe
from alignment.rollout.native import NativeEngine
from alignment.runs.ancestry import trace
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.samples import rollout_path
from alignment.trainers.grpo import GRPOTrainer
from alignment.trainers.replay import replay
from alignment.types import UserInputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    return made_once(tmp_path_factory)


def assert_same_run(one: RunDirectory, other: RunDirectory) -> None:
    """Bit for bit: metrics (but for times), samples, the last checkpoint, and what was made."""
    assert steps_of(one) == steps_of(other)
    assert rollouts_of(one) == rollouts_of(other)
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (one, other))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()
    if other.data.exists():
        assert one.data.read_bytes() == other.data.read_bytes()
    else:
        weights = [load_file(r.model_dir / "model.safetensors") for r in (one, other)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("name", SAMPLING)
def test_training_on_a_runs_own_samples_gives_that_run_again(
    made: Callable[[str], RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    done = made(name)
    forbid(monkeypatch)
    again = run(name, tmp_path, rollouts_from=done.path)
    assert_same_run(again, done)
    if name == "refill":  # a run like any other: its steps can be made again, from its own samples
        assert replay(again.path, 5).differing == ()


def test_evaluations_sample_all_the_same(
    made: Callable[[str], RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = "eval={every: 2, tasks: [{type: verifiable, samples: 1, prompts: 2}]}"
    calls: list[int] = []
    original = NativeEngine.generate

    def counted(self: NativeEngine, prompts: Any, params: Any) -> Any:
        calls.append(params.step)
        return original(self, prompts, params)

    monkeypatch.setattr(NativeEngine, "generate", counted)
    whole = run("grpo", tmp_path / "whole", task)
    assert set(calls) == {0, 1, 2, 3, 4, 5}  # 0 is the evaluations'
    calls.clear()
    again = run("grpo", tmp_path / "again", task, rollouts_from=whole.path)
    assert set(calls) == {0}
    evaluated = [
        [{k: v for k, v in r.items() if k.startswith("eval/")} for r in metrics_of(one)]
        for one in (again, whole)
    ]
    assert evaluated[0] == evaluated[1]
    assert evaluated[0][1]
    assert_same_run(again, whole)


def test_another_learning_rate_is_allowed_and_drifts(
    made: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    """The completions are another policy's then: their gap is measured and stops nothing."""
    done = made("grpo")
    settings = ("optim.lr=1e-1", "limits.logprob_gap=0.01", "optim.schedule=constant")
    other = run("grpo", tmp_path, *settings, rollouts_from=done.path)
    gaps = [record["engine/logprob_gap"] for record in metrics_of(other)]
    assert gaps[0] < 1e-5
    assert min(gaps[2:]) > 0.01
    assert not events_of(other, "warning")
    tokens = [[row["completion_ids"] for row in rows] for rows in rollouts_of(other)]
    assert tokens == [[row["completion_ids"] for row in rows] for rows in rollouts_of(done)]


def test_another_method_may_learn_from_them(
    made: Callable[[str], RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = made("online_dpo")
    forbid(monkeypatch)
    again = run("raft", tmp_path, rollouts_from=done.path)
    rewards = [[[row["reward"] for row in rows] for rows in rollouts_of(r)] for r in (again, done)]
    assert rewards[0] == rewards[1]


# -- where they came from ---------------------------------------------------------------------


def test_the_source_is_on_record(made: Callable[[str], RunDirectory], tmp_path: Path) -> None:
    done = made("raft")
    again = run("raft", tmp_path, rollouts_from=done.path)
    info = again.read_info()
    assert info["rollouts_from"] == str(done.path)
    assert info["parents"] == [str(done.path)]
    links = trace(again.path).nodes[str(again.path.resolve())].parents
    (link,) = [one for one in links if one.key == "--rollouts-from"]
    assert (link.target, link.state) == (str(done.path.resolve()), "unchanged")
    assert "rollouts_from" not in done.read_info()


def test_an_interrupted_run_goes_on_with_its_own_source(
    made: Callable[[str], RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    done = made("grpo")
    original = GRPOTrainer.step

    def failing(self: GRPOTrainer, step: int) -> Any:
        if step == 4:
            raise Interrupted
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "step", failing)
        with pytest.raises(Interrupted):
            run("grpo", tmp_path, rollouts_from=done.path)
    with pytest.raises(UserInputError, match=rf"to go on, give --rollouts-from {done.path}"):
        run("grpo", tmp_path)
    other = made("raft").path
    with pytest.raises(UserInputError, match=r"is trained on the rollouts of .*made\w*/grpo"):
        run("grpo", tmp_path, rollouts_from=other)
    forbid(monkeypatch)
    assert_same_run(run("grpo", tmp_path, rollouts_from=done.path), done)


def test_a_run_that_samples_does_not_go_on_with_recorded_ones(
    made: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    whole = RunDirectory(Path(shutil.copytree(made("grpo").path, tmp_path / "grpo")))
    (whole.path / "finished.json").unlink()
    # The copy is in another run.dir, which its recipe has to say.
    whole.recipe.write_text(dump_recipe(recipe_of("grpo", tmp_path)), "utf-8")
    with pytest.raises(UserInputError, match="samples its own completions; leave out --rollouts-"):
        run("grpo", tmp_path, rollouts_from=made("grpo").path)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("algorithm.prompts_per_step=2",), "algorithm.prompts_per_step is 2 .* and 4 in"),
        (("algorithm.dynamic_sampling=skip",), "dynamic_sampling is skip in the recipe and off in"),
        (("algorithm.group_size=2",), "has 4 completions of each prompt, and 2 are wanted"),
        (("algorithm.steps=6",), "has no samples of step 6, and 6 steps are to be trained"),
        (("algorithm.steps=8",), r"no samples of step 6 \(and of 2 more steps\), and 8 steps"),
        (("run.seed=1",), r"prompt 0 in step 1 of .* has other tokens than the one drawn here"),
        (("data.low=2",), "prompt 0 in step 1 of .* has other tokens than the one drawn here"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    made: Callable[[str], RunDirectory], tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserInputError, match=said):
        run("grpo", tmp_path, *settings, rollouts_from=made("grpo").path)
    assert not (tmp_path / "grpo").exists()


def test_a_step_that_is_gone_is_named(made: Callable[[str], RunDirectory], tmp_path: Path) -> None:
    source = RunDirectory(Path(shutil.copytree(made("raft").path, tmp_path / "source")))
    rollout_path(source.rollouts_dir, 3).unlink()
    with pytest.raises(UserInputError, match="has no samples of step 3, and 5 steps"):
        run("raft", tmp_path, rollouts_from=source.path)
    assert run("raft", tmp_path, "algorithm.steps=2", rollouts_from=source.path).model_dir.is_dir()


def test_another_tokenizer_is_refused(made: Callable[[str], RunDirectory], tmp_path: Path) -> None:
    source = RunDirectory(Path(shutil.copytree(made("raft").path, tmp_path / "source")))
    (source.path / "finished.json").unlink()
    info = source.read_info() | {"tokenizer_hash": "ab" * 32}
    source.info.write_text(json.dumps(info), "utf-8")
    with pytest.raises(UserInputError, match=r"sampled with another tokenizer \(abababab\)"):
        run("raft", tmp_path, rollouts_from=source.path)
    assert not (tmp_path / "raft").exists()


def test_other_prompts_in_the_record_are_refused(
    made: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    source = RunDirectory(Path(shutil.copytree(made("raft").path, tmp_path / "source")))
    change_row(source, 1, 3, "prompt_ids", lambda ids: [*ids[:-1], ids[-1] ^ 1])
    with pytest.raises(UserInputError, match=r"prompt 1 in step 1 of .* has other tokens"):
        run("raft", tmp_path, rollouts_from=source.path)


def test_a_record_without_what_was_dropped_says_so(
    made: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    """Files of earlier versions have no column `kept`, and only the rows that were kept."""
    source = RunDirectory(Path(shutil.copytree(made("refill").path, tmp_path / "source")))
    for step in range(1, 6):
        path = rollout_path(source.rollouts_dir, step)
        table = pq.read_table(path)
        pq.write_table(table.filter(table.column("kept")).drop_columns(["kept"]), path)
    with pytest.raises(UserInputError, match="dropped was not recorded by earlier versions"):
        run("refill", tmp_path, rollouts_from=source.path)


def test_the_command_takes_and_refuses_a_source(
    made: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    source = str(made("raft").path)

    def align(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["train", *arguments, f"run.dir={tmp_path}"])

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(recipe_of("raft", tmp_path)), "utf-8")
    result = align(str(recipe), "--rollouts-from", source)
    assert result.exit_code == 0, result.output
    assert_same_run(RunDirectory.open(tmp_path / "raft"), made("raft"))
    for arguments, said in (
        (("tiny/sft", "--rollouts-from", source), "the recipe's method samples nothing"),
        (("tiny/raft", "--rollouts-from", str(tmp_path / "none")), "there is no run at"),
        (("tiny/quickstart", "--rollouts-from", source), "goes with the recipe of one run"),
    ):
        result = align(*arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
