"""Two processes train by PPO what one does: the same samples, metrics, policy and critic."""

from __future__ import annotations

import math
from pathlib import Path

import ppo_rank_worker
import pytest
import torch
from ppo_rank_worker import CASES
from ppo_runs import last_state
from test_two_processes import launched
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


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_measure_in_ppo_what_one_does(
    folders: tuple[Path, Path], case: str
) -> None:
    """KL coefficient, moments, scale and early stop among them."""
    one, two = map(steps_of, runs_of(folders, case))
    assert len(one) == len(two)
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            close = math.isclose(together[name], value, rel_tol=2e-5, abs_tol=2e-6)
            assert close, f"step {alone['step']}, {name}: {value} and {together[name]}"


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_reach_the_same_policy_and_critic(
    folders: tuple[Path, Path], case: str
) -> None:
    runs = runs_of(folders, case)
    one, two = map(weights_of, runs)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0.0, atol=2e-6)
    if case == "shared":
        return
    states = [last_state(run) for run in runs]
    for name, weight in states[0]["critic"]["weights"].items():
        torch.testing.assert_close(
            states[1]["critic"]["weights"][name], weight, rtol=0.0, atol=2e-6
        )


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
