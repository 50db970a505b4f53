"""Two processes learn from preferences what one does, with unequal shares of pairs and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import preference_worker
import pytest
import torch
from preference_runs import recipe_of
from preference_worker import CASES, COMMON
from test_two_processes import HERE, gone_on_with, launched
from tiny_runs import steps_of, weights_of

from alignment.runs.directory import RunDirectory

# The policy's rows are scored in other micro-batches than the file's, so that a margin of zero is a
# rounding error with a sign, and a weight without a gradient one with a tiny gradient.
COUNTS_OF_ROUNDING = ("dpo/reward/accuracy", "optim/moved_share")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every case, trained by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for done in launched([str(HERE / "preference_worker.py"), str(two)]):
        assert done.returncode == 0, done.stdout[-3000:]
    preference_worker.train_all(one)
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_learn_what_one_does(folders: tuple[Path, Path], case: str) -> None:
    one, two = (RunDirectory.open(folder / case / CASES[case][0]) for folder in folders)
    assert (two.path / "events-rank1.jsonl").is_file()  # there was a second rank
    assert_same(one, two, but=COUNTS_OF_ROUNDING if case == "dpo-precomputed" else ())


def test_i45_a_checkpoint_of_two_processes_serves_one(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The moving threshold of BCO comes along."""
    one, two = (RunDirectory.open(folder / "dpo-coupled" / "dpo") for folder in folders)
    recipe = recipe_of("dpo", tmp_path, *COMMON, *CASES["dpo-coupled"][1])
    assert_same(one, gone_on_with(two, recipe))


def assert_same(one: RunDirectory, two: RunDirectory, *, but: Sequence[str] = ()) -> None:
    for alone, together in zip(steps_of(one), steps_of(two), strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            if name in but:
                continue
            close = math.isclose(together[name], value, rel_tol=1e-5, abs_tol=1e-5)
            assert close, f"step {alone['step']}, {name}: {value} and {together[name]}"
    ours, theirs = weights_of(two), weights_of(one)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0.0, atol=2e-6)


def test_two_processes_write_the_same_reference_log_probabilities(
    folders: tuple[Path, Path],
) -> None:
    one, two = (
        {path.name: path.read_bytes() for path in (folder / "cache").rglob("*.safetensors")}
        for folder in folders
    )
    assert len(one) == 1
    assert one == two
