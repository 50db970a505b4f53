"""A PPO run that was interrupted and resumed is the run that was not: two models, two optimizers,
running moments, an adaptive coefficient, and a reference that moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ppo_runs import LORA, SHARED, last_state, run
from test_resume import Interrupted, assert_same_run, fail_when
from tiny_runs import events_of, steps_of

from alignment.runs.directory import RunDirectory
from alignment.trainers.loop import Loop
from alignment.trainers.ppo import PPOTrainer

EVERYTHING = (
    "algorithm.steps=4",
    "optim.schedule=cosine",
    "algorithm.kl={coef: 0.1, placement: reward, controller: adaptive, target: 0.05, horizon: 50}",
    "model.reference={mode: synced, every: 2, mix: 0.5}",
    "algorithm.normalize_rewards=true",
    "algorithm.whiten_rewards=true",
    "checkpoint={every: 1, keep: 3}",
)
CASES: dict[str, tuple[str, ...]] = {
    "separate critic": (
        *EVERYTHING,
        "algorithm.critic={normalize: true, warmup_steps: 1, lr: 1e-2}",
    ),
    "shared critic, bfloat16": (
        *EVERYTHING,
        "algorithm.critic={kind: shared, normalize: true}",
        "model.dtype=bfloat16",
    ),
    "LoRA with dropout, shared critic, early stop": (
        *LORA,
        *SHARED,
        "algorithm.steps=4",
        "algorithm.stop_kl=1e-3",
        "model.lora.dropout=0.3",
        "checkpoint={every: 1, keep: 3}",
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """The run of a case from start to end, made once."""
    made: dict[str, RunDirectory] = {}

    def of(case: str) -> RunDirectory:
        if case not in made:
            made[case] = run(tmp_path_factory.mktemp("whole"), *CASES[case])
        return made[case]

    return of


@pytest.mark.parametrize(
    ("case", "step"),
    [(case, 3) for case in CASES] + [("separate critic", step) for step in (1, 2, 4)],
)
def test_i45_resumed_is_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
    case: str,
    step: int,
) -> None:
    """Weights of both models, metrics, samples, and every byte of the last checkpoint."""
    with monkeypatch.context() as patch:
        fail_when(patch, PPOTrainer, "step", step)
        with pytest.raises(Interrupted):
            run(tmp_path, *CASES[case])
    resumed = run(tmp_path, *CASES[case])
    (event,) = events_of(resumed, "resume")
    assert event["step"] == step - 1
    assert_same_run(resumed, uninterrupted(case))


def test_i45_a_step_whose_updates_were_made_in_vain_is_made_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], RunDirectory],
) -> None:
    """Killed after the updates of a step and before its checkpoint."""
    case = "separate critic"
    with monkeypatch.context() as patch:
        fail_when(patch, Loop, "_save", 3)
        with pytest.raises(Interrupted):
            run(tmp_path, *CASES[case])
    assert_same_run(run(tmp_path, *CASES[case]), uninterrupted(case))


def test_the_cases_have_state_to_lose(uninterrupted: Callable[[str], RunDirectory]) -> None:
    state = last_state(uninterrupted("separate critic"))
    assert state["trainer"]["kl"]["coef"] != 0.1
    assert state["trainer"]["scores"]["count"] == 4 * 8
    assert state["trainer"]["critic"]["scale"] not in (0.0, 1.0)
    assert state["critic"]["optimizer"]["moments"]
    assert state["reference"]
    stopped = [
        record["policy/stopped_early"]
        for record in steps_of(uninterrupted("LoRA with dropout, shared critic, early stop"))
    ]
    assert max(stopped) == 1.0
