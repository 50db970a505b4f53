"""A rank that runs out of memory makes its part in smaller pieces, while the other one waits."""

from __future__ import annotations

import math
from pathlib import Path

import memory_worker
import pytest
import torch
from test_two_processes import launched
from tiny_runs import steps_of, weights_of

from alignment.runs.directory import RunDirectory
from alignment.runs.events import read_events


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Trained by one process, and by two of which the second has too little memory."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for done in launched([str(Path(memory_worker.__file__)), str(two)]):
        assert done.returncode == 0, done.stdout[-3000:]
    memory_worker.train_all(one)
    return one, two


@pytest.mark.parametrize("method", memory_worker.METHODS)
def test_a_rank_out_of_memory_retries_alone(folders: tuple[Path, Path], method: str) -> None:
    one, two = (RunDirectory.open(folder / method) for folder in folders)
    of_rank = {0: two.events, 1: two.path / "events-rank1.jsonl"}
    told = {rank: [e["kind"] for e in read_events(path)] for rank, path in of_rank.items()}
    assert "out_of_memory" not in told[0]
    assert told[1].count("out_of_memory") == 1
    for alone, together in zip(steps_of(one), steps_of(two), strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            close = math.isclose(together[name], value, rel_tol=1e-5, abs_tol=1e-6)
            assert close, f"step {alone['step']}, {name}: {value} and {together[name]}"
    weights = weights_of(two)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-6)
