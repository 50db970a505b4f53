"""Two processes train by PPO what one does: the same samples, metrics, policy and critic."""

from __future__ import annotations

import math
from pathlib import Path

import ppo_rank_worker
import pytest
import torch
from ppo_rank_worker import CASES, COMMON
from ppo_runs import last_state, recipe_of
from test_two_processes import gone_on_with, launched
from tiny_runs import rollouts_of, steps_of, weights_of

from alignment.runs.directory import RunDirectory

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every case, trained by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for done in launched([str(HERE / "ppo_rank_worker.py"), str(two)]):
        assert done.returncode == 0, done.stdout[-3000:]
    ppo_rank_worker.train_all(one)
    return one, two


def runs_of(folders: tuple[Path, Path], case: str) -> tuple[RunDirectory, RunDirectory]:
    one, two = (RunDirectory.open(folder / case / "ppo") for folder in folders)
    assert (two.path / "events-rank1.jsonl").is_file()  # there was a second rank
    assert not (one.path / "events-rank1.jsonl").exists()
    return one, two


def assert_same_steps(one: RunDirectory, two: RunDirectory) -> None:
    for alone, together in zip(steps_of(one), steps_of(two), strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            close = math.isclose(together[name], value, rel_tol=2e-5, abs_tol=2e-6)
            assert close, f"step {alone['step']}, {name}: {value} and {together[name]}"


def assert_same_models(one: RunDirectory, two: RunDirectory, *, with_critic: bool) -> None:
    models = [[weights_of(run)] for run in (one, two)]
    if with_critic:
        for run, found in zip((one, two), models, strict=True):
            found.append(last_state(run)["critic"]["weights"])
    for ours, theirs in zip(*models, strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_measure_in_ppo_what_one_does(
    folders: tuple[Path, Path], case: str
) -> None:
    """KL coefficient, moments, scale and early stop among them."""
    assert_same_steps(*runs_of(folders, case))


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_reach_the_same_policy_and_critic(
    folders: tuple[Path, Path], case: str
) -> None:
    assert_same_models(*runs_of(folders, case), with_critic=case != "shared")


def test_i45_a_checkpoint_of_two_processes_serves_one(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Critic, moments, reward scale and the controller of the KL come along."""
    one, two = runs_of(folders, "everything")
    resumed = gone_on_with(two, recipe_of(tmp_path, *COMMON, *CASES["everything"]))
    assert_same_steps(one, resumed)
    assert_same_models(one, resumed, with_critic=True)


@pytest.mark.parametrize("case", CASES)
def test_i31_two_processes_whiten_by_all_tokens(folders: tuple[Path, Path], case: str) -> None:
    """The advantages recorded are the same, though the ranks hold unequal numbers of tokens."""
    one, two = map(rollouts_of, runs_of(folders, case))
    lengths: list[set[int]] = [set(), set()]
    for alone, together in zip(one, two, strict=True):
        for mine, yours in zip(alone, together, strict=True):
            for column in ("prompt_index", "sample_index", "completion_ids", "outcome"):
                assert mine[column] == yours[column], column
            assert mine["advantage"] == pytest.approx(yours["advantage"], abs=1e-5)
            lengths[mine["prompt_index"] % 2].add(len(mine["completion_ids"]))
    if case in ("everything", "shared"):
        assert len(lengths[0] | lengths[1]) > 2


def test_the_early_stop_is_no_trivial_case(folders: tuple[Path, Path]) -> None:
    one, _ = map(steps_of, runs_of(folders, "early-stop"))
    assert 1.0 in {record["policy/stopped_early"] for record in one}
