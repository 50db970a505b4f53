"""A step made again is the step that was logged, and what is not so is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from replay_runs import METHODS, SAMPLING, change_row, contents_of, forbid, made_once, run
from tiny_runs import metrics_of, rollouts_of
from typer.testing import CliRunner, Result

from alignment.cli import app
from alignment.config.load import dump_recipe, load_recipe
from alignment.rollout.native import NativeEngine
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory
from alignment.runs.samples import rollout_path
from alignment.trainers.grpo import GRPOTrainer
from alignment.trainers.replay import ReplayedMetric, replay
from alignment.types import Completion, UserInputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    return made_once(tmp_path_factory)


@pytest.fixture
def copied(made: Callable[[str], RunDirectory], tmp_path: Path) -> RunDirectory:
    """A run of GRPO to change."""
    return RunDirectory(Path(shutil.copytree(made("grpo").path, tmp_path / "grpo")))


def align(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


@pytest.mark.parametrize("name", METHODS)
def test_a_replayed_step_is_the_logged_one(
    made: Callable[[str], RunDirectory], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the start over two steps, and from a checkpoint; the run stays as it is."""
    done = made(name)
    before = contents_of(done)
    logged = {record["step"]: record for record in metrics_of(done)}
    if name in SAMPLING:
        forbid(monkeypatch)
    for step, start in ((2, 0), (4, 2)):
        again = replay(done.path, step)
        assert (again.step, again.start) == (step, start)
        assert again.differing == ()
        numbers = {m.name: m.replayed for m in again.metrics}
        expected = {
            key: value
            for key, value in logged[step].items()
            if key != "step" and not key.startswith(("time/", "memory/", "eval/"))
        }
        assert numbers == expected
        assert len(expected) >= 5
    assert contents_of(done) == before


def test_the_cases_are_what_they_are_called(made: Callable[[str], RunDirectory]) -> None:
    """Refills happened and dropped groups; the adaptive coefficient moved; the judge was asked."""
    refilled = made("refill")
    assert max(record["rollout/rounds"] for record in metrics_of(refilled)) > 1
    assert any(not row["kept"] for rows in rollouts_of(refilled) for row in rows)
    coefficients = [record["kl/coef"] for record in metrics_of(made("grpo"))]
    assert len(set(coefficients)) == len(coefficients)
    assert any(name.startswith("judge/") for name in metrics_of(made("ai_feedback"))[0])


@pytest.mark.parametrize(
    ("column", "change", "shown"),
    [
        ("reward", lambda reward: reward + 0.25, "reward/mean"),
        ("completion_ids", lambda ids: [*ids[:-1], ids[-1] ^ 1], "optim/grad_norm"),
        ("sampling_logprobs", lambda row: [row[0] - 0.5, *row[1:]], "engine/logprob_gap"),
        ("stop_reason", lambda reason: {"stop": "length", "length": "stop"}[reason], "cut_off"),
    ],
)
def test_a_changed_sample_shows(
    copied: RunDirectory, column: str, change: Callable[[Any], Any], shown: str
) -> None:
    change_row(copied, 4, 5, column, change)
    assert any(shown in name for name in replay(copied.path, 4).differing)


def test_a_changed_sample_of_an_earlier_step_shows(copied: RunDirectory) -> None:
    change_row(copied, 3, 0, "reward", lambda reward: 0.0 if reward else 1.0)
    differing = replay(copied.path, 4).differing
    assert {"loss", "optim/grad_norm", "kl/mean"} <= set(differing)
    assert "reward/mean" not in differing  # the step's own samples are as they were


def test_a_changed_metric_is_the_one_that_is_named(copied: RunDirectory) -> None:
    lines = [json.loads(line) for line in copied.metrics.read_text("utf-8").splitlines()]
    (record,) = (line for line in lines if line["step"] == 4)
    record["loss"] = math.nextafter(record["loss"], 1.0)
    record["made/up"] = 1.0
    del record["kl/coef"]
    copied.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert set(replay(copied.path, 4).differing) == {"loss", "made/up", "kl/coef"}
    result = align(copied.path, "--step", 4)
    assert result.exit_code == 1
    assert "3 of" in result.stderr and "loss" in result.stderr and "made/up" in result.stderr
    assert "not in both" in result.stdout


