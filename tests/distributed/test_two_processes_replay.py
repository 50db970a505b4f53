"""Two processes make a step of theirs again, and one trains on what two sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import replay_runs
import torch
from replay_worker import UNEVEN
from test_two_processes import launched
from tiny_runs import rollouts_of, steps_of, weights_of

from alignment.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes of the worker made, after they checked their replays themselves."""
    made = tmp_path_factory.mktemp("two")
    worker = Path(__file__).parent / "replay_worker.py"
    for done in launched([str(worker), str(made)]):
        assert done.returncode == 0, done.stdout[-3000:]
    return made


def test_two_processes_train_on_their_samples_to_the_same_end(folder: Path) -> None:
    made, again = (RunDirectory.open(folder / part / "refill") for part in ("made", "again"))
    assert (made.path / "events-rank1.jsonl").is_file()  # there was a second rank
    assert steps_of(made) == steps_of(again)
    assert rollouts_of(made) == rollouts_of(again)
    ours, theirs = weights_of(again), weights_of(made)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_one_process_trains_on_what_two_sampled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunDirectory.open(folder / "made" / "refill")
    replay_runs.forbid(monkeypatch)
    alone = replay_runs.run("refill", tmp_path, *UNEVEN, rollouts_from=made.path)
    assert sampled_in(alone) == sampled_in(made)
    assert any(not row["kept"] for row in sampled_in(made))
    for one, two in zip(steps_of(alone), steps_of(made), strict=True):
        moved = ("optim/moved_share",)  # of weights by a gradient of zero and its rounding, too
        alike = [{k: v for k, v in record.items() if k not in moved} for record in (one, two)]
        assert alike[0] == pytest.approx(alike[1], rel=1e-5, abs=1e-6)


def sampled_in(run: RunDirectory) -> list[dict[str, Any]]:
    """Every recorded sample, without what was computed from it."""
    rows = [row for rows in rollouts_of(run) for row in rows]
    return [{key: value for key, value in row.items() if key != "advantage"} for row in rows]
