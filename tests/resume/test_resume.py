"""A run that was interrupted and resumed is the run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import default_interrupts
from tiny_runs import (
    GRPO,
    SFT,
    events_of,
    metrics_of,
    recipe_of,
    rollouts_of,
    run,
    steps_of,
    weights_of,
)
from typer.testing import CliRunner

from alignment.cli import app
from alignment.modeling.export import save_policy
from alignment.runs.checkpoint import list_checkpoints, load_checkpoint
from alignment.runs.directory import RunDirectory
from alignment.runs.metrics import read_metrics
from alignment.runs.outputs import FINISHED
from alignment.trainers import run as run_module
from alignment.trainers.grpo import GRPOTrainer
from alignment.trainers.loop import Loop, Stopped
from alignment.trainers.run import train
from alignment.trainers.sft import SFTTrainer
from alignment.types import UserInputError

STEPS = ("algorithm.steps=6", "optim.schedule=cosine", "optim.lr=1e-2")
MOVING = (
    "algorithm.kl={coef: 0.1, controller: adaptive, target: 0.01, horizon: 50}",
    "model.reference={mode: synced, every: 2, mix: 0.5}",
)
FEW = ("algorithm.prompts_per_step=2",)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ()),
    "sft with dropout, bfloat16": (
        "sft",
        ("model.lora={rank: 4, dropout: 0.3}", "model.dtype=bfloat16"),
    ),
    "grpo": ("grpo", ("algorithm.updates_per_step=2", *MOVING)),
    "grpo with transformers' engine": ("grpo", ("rollout.engine=hf",)),
    "grpo, bfloat16": (
        "grpo",
        ("algorithm.epochs_per_step=2", *FEW, *MOVING, "model.dtype=bfloat16"),
    ),
    "rlvr": (
        "rlvr",
        (
            *FEW,
            "algorithm.updates_per_step=2",
            "algorithm.epochs_per_step=2",
            "algorithm.dynamic_sampling=refill",
            "algorithm.kl={coef: 0.05, placement: reward, estimator: k1, controller: adaptive, "
            "target: 0.02, horizon: 50}",
        ),
    ),
}


class Interrupted(Exception):
    """Not one of the toolkit's: as a crash or a kill would be."""


