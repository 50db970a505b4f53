"""Keeping the best checkpoint beside the latest: by hand, and in a run that is killed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from saved_state import save_checkpoint
from test_resume import Interrupted, fail_when, settings_of
from tiny_runs import events_of, recipe_of, run

from alignment.config.counts import describe_counts
from alignment.runs.checkpoint import discard_checkpoints_after, list_checkpoints
from alignment.runs.checkpoint_writer import BestBy
from alignment.runs.metrics import MetricsWriter, read_metrics
from alignment.trainers.sft import SFTTrainer


def save_all(folder: Path, scores: dict[int, float], *, keep: int = 1, start: int = 1) -> list[int]:
    """Save steps `start` to 6, each knowing the scores of the steps up to it; what is left."""
    for step in range(start, 7):
        known = {at: score for at, score in scores.items() if at <= step}
        save_checkpoint(folder, step, {"step": step}, keep=keep, scores=known)
    return kept(folder)


def kept(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("scores", "keep", "left"),
    [
        ({1: 0.1, 2: 0.9, 3: 0.5, 4: 0.8}, 1, [2, 6]),
        ({1: 0.1, 2: 0.9, 3: 0.5, 4: 0.8}, 2, [2, 5, 6]),
        ({5: 1.0, 2: 0.5}, 2, [5, 6]),  # the best is among the latest: it counts as one of them
        ({2: 0.5, 4: 0.5}, 1, [4, 6]),  # of equals the later one
        ({2: math.nan, 3: -1.0}, 1, [3, 6]),
        ({2: math.nan}, 1, [6]),
        ({3: math.inf, 4: 5.0}, 1, [3, 6]),
        ({3: -math.inf}, 1, [3, 6]),
        ({0: 9.0, 7: 9.0}, 1, [6]),  # of steps that have no checkpoint
        ({}, 2, [5, 6]),
    ],
)
def test_the_best_stays_beside_the_latest(
    tmp_path: Path, scores: dict[int, float], keep: int, left: list[int]
) -> None:
    assert save_all(tmp_path, scores, keep=keep) == left


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    """A whole one with a lower score is kept in its place."""
    scores = {1: 0.5, 2: 0.9}
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2, scores=scores)
    (tmp_path / "step-000002" / "state.json").unlink()
    save_all(tmp_path, scores, start=3)
    assert kept(tmp_path) == [1, 6]


def test_what_a_resume_leaves_behind_is_not_the_best_any_more(tmp_path: Path) -> None:
    assert save_all(tmp_path, {2: 0.5, 6: 0.9}, keep=3) == [4, 5, 6]  # 6 took the place of 2
    discard_checkpoints_after(tmp_path, 4)
    assert save_all(tmp_path, {4: 0.1, 5: 0.0}, start=5) == [4, 6]


@pytest.mark.parametrize(
    ("mode", "scores"), [("max", {1: 3.0, 3: -2.0}), ("min", {1: -3.0, 3: 2.0})]
)
def test_scores_come_from_the_metrics_of_their_own_step(
    tmp_path: Path, mode: str, scores: dict[int, float]
) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step, values in ((1, {"m": 3.0}), (2, {"n": 1.0}), (3, {"m": -2.0}), (4, {"m": math.nan})):
        writer.write(step, values)
    writer.close()
    found = BestBy(tmp_path / "metrics.jsonl", "m", "max" if mode == "max" else "min").scores()
    assert math.isnan(found.pop(4))
    assert found == scores


BEST = (
    "eval={every: 2, tasks: [{type: held_out_loss}]}",
    "checkpoint.keep=1",
    "checkpoint.keep_best={metric: eval/held_out_loss/loss, mode: max}",  # the worst: an early one
)


def test_a_run_that_is_killed_keeps_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*settings_of("sft"), *BEST)
    whole = run("sft", tmp_path / "whole", *settings)
    losses = {
        record["step"]: record["eval/held_out_loss/loss"]
        for record in read_metrics(whole.metrics)
        if record["step"] in (2, 4, 6)
    }
    best = max(losses, key=lambda step: losses[step])
    assert best != 6
    assert kept(whole.checkpoints_dir) == [best, 6]
    for step in (4, 6):
        with monkeypatch.context() as patch:
            fail_when(patch, SFTTrainer, "step", step)
            with pytest.raises(Interrupted):
                run("sft", tmp_path, *settings)
    resumed = run("sft", tmp_path, *settings)
    assert [event["step"] for event in events_of(resumed, "resume")] == [3, 5]
    assert kept(resumed.checkpoints_dir) == [best, 6]
    assert not events_of(resumed, "warning")


def test_a_metric_that_is_never_measured_is_said_once(tmp_path: Path) -> None:
    mistyped = "checkpoint.keep_best={metric: eval/held_out_los/nll, mode: min}"
    result = run("sft", tmp_path, *settings_of("sft"), "checkpoint.keep=1", mistyped)
    (warning,) = events_of(result, "warning")
    assert "no step has measured 'eval/held_out_los/nll' so far" in warning["message"]
    assert kept(result.checkpoints_dir) == [6]


def test_the_counts_say_that_the_best_is_kept(tmp_path: Path) -> None:
    (line,) = [
        line
        for line in describe_counts(recipe_of("sft", tmp_path, *settings_of("sft"), *BEST))
        if "checkpoint" in line
    ]
    assert line.endswith("the last 1 are kept, and the one with the best eval/held_out_loss/loss")
