"""Invariants of what methods do with their rollouts: engine and trainer agree, sampled ids are
trained on, and a run that learns nothing says why and stops."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ppo_runs
import pytest
from tiny_runs import events_of, metrics_of, rollouts_of, run
from typer.testing import CliRunner

from alignment.cli import app
from alignment.losses import TokenLoss, ppo_clip_loss
from alignment.modeling.load import load_tokenizer
from alignment.rollout.native import NativeEngine
from alignment.runs.directory import RunDirectory
from alignment.trainers.group_relative import POLICY_LOSSES
from alignment.trainers.update import Updater
from alignment.types import AlignmentError, Completion, SamplingParams

SAMPLING: dict[str, Callable[..., RunDirectory]] = {
    "grpo": partial(run, "grpo"),
    "ppo": ppo_runs.run,
}
"""Methods whose trainers have their own code between a rollout and its updates."""


# -- engine and trainer -----------------------------------------------------------------------


def _shift_logprobs(monkeypatch: pytest.MonkeyPatch, shift: float, from_step: int) -> None:
    generate = NativeEngine.generate

    def shifted(self: NativeEngine, prompts: Any, params: SamplingParams) -> list[Completion]:
        by = shift if params.step >= from_step else 0.0
        return [
            replace(c, sampling_logprobs=tuple(p + by for p in c.sampling_logprobs))
            for c in generate(self, prompts, params)
        ]

    monkeypatch.setattr(NativeEngine, "generate", shifted)


@pytest.mark.parametrize("method", SAMPLING)
def test_i14_engine_gap_is_logged_warned_of_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    _shift_logprobs(monkeypatch, 1.0, from_step=2)
    with pytest.raises(AlignmentError, match=r"step 4: .* 1\.000 nats a token"):
        SAMPLING[method](tmp_path, "algorithm.steps=9")
    directory = RunDirectory.open(tmp_path / method)
    gaps = [record["engine/logprob_gap"] for record in metrics_of(directory)]
    assert gaps == pytest.approx([0.0, 1.0, 1.0], abs=1e-4)
    assert [event["step"] for event in events_of(directory, "warning")] == [2, 3, 4]


# -- ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SAMPLING)
def test_i34_trained_ids_are_the_sampled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Random bytes are seldom UTF-8: the text of most completions is that of other ids."""
    sampled: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    trained: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    generate, update = NativeEngine.generate, Updater.__call__

    def sampling(self: NativeEngine, prompts: Any, params: SamplingParams) -> list[Completion]:
        completions = generate(self, prompts, params)
        owners = [prompt for prompt in prompts for _ in range(params.n)]
        for owner, completion in zip(owners, completions, strict=True):
            sampled.append((owner.token_ids, completion.token_ids))
        return completions

    def training(self: Updater, step: int, samples: Any, *rest: Any) -> None:
        rows = trained.setdefault(self._prefix, [])
        rows += [(sample.prompt_ids, sample.completion_ids) for sample in samples]
        update(self, step, samples, *rest)

    monkeypatch.setattr(NativeEngine, "generate", sampling)
    monkeypatch.setattr(Updater, "__call__", training)
    once = ("algorithm.updates_per_step=2", "algorithm.epochs_per_step=1", "algorithm.steps=2")
    SAMPLING[method](tmp_path, *once)
    assert list(trained) == (["", "critic/"] if method == "ppo" else [""])
    for rows in trained.values():
        assert rows == sampled
    tokenizer: Any = load_tokenizer("tiny-random")
    changed = [tuple(tokenizer.encode(tokenizer.decode(ids))) != ids for _, ids in sampled]
    assert sum(changed) > 0.5 * len(changed)


# -- nothing to learn from --------------------------------------------------------------------


def test_i41_a_constant_reward_is_diagnosed_and_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="nothing could be learned in 4 steps in a row") as no:
        run(
            "grpo",
            tmp_path,
            "rewards=[{type: 'tiny_runs:constant'}]",
            "algorithm.steps=20",
            "limits.idle_steps=4",
        )
    assert "every reward is 0.5" in str(no.value)
    directory = RunDirectory.open(tmp_path / "grpo")
    first = [event for event in events_of(directory, "diagnosis") if event["step"] == 1]
    assert any("every reward is 0.5" in event["message"] for event in first)
    for record in metrics_of(directory):
        assert record["groups/with_spread"] == 0.0
        assert record["optim/grad_norm"] == 0.0


@pytest.mark.parametrize("method", SAMPLING)
def test_i41_a_gradient_of_zero_is_diagnosed_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def flat(loss_of: Callable[..., TokenLoss]) -> Callable[..., TokenLoss]:
        def constant(*arguments: Any, **options: Any) -> TokenLoss:
            loss = loss_of(*arguments, **options)
            return replace(loss, per_token=loss.per_token * 0.0)

        return constant

    monkeypatch.setitem(POLICY_LOSSES, "clip", flat(POLICY_LOSSES["clip"]))
    monkeypatch.setattr("alignment.trainers.ppo.ppo_clip_loss", flat(ppo_clip_loss))
    reason = "the gradient is exactly zero"
    with pytest.raises(AlignmentError, match=f"learned in 3 steps in a row: {reason}"):
        # Not all are cut off, which would be another reason.
        ends = "rollout.stop=[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]"
        SAMPLING[method](tmp_path, ends, "algorithm.steps=20", "limits.idle_steps=3")
    directory = RunDirectory.open(tmp_path / method)
    diagnoses = [event["message"] for event in events_of(directory, "diagnosis")]
    assert diagnoses == [f"step {step}: {reason}" for step in (1, 2, 3)]
    assert [record["optim/grad_norm"] for record in metrics_of(directory)] == [0.0, 0.0]
    for rows in rollouts_of(directory):  # the rewards are not the reason
        groups = {row["prompt_index"] for row in rows}
        assert len({(row["prompt_index"], row["reward"]) for row in rows}) > len(groups)


def test_i41_a_constant_reward_is_diagnosed_in_ppo_which_learns_all_the_same(
    tmp_path: Path,
) -> None:
    """It compares tokens with what the critic expected, not completions with one another."""
    fixed = "rewards=[{type: 'tiny_runs:constant'}]"
    directory = ppo_runs.run(tmp_path, fixed, "limits.idle_steps=1")
    diagnoses = [event["message"] for event in events_of(directory, "diagnosis")]
    assert any("step 1: every reward is 0.5" in message for message in diagnoses)
    assert min(record["optim/grad_norm"] for record in metrics_of(directory)) > 0.0


@pytest.mark.parametrize("method", SAMPLING)
def test_i41_completions_all_cut_off_are_diagnosed(tmp_path: Path, method: str) -> None:
    directory = SAMPLING[method](tmp_path, "rollout.max_new_tokens=1")
    assert metrics_of(directory)[0]["completion/cut_off"] == 1.0
    (event,) = (e for e in events_of(directory, "diagnosis") if "cut off" in e["message"])
    assert event["step"] == 1
    assert "raise rollout.max_new_tokens" in event["message"]


def test_i41_three_samples_of_the_first_step_are_shown(tmp_path: Path) -> None:
    settings = ["algorithm.steps=2", "expect=[]", f"run.dir={tmp_path}"]
    result = CliRunner().invoke(app, ["train", "tiny/grpo", *settings])
    assert result.exit_code == 0, result.output
    assert re.findall(r"samples of step (\d+)", result.output) == ["1"]
    shown = re.findall(r"^│ +[\d.]+ │ (?:correct|incorrect|scored) +│", result.output, re.MULTILINE)
    assert len(shown) == 3