def test_equal_is_equal_to_the_last_bit() -> None:
    assert ReplayedMetric("x", math.nan, math.nan).same
    assert ReplayedMetric("x", 0.1, 0.1).same
    assert not ReplayedMetric("x", 0.1, math.nextafter(0.1, 1.0)).same
    assert not ReplayedMetric("x", math.nan, 0.1).same
    assert not ReplayedMetric("x", None, 0.1).same


# -- one sample again -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["grpo", "refill"])
def test_every_sample_comes_again_token_for_token(tmp_path: Path, name: str, dtype: str) -> None:
    """The engine is asked, at the right weights: those after three steps, one of them replayed."""
    done = run(name, tmp_path, f"model.dtype={dtype}", "algorithm.steps=4")
    rows = pq.read_table(rollout_path(done.rollouts_dir, 4)).to_pylist()
    picked = [5, len(rows) - 1]  # of refills, the last row is one that was dropped
    for row in picked:
        again = replay(done.path, 4, sample=row)
        assert again.differing == ()
        assert again.sample is not None and again.sample.same
        assert list(again.sample.again.token_ids) == rows[row]["completion_ids"]
        assert again.sample.again.sample_index == rows[row]["sample_index"]
        assert again.sample.recorded.prompt.index == rows[row]["prompt_index"]


