"""What ends a run from outside the numbers: user code and signals. The last checkpoint stands, the
event says where it happened, and the message says how to go on."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from fault_runs import (
    NO_TASKS,
    SAVED,
    PluginError,
    assert_resumes,
    default_interrupts,
    failing_step,
    trained,
)
from tiny_runs import events_of, metrics_of

from alignment.cli.common import guarded
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog, read_events
from alignment.trainers.failure import recorded_failure
from alignment.trainers.run import train
from alignment.trainers.sft import SFTTrainer
from alignment.types import AlignmentError, Completion, Prompt, Score, UserInputError
from reward_models.pool import WorkerPool


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nothing happens to."""
    return tiny_runs.run("sft", tmp_path_factory.mktemp("whole"), *SAVED)


# -- user code --------------------------------------------------------------------------------


def test_an_exception_in_a_trainer_keeps_its_type_and_the_checkpoint(
    tmp_path: Path, whole: RunDirectory
) -> None:
    with failing_step(3, PluginError("no such column")):
        result = trained("sft", tmp_path, *SAVED)
    assert result.exit_code == 1
    assert isinstance(result.exception, PluginError)
    (note,) = result.exception.__notes__
    assert note == (
        "step-000002 is the last checkpoint; to go on from there: "
        f"align train {tmp_path}/sft/recipe.yaml"
    )
    (event,) = events_of(RunDirectory.open(tmp_path / "sft"), "error")
    assert (event["step"], event["phase"], event["type"]) == (3, "step", "PluginError")
    assert event["message"] == "PluginError: no such column"
    assert "in step" in "".join(event["traceback"])
    assert_resumes(tmp_path, whole)


def test_an_error_of_the_toolkit_is_told_with_the_way_on(tmp_path: Path) -> None:
    with failing_step(1, AlignmentError("it cannot go on")):
        result = trained("sft", tmp_path, *SAVED)
    assert result.exit_code == 1
    assert "align: it cannot go on\nno checkpoint was saved yet; to begin again" in result.output
    (event,) = events_of(RunDirectory.open(tmp_path / "sft"), "error")
    assert (event["message"], event["traceback"]) == ("it cannot go on", None)
    assert trained("sft", tmp_path, *SAVED).exit_code == 0


def broken_task() -> Any:
    """A task with a mistake in it."""

    class Task:
        def run(self, context: Any) -> Any:
            raise PluginError("the task fell over")

    return Task()


def test_an_exception_in_a_task_is_placed_in_the_evaluation(tmp_path: Path) -> None:
    tasks = "eval={at_start: false, every: 3, tasks: [{type: 'test_faults_runs:broken_task'}]}"
    result = trained("sft", tmp_path, *SAVED[:2], tasks)
    assert isinstance(result.exception, PluginError)
    (event,) = events_of(RunDirectory.open(tmp_path / "sft"), "error")
    assert (event["step"], event["phase"]) == (3, "evaluation")


def broken_source() -> list[dict[str, Any]]:
    """A source with a mistake in it."""
    raise PluginError("the source fell over")


def test_an_exception_in_a_source_leaves_no_run(tmp_path: Path) -> None:
    result = trained("sft", tmp_path / "runs", "data={type: 'test_faults_runs:broken_source'}")
    assert result.exit_code == 1
    assert isinstance(result.exception, PluginError)
    assert not (tmp_path / "runs").exists()


