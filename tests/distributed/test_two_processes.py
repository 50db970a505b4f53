"""Two processes train what one does: the same samples, metrics and weights."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch
from rank_worker import CASES
from sharded_worker import cut_off
from tiny_runs import events_of, rollouts_of, steps_of, weights_of

from alignment.config.load import dump_recipe
from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.trainers.run import train

HERE = Path(__file__).parent
SECONDS = 150  # a hang is a failure
DEALT_OUT = [name for name in CASES if CASES[name][0] == "grpo"]


def launched(
    arguments: list[str], n: int = 2, seconds: float = SECONDS
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command as ranks 0 to n-1, as a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n),
        "PYTHONFAULTHANDLER": "1",  # where a crash was is then at the end of the output
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n)
    ]
    done = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=seconds)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, output))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return done


def gone_on_with(run: RunDirectory, recipe: Recipe) -> RunDirectory:
    """A copy of a run as it was after its second step, trained to its end by this process.

    Args:
        recipe: the run's, but for its folder.
    """
    folder = Path(recipe.run.dir)
    cut_off(run.path, folder, after=2)
    RunDirectory.open(folder / run.path.name).recipe.write_text(dump_recipe(recipe), "utf-8")
    resumed = train(recipe)
    assert [event["step"] for event in events_of(resumed, "resume")] == [2]
    return resumed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every case, trained by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for done in launched([str(HERE / "rank_worker.py"), str(two)]):
        assert done.returncode == 0, done.stdout[-3000:]
    rank_worker.train_all(one, poisons=True)
    return one, two


def runs_of(folders: tuple[Path, Path], case: str) -> tuple[RunDirectory, RunDirectory]:
    one, two = (RunDirectory.open(folder / case / CASES[case][0]) for folder in folders)
    assert (two.path / "events-rank1.jsonl").is_file()  # there was a second rank
    assert not (one.path / "events-rank1.jsonl").exists()
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_measure_what_one_does(folders: tuple[Path, Path], case: str) -> None:
    one, two = map(steps_of, runs_of(folders, case))
    assert len(one) == len(two)
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            close = math.isclose(together[name], value, rel_tol=1e-6, abs_tol=1e-6)
            assert close, f"step {alone['step']}, {name}: {value} and {together[name]}"


@pytest.mark.parametrize("case", CASES)
def test_i01_two_processes_reach_the_same_weights(folders: tuple[Path, Path], case: str) -> None:
    one, two = map(weights_of, runs_of(folders, case))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("case", DEALT_OUT)
def test_i33_two_processes_record_the_same_samples(folders: tuple[Path, Path], case: str) -> None:
    one, two = map(rollouts_of, runs_of(folders, case))
    assert len(one) == len(two)
    for alone, together in zip(one, two, strict=True):
        assert len(alone) == len(together)
        for mine, yours in zip(alone, together, strict=True):
            for column in ("prompt_index", "sample_index", "completion_ids", "outcome", "group"):
                assert mine[column] == yours[column], column
            assert mine["reward"] == pytest.approx(yours["reward"], abs=1e-6)
            assert mine["advantage"] == pytest.approx(yours["advantage"], abs=1e-5)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update(
    folders: tuple[Path, Path],
) -> None:
    """On both, and leaves nothing behind: what follows is what one process does (above)."""
    first, second = steps_of(runs_of(folders, "sft-nan")[1])
    assert (first["optim/skipped_updates"], second["optim/skipped_updates"]) == (1, 0)
    assert second["optim/moved_share"] > 0


def test_refilling_takes_the_same_number_of_rounds(folders: tuple[Path, Path]) -> None:
    one, _ = map(steps_of, runs_of(folders, "grpo-refill"))
    assert max(record["rollout/rounds"] for record in one) > 1  # the case is not a trivial one


def test_an_error_is_the_same_on_every_rank(folders: tuple[Path, Path]) -> None:
    """Too many failures in all: the rank that had none stops as well, and none is left waiting."""
    one, two = folders
    said = rank_worker.error_of(one)
    assert "50% of 8 completions could not be scored" in said
    assert {(two / f"error-{rank}.txt").read_text() for rank in (0, 1)} == {said}