def test_the_whole_batch_is_sampled_again(
    made: Callable[[str], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In low precision a completion depends on what it was sampled with."""
    calls: list[int] = []
    original = NativeEngine.generate

    def counted(self: NativeEngine, prompts: Any, params: Any) -> list[Completion]:
        calls.append(len(prompts))
        return original(self, prompts, params)

    done = made("refill")
    record = next(record for record in metrics_of(done) if record["rollout/rounds"] > 1)
    monkeypatch.setattr(NativeEngine, "generate", counted)
    step = record["step"]
    replay(done.path, step, sample=0)
    assert len(calls) == record["rollout/rounds"]
    assert 2 * sum(calls) == len(rollouts_of(done)[step - 1])


def test_a_sample_that_comes_out_otherwise_shows_where(copied: RunDirectory) -> None:
    ids = pq.read_table(rollout_path(copied.rollouts_dir, 4)).to_pylist()[3]["completion_ids"]
    change_row(copied, 4, 3, "completion_ids", lambda row: [*row[:2], row[2] ^ 1, *row[3:]])
    again = replay(copied.path, 4, sample=3)
    assert again.sample is not None and again.sample.first_difference == 2
    assert list(again.sample.again.token_ids) == ids
    result = align(copied.path, "--step", 4, "--sample", 3)
    assert result.exit_code == 1
    assert f"token 2 (from 0) is {ids[2]} and was {ids[2] ^ 1}" in result.stderr


def test_a_sample_cut_short_shows_where(copied: RunDirectory) -> None:
    ids = pq.read_table(rollout_path(copied.rollouts_dir, 4)).to_pylist()[3]["completion_ids"]
    for column in ("completion_ids", "sampling_logprobs"):
        change_row(copied, 4, 3, column, lambda row: row[:-1])
    again = replay(copied.path, 4, sample=3)
    assert again.sample is not None and again.sample.first_difference == len(ids) - 1


def test_graders_are_not_asked_for_a_sample(
    made: Callable[[str], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = made("grpo")
    forbid(monkeypatch, engine=False)
    again = replay(done.path, 1, sample=0)
    assert again.sample is not None and again.sample.same


# -- the command ------------------------------------------------------------------------------


def test_the_command_prints_both_and_the_verdict(made: Callable[[str], RunDirectory]) -> None:
    done = made("grpo")
    result = align(done.path, "--step", 3, "--sample", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "step 3, rebuilt from the checkpoint of step 2"
    assert lines[1].split() == ["metric", "logged", "replayed", "difference"]
    norm = metrics_of(done)[2]["optim/grad_norm"]
    assert ["optim/grad_norm", f"{norm:.10g}", f"{norm:.10g}"] in [line.split() for line in lines]
    assert "are bit for bit as logged" in result.stdout
    assert "prompt 8, sample 1:" in lines
    assert lines[-1] == "token for token identical: all 8 tokens are as recorded"
    assert align(done.path, "--step", 1).stdout.startswith("step 1, rebuilt from the model as hand")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--step", 6), "has no step 6; it has made steps 1 to 5"),
        (("--step", 0), "has no step 0; it has made steps 1 to 5"),
        (("--step", 3, "--sample", 16), "--sample 16: step 3 has the samples 0 to 15"),
        (("--step", 3, "--sample", -1), "--sample -1: step 3 has the samples 0 to 15"),
    ],
)
def test_what_is_not_there_is_exit_code_two(
    made: Callable[[str], RunDirectory], arguments: tuple[object, ...], said: str
) -> None:
    result = align(made("grpo").path, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_method_that_samples_nothing_has_no_sample(made: Callable[[str], RunDirectory]) -> None:
    result = align(made("sft").path, "--step", 3, "--sample", 0)
    assert result.exit_code == 2
    assert "--sample: the run's method samples nothing; leave it out" in result.stderr


def test_a_pipeline_has_no_step(tmp_path: Path) -> None:
    text = dump_recipe(load_recipe("smollm2-135m/quickstart"))
    done = RunDirectory.create(tmp_path, "pipeline", recipe_yaml=text, info={})
    with pytest.raises(UserInputError, match=r"is a pipeline; name a stage: .*/stages/NAME"):
        replay(done.path, 1)


# -- what is there of a run -------------------------------------------------------------------


def test_an_unfinished_run_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    original = GRPOTrainer.step

    def failing(self: GRPOTrainer, step: int) -> Any:
        if step == 4:
            raise Interrupted
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "step", failing)
        with pytest.raises(Interrupted):
            run("grpo", tmp_path)
    again = replay(tmp_path / "grpo", 3)
    assert (again.start, again.differing) == (2, ())
    with pytest.raises(UserInputError, match="has no step 4; it has made steps 1 to 3"):
        replay(tmp_path / "grpo", 4)


def test_a_checkpoint_that_is_gone_or_damaged_is_done_without(copied: RunDirectory) -> None:
    saved = dict(list_checkpoints(copied.checkpoints_dir))
    assert sorted(saved) == [2, 4, 5]
    (saved[4] / "state.json").write_bytes(b"{}")
    again = replay(copied.path, 5)
    assert (again.start, again.differing) == (2, ())
    shutil.rmtree(saved[2])
    again = replay(copied.path, 5)
    assert (again.start, again.differing) == (0, ())


def test_samples_that_are_gone_are_named(copied: RunDirectory) -> None:
    rollout_path(copied.rollouts_dir, 3).unlink()
    with pytest.raises(UserInputError, match=r"no samples of step 3: no file .*step-000003"):
        replay(copied.path, 4)
    assert replay(copied.path, 5).differing == ()  # from the checkpoint of step 4


def test_another_model_or_other_data_are_refused(copied: RunDirectory) -> None:
    info = copied.read_info()
    for name in ("model", "tokenizer", "template", "data"):
        copied.info.write_text(json.dumps(info | {f"{name}_hash": "ab" * 32}), "utf-8")
        with pytest.raises(UserInputError, match=rf"has changed since: .*{name}.*, abababab when"):
            replay(copied.path, 4)
    copied.info.write_text(json.dumps(info), "utf-8")
    assert replay(copied.path, 4).differing == ()
