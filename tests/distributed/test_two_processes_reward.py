"""Two processes train the reward model that one does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import reward_worker
import torch
from reward_worker import CASES, recipe_of
from test_two_processes import gone_on_with, launched
from tiny_runs import steps_of, weights_of

from alignment.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every case, trained by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for done in launched([str(Path(reward_worker.__file__)), str(two)]):
        assert done.returncode == 0, done.stdout[-3000:]
    reward_worker.train_all(one)
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_train_what_one_does(folders: tuple[Path, Path], case: str) -> None:
    one, two = (RunDirectory.open(folder / case / "it") for folder in folders)
    assert (two.path / "events-rank1.jsonl").is_file()  # there was a second rank
    assert_same(one, two)


def test_i45_a_checkpoint_of_two_processes_serves_one(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = (RunDirectory.open(folder / "pairs" / "it") for folder in folders)
    assert_same(one, gone_on_with(two, recipe_of("pairs", tmp_path)))


def assert_same(one: RunDirectory, two: RunDirectory) -> None:
    for alone, together in zip(steps_of(one), steps_of(two), strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            close = math.isclose(together[name], value, rel_tol=1e-5, abs_tol=1e-6)
            assert close, f"step {alone['step']}, {name}: {value} and {together[name]}"
    weights = weights_of(two)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("case", ["pairs", "one-pair"])
def test_i31_scores_are_normalized_over_all_ranks(folders: tuple[Path, Path], case: str) -> None:
    one, two = (
        json.loads((folder / case / "it/model/score_normalization.json").read_text())
        for folder in folders
    )
    assert one["count"] == two["count"] == 24  # both sides of the 12 pairs
    assert two == pytest.approx(one, rel=1e-5)