def settings_of(case: str, every: int = 1) -> tuple[str, ...]:
    return (*STEPS, *CASES[case][1], f"checkpoint={{every: {every}, keep: 3}}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """The run of a case from start to end, made once."""
    made: dict[str, RunDirectory] = {}

    def of(case: str) -> RunDirectory:
        if case not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[case] = run(CASES[case][0], folder, *settings_of(case), "eval={}")
        return made[case]

    return of


def assert_same_run(resumed: RunDirectory, whole: RunDirectory) -> None:
    """Bit for bit: weights, metrics (but for times), samples, and the last checkpoint."""
    ours, theirs = weights_of(resumed), weights_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_of(resumed) == steps_of(whole)
    if whole.rollouts_dir.is_dir():
        assert rollouts_of(resumed) == rollouts_of(whole)
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (resumed, whole))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()


def fail_when(patch: pytest.MonkeyPatch, owner: Any, name: str, step: int) -> None:
    """Raise in `owner.name` at its call for `step` (an argument, or the number of the call)."""
    original = getattr(owner, name)
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        numbers = [a for a in arguments if isinstance(a, int)]
        if (numbers or [calls])[0] == step:
            raise Interrupted
        return original(*arguments)

    patch.setattr(owner, name, failing)


MOMENTS: dict[str, Callable[[Any], tuple[Any, str, int]]] = {
    "in the step": lambda trainer: (trainer, "step", 4),
    "before its metrics": lambda trainer: (Loop, "_record", 4),
    "before its checkpoint": lambda trainer: (Loop, "_save", 4),
    "while the model is saved": lambda trainer: (run_module, "save_policy", 1),
}


ONE_MOMENT = ("grpo, bfloat16", "rlvr")
"""Cases that are interrupted at one of the moments alone, after the updates of a step."""

EVALUATED = {
    "rlvr": "eval={every: 2, tasks: [{type: verifiable, samples: 1, prompts: 2}]}",
}
"""What the interrupted runs of a case evaluate, and the whole one does not."""


@pytest.mark.parametrize(
    ("case", "moment"),
    [
        (case, moment)
        for case in CASES
        for moment in MOMENTS
        if case not in ONE_MOMENT or moment == "before its checkpoint"
    ],
)
def test_i45_resumed_is_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
    case: str,
    moment: str,
) -> None:
    method = CASES[case][0]
    trainer = SFTTrainer if method == "sft" else GRPOTrainer
    settings = (*settings_of(case), EVALUATED.get(case, "eval={}"))
    with monkeypatch.context() as patch:
        fail_when(patch, *MOMENTS[moment](trainer))
        with pytest.raises(Interrupted):
            run(method, tmp_path, *settings)
    resumed = run(method, tmp_path, *settings)
    assert any(resumed.evals_dir.glob("*")) == (case in EVALUATED)
    (event,) = events_of(resumed, "resume")
    assert event["step"] == (6 if moment == "while the model is saved" else 3)
    assert_same_run(resumed, uninterrupted(case))


def test_the_rlvr_case_has_state_to_lose(uninterrupted: Callable[[str], RunDirectory]) -> None:
    whole = uninterrupted("rlvr")
    (_, last) = list_checkpoints(whole.checkpoints_dir)[-1]
    state = load_checkpoint(last)["trainer"]
    assert state["order"]["position"] > 6 * 2  # groups were replaced
    assert state["update"]["policy_version"] == 6 * 4
    assert state["kl"]["coef"] != 0.05


@pytest.mark.parametrize("every", [0, 2, 5])
def test_i45_resumed_from_an_earlier_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
    every: int,
) -> None:
    """Steps that were made after the checkpoint are made again, and recorded once."""
    task = "eval={every: 2, tasks: [{type: verifiable, samples: 1, prompts: 2}]}"
    with monkeypatch.context() as patch:
        fail_when(patch, GRPOTrainer, "step", 6)
        with pytest.raises(Interrupted):
            run("grpo", tmp_path, *settings_of("grpo", every), task)
    resumed = run("grpo", tmp_path, *settings_of("grpo", every), task)
    (event,) = events_of(resumed, "resume")
    assert event["step"] == {0: 0, 2: 4, 5: 5}[every]
    assert [record["step"] for record in read_metrics(resumed.metrics)] == [0, 1, 2, 3, 4, 5, 6]
    assert_same_run(resumed, uninterrupted("grpo"))


def test_i45_resumed_from_a_named_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
) -> None:
    with monkeypatch.context() as patch:
        fail_when(patch, GRPOTrainer, "step", 5)
        with pytest.raises(Interrupted):
            run("grpo", tmp_path, *settings_of("grpo"))
    checkpoint = tmp_path / "grpo" / "checkpoints" / "step-000002"
    resumed = run("grpo", tmp_path, *settings_of("grpo"), resume=str(checkpoint))
    (event,) = events_of(resumed, "resume")
    assert event["step"] == 2
    assert_same_run(resumed, uninterrupted("grpo"))


def test_i45_interrupted_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
) -> None:
    for step in (2, 5):
        with monkeypatch.context() as patch:
            fail_when(patch, GRPOTrainer, "step", step)
            with pytest.raises(Interrupted):
                run("grpo", tmp_path, *settings_of("grpo"))
    resumed = run("grpo", tmp_path, *settings_of("grpo"))
    assert [event["step"] for event in events_of(resumed, "resume")] == [1, 4]
    assert_same_run(resumed, uninterrupted("grpo"))


def started(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """The GRPO case as a process of its own, two steps or more on its way."""
    settings = [*GRPO, f"run.dir={folder}", *settings_of("grpo"), *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "alignment", "train", "tiny/grpo", *settings],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "grpo" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_i45_killed_at_any_moment(
    tmp_path: Path, uninterrupted: Callable[[str], RunDirectory]
) -> None:
    process = started(tmp_path)
    time.sleep(random.Random(time.time_ns()).uniform(0.0, 0.3))
    process.kill()
    process.communicate()
    resumed = run("grpo", tmp_path, *settings_of("grpo"))
    assert_same_run(resumed, uninterrupted("grpo"))


def test_i45_a_second_start_is_refused_and_after_a_kill_the_next_goes_on(
    tmp_path: Path, uninterrupted: Callable[[str], RunDirectory]
) -> None:
    command = ["train", "tiny/grpo", *GRPO, f"run.dir={tmp_path}", *settings_of("grpo")]
    process = started(tmp_path)
    process.send_signal(signal.SIGSTOP)  # it cannot come to its end
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    run_dir = RunDirectory(tmp_path / "grpo")
    before = [file.read_bytes() for file in (run_dir.metrics, run_dir.events, run_dir.info)]
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 2
    assert f"{run_dir.path} is being trained by process {process.pid} on" in second.output
    after = [file.read_bytes() for file in (run_dir.metrics, run_dir.events, run_dir.info)]
    assert after == before
    process.kill()
    process.communicate()
    third = CliRunner().invoke(app, command)
    assert third.exit_code == 0, third.output
    assert_same_run(run_dir, uninterrupted("grpo"))


def test_sigterm_finishes_the_step_saves_and_exits_with_0(tmp_path: Path) -> None:
    process = started(tmp_path, "algorithm.steps=200", "checkpoint.every=0")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert f"to go on: align train {tmp_path}/grpo/recipe.yaml" in said
    ((saved, _),) = list_checkpoints(tmp_path / "grpo" / "checkpoints")
    assert saved == read_metrics(tmp_path / "grpo" / "metrics.jsonl")[-1]["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step_stops_after_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    original = GRPOTrainer.step

    def signalled(self: GRPOTrainer, step: int) -> Any:
        if step == 4:
            os.kill(os.getpid(), number)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "step", signalled)
        with pytest.raises(Stopped, match="stopped after step 4 of 6, which is saved"):
            run("grpo", tmp_path, *settings_of("grpo", every=0))
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    steps = [step for step, _ in list_checkpoints(tmp_path / "grpo" / "checkpoints")]
    assert steps == [4]
    command = CliRunner().invoke(app, ["train", str(tmp_path / "grpo" / "recipe.yaml")])
    assert command.exit_code == 0, command.output
    assert_same_run(RunDirectory.open(tmp_path / "grpo"), uninterrupted("grpo"))


def signal_when_saving(patch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """A signal while the final model is saved."""

    def signalled(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        save_policy(*arguments)

    patch.setattr(run_module, "save_policy", signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_lets_the_run_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    signal_when_saving(monkeypatch, number)
    settings = [*SFT, f"run.dir={tmp_path}", *settings_of("sft")]
    with default_interrupts():
        result = CliRunner().invoke(app, ["train", "tiny/sft", *settings])
    assert result.exit_code == 0, result.output
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    ended = RunDirectory.open(tmp_path / "sft")
    assert (ended.path / FINISHED).is_file() and ended.report.is_file()
    assert_same_run(ended, uninterrupted("sft"))


def test_a_signal_while_a_stage_is_saved_stops_the_pipeline_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_when_saving(patch, signal.SIGTERM)
        pipeline = ["train", "tiny/quickstart", f"run.dir={tmp_path}", "run.name=two"]
        pipeline += ["stages.sft.set.algorithm.steps=2", "stages.sft.set.expect=[]"]
        stopped = CliRunner().invoke(app, pipeline)
    assert stopped.exit_code == 0, stopped.output
    said = "stopped after the last step of stage sft, which is saved; to go on: align train"
    assert said in " ".join(stopped.output.split())
    stages = tmp_path / "two" / "stages"
    assert [path.name for path in stages.iterdir()] == ["sft"]
    assert (stages / "sft" / FINISHED).is_file()


def test_a_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(self: GRPOTrainer, step: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5.0)
        pytest.fail("the second signal did not act")

    monkeypatch.setattr(GRPOTrainer, "step", signalled)
    with default_interrupts(), pytest.raises(KeyboardInterrupt):
        run("grpo", tmp_path, *settings_of("grpo"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_exits_with_0_when_it_was_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    original = SFTTrainer.step

    def signalled(self: SFTTrainer, step: int) -> Any:
        os.kill(os.getpid(), number)
        return original(self, step)

    monkeypatch.setattr(SFTTrainer, "step", signalled)
    result = CliRunner().invoke(app, ["train", "tiny/sft", f"run.dir={tmp_path}"])
    assert result.exit_code == 0
    assert "stopped after step 1 of 60, which is saved; to go on: align train" in result.output


def test_a_finished_run_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("sft", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    again = run("sft", tmp_path)
    after = {path: path.stat().st_mtime_ns for path in again.path.rglob("*") if path.is_file()}
    assert after == before
    assert "is finished already" in capsys.readouterr().out


def test_another_recipe_of_the_same_name_is_refused(tmp_path: Path) -> None:
    first = run("sft", tmp_path)
    before = metrics_of(first)
    with pytest.raises(UserInputError, match="was made with another recipe") as refused:
        run("sft", tmp_path, "optim.lr=0.5")
    assert "-  lr: 0.003" in str(refused.value)
    assert "+  lr: 0.5" in str(refused.value)
    assert "choose another run.name, or delete the run" in str(refused.value)
    assert metrics_of(first) == before


def test_a_recipe_of_a_version_with_fewer_keys_is_the_same_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("sft", tmp_path)
    text = first.recipe.read_text(encoding="utf-8")
    older = "".join(line for line in text.splitlines(True) if "hang_minutes" not in line)
    assert older != text
    first.recipe.write_text(older, encoding="utf-8")
    capsys.readouterr()
    run("sft", tmp_path)
    assert "is finished already" in capsys.readouterr().out


def test_resume_never_refuses_a_name_that_exists(tmp_path: Path) -> None:
    run("sft", tmp_path, resume="never")
    with pytest.raises(UserInputError, match="exists already and is not overwritten"):
        train(recipe_of("sft", tmp_path), resume="never")
