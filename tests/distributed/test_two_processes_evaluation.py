"""An evaluation that fails, on the rank that makes them all."""

from __future__ import annotations

from pathlib import Path

import preference_runs
from evaluation_worker import SETTINGS
from test_two_processes import HERE, launched

from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.directory import RunDirectory


def test_both_ranks_save_the_step_whose_evaluation_failed(tmp_path: Path) -> None:
    told = [done.stdout for done in launched([str(HERE / "evaluation_worker.py"), str(tmp_path)])]
    assert sorted("no held-out preference pairs" in text for text in told) == [False, True]
    assert sorted("failed on another rank" in text for text in told) == [False, True]
    run = RunDirectory.open(tmp_path / "dpo")
    assert [step for step, _ in list_checkpoints(run.checkpoints_dir)] == [2]
    done = preference_runs.run("dpo", tmp_path, *SETTINGS)
    assert (done.model_dir / "model.safetensors").is_file()