def sometimes_raises(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Raises for completions that begin with an odd token."""
    if any(ids[0] % 2 for ids in completion_ids):
        raise ZeroDivisionError("odd")
    return [float(ids[0] % 7) for ids in completion_ids]


def test_a_reward_that_raises_costs_the_samples_that_it_raised_for(tmp_path: Path) -> None:
    rewards = "rewards=[{type: 'test_faults_runs:sometimes_raises'}]"
    directory = tiny_runs.run("grpo", tmp_path, rewards, NO_TASKS, "limits.unscorable=1.0")
    for record, rollout in zip(
        metrics_of(directory), tiny_runs.rollouts_of(directory), strict=True
    ):
        odd = sum(row["completion_ids"][0] % 2 for row in rollout)
        assert 0 < odd < 16
        assert record["unscorable/crash"] == odd / 16
    event, _ = events_of(directory, "unscorable")
    assert "raised ZeroDivisionError: odd" in event["message"]


class HangsOn:
    """Even tokens, but a checker that never comes back for the samples of one number."""

    def __init__(self, sample: int) -> None:
        self._sample = sample
        self._pool = WorkerPool("time:sleep", workers=1, timeout_seconds=0.1)

    def __call__(self, items: Sequence[tuple[Prompt, Completion]], /) -> list[Score]:
        hangs = [60 if done.sample_index == self._sample else 0 for _, done in items]
        return [
            Score(None, reply.failure, reply.detail)
            if reply.failure is not None
            else Score(tiny_runs.even_tokens([done.token_ids])[0])
            for reply, (_, done) in zip(self._pool.run(hangs), items, strict=True)
        ]

    def close(self) -> None:
        self._pool.close()


def test_a_grader_that_hangs_costs_its_sample_and_is_named(tmp_path: Path) -> None:
    rewards = "rewards=[{type: 'test_faults_runs:HangsOn', sample: 2}]"
    settings = ("algorithm.steps=1", "algorithm.prompts_per_step=2", "limits.unscorable=0.3")
    directory = tiny_runs.run("grpo", tmp_path, rewards, NO_TASKS, *settings)
    (record,) = metrics_of(directory)
    assert record["outcome/timeout"] == record["unscorable/timeout"] == 2 / 8
    (event,) = events_of(directory, "unscorable")
    assert (event["step"], event["completions"]) == (1, 2)
    assert "(timeout in reward 'test_faults_runs:HangsOn': 2)" in event["message"]
    assert "prompt 0, sample 2" in event["message"]
    (rollout,) = tiny_runs.rollouts_of(directory)
    assert [row["outcome"] for row in rollout if row["sample_index"] == 2] == ["timeout"] * 2


# -- signals ----------------------------------------------------------------------------------


def test_two_interrupts_end_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunDirectory
) -> None:
    original = SFTTrainer.step

    def step(self: SFTTrainer, step: int) -> Any:
        if step == 4:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)  # to this thread, so that two stay two
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "step", step)
        with default_interrupts():
            result = trained("sft", tmp_path, *SAVED)
    assert result.exit_code == 130
    assert "align: interrupted\nstep-000002 is the last checkpoint; to go on" in result.output
    (event,) = events_of(RunDirectory.open(tmp_path / "sft"), "error")
    assert (event["step"], event["type"]) == (4, "KeyboardInterrupt")
    assert_resumes(tmp_path, whole)


def test_an_interrupt_outside_a_run_says_no_more_than_that(capsys: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017 (typer's, not public)
        guarded(interrupted)()
    assert capsys.readouterr().err == "align: interrupted\n"


# -- the event --------------------------------------------------------------------------------


def failed(tmp_path: Path, error: BaseException) -> tuple[BaseException, list[dict[str, Any]]]:
    events = EventLog(tmp_path / "events.jsonl")
    run = RunDirectory(tmp_path)
    with pytest.raises(BaseException) as caught, recorded_failure(run, events):
        raise error
    return caught.value, read_events(events.path)


def test_what_is_not_a_failure_leaves_no_event(tmp_path: Path) -> None:
    asked = AlignmentError("asked to stop")
    asked.exit_code = 0  # type: ignore[attr-defined]
    error, events = failed(tmp_path, asked)
    assert error is asked and events == []


def test_an_event_is_not_written_twice(tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("error", "rank 1 is gone")
    _, events = failed(tmp_path, AlignmentError("rank 1 is gone"))
    assert len(events) == 1


def test_a_run_that_could_not_begin_is_not_to_be_gone_on_with(tmp_path: Path) -> None:
    error, _ = failed(tmp_path, UserInputError("rewards: list one"))
    assert not hasattr(error, "__notes__")


def test_a_finished_run_is_not_to_be_gone_on_with(tmp_path: Path) -> None:
    result = trained("sft", tmp_path, *SAVED, "expect=['sft/nll[-1:] < 0.001']")
    assert result.exit_code == 1
    assert "to go on" not in result.output and "to begin again" not in result.output


def test_train_raises_what_the_plug_in_raised(tmp_path: Path) -> None:
    with failing_step(1, PluginError()), pytest.raises(PluginError):
        train(tiny_runs.recipe_of("sft", tmp_path, *SAVED))
