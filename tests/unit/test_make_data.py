"""Data sets out of a policy's own samples: which completions become rows, and with which labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from alignment.config.load import load_recipe
from alignment.config.methods.make_data import PreferenceSamplingConfig, RejectionSamplingConfig
from alignment.config.schema import Recipe
from alignment.runs.metrics import MetricSums, read_metrics
from alignment.trainers.make_data import DataMaker, demonstrations, preferences
from alignment.trainers.run import train
from alignment.types import (
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    StopReason,
    UserInputError,
)


def item(
    text: str, reward: float | None, *, cut: bool = False, prompt: int = 3
) -> RewardedCompletion:
    completion = Completion(
        prompt_index=prompt,
        sample_index=0,
        token_ids=(1,),
        sampling_logprobs=(0.0,),
        stop_reason=StopReason.LENGTH if cut else StopReason.STOP,
        policy_version=0,
        text=text,
    )
    outcome = Outcome.SCORED if reward is not None else Outcome.CRASH
    row = {"question": "Why?", "answer": "x"}
    return RewardedCompletion(Prompt((1,), "Why?", prompt, row), completion, reward, outcome, {})


def rejection(**options: Any) -> RejectionSamplingConfig:
    return RejectionSamplingConfig(
        type="rejection_sampling", prompts_per_step=2, samples_per_prompt=4, **options
    )


def preference(**options: Any) -> PreferenceSamplingConfig:
    return PreferenceSamplingConfig(
        type="preference_sampling", prompts_per_step=2, samples_per_prompt=4, **options
    )


GROUP = [item("a", 0.5), item("b", 2.0), item("c", None), item("d", 2.0), item("e", 1.0, cut=True)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["b"]),
        ({"keep": 2}, ["b", "d"]),
        ({"keep": 4}, ["b", "d", "a"]),
        ({"keep": 4, "keep_cut_off": True}, ["b", "d", "e", "a"]),
        ({"keep": 4, "minimum": 1.0}, ["b", "d"]),
        ({"minimum": 3.0}, []),
    ],
)
def test_the_best_completions_become_demonstrations(
    options: dict[str, Any], kept: list[str]
) -> None:
    rows = demonstrations(GROUP, rejection(**options), 0, MetricSums())
    assert [row["completion"] for row in rows] == kept
    assert all(row["prompt"] == "Why?" for row in rows)


def test_neighbours_are_paired_and_the_higher_reward_is_chosen() -> None:
    group = [item("a", 1.0), item("b", 2.0), item("c", 3.0), item("d", 0.0)]
    rows = preferences(group, preference(), 0, MetricSums())
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "a"), ("c", "d")]
    assert [(row["reward_chosen"], row["reward_rejected"]) for row in rows] == [(2, 1), (3, 0)]


def test_best_and_worst_make_one_pair() -> None:
    group = [item("a", 1.0), item("b", 2.0), item("c", 3.0), item("d", 0.0)]
    (row,) = preferences(group, preference(pairs="best_worst"), 0, MetricSums())
    assert (row["chosen"], row["rejected"]) == ("c", "d")


def test_ties_equal_texts_and_cut_off_completions_make_no_pair() -> None:
    metrics = MetricSums()
    assert preferences([item("a", 1.0), item("b", 1.0)], preference(), 0, metrics) == []
    assert preferences([item("a", 1.0), item("a", 2.0)], preference(), 0, metrics) == []
    assert preferences([item("a", 1.0), item("b", 1.2)], preference(min_gap=0.3), 0, metrics) == []
    assert metrics.result()["made/tied_pairs"] == 3
    assert preferences([item("a", 1.0), item("b", 2.0, cut=True)], preference(), 0, metrics) == []
    assert preferences([item("a", 1.0), item("  ", 2.0)], preference(), 0, metrics) == []


@pytest.mark.parametrize(
    ("pairs", "texts", "left_out"),
    [
        ("neighbours", "abcd", {}),
        ("best_worst", "abcd", {}),  # the two in the middle are not meant to be paired
        ("neighbours", "ab ~?a", {"blank": 1, "cut_off": 1, "failed": 1, "unpaired": 1}),
        ("best_worst", "ab ~?a", {"blank": 1, "cut_off": 1, "failed": 1}),
        ("neighbours", "a   ", {"blank": 3, "unpaired": 1}),
        ("best_worst", "a???", {"failed": 3, "unpaired": 1}),
        ("best_worst", "~~~~", {"cut_off": 4}),
    ],
)
def test_completions_that_come_into_no_pair_are_counted(
    pairs: str, texts: str, left_out: dict[str, int]
) -> None:
    """Of `texts`: " " is blank, "~" cut off, "?" without a reward; the others are usable."""
    group = [
        item(text, None if text == "?" else float(place), cut=text == "~")
        for place, text in enumerate(texts)
    ]
    metrics = MetricSums()
    preferences(group, preference(pairs=pairs), 0, metrics)
    reasons = ("blank", "cut_off", "failed", "unpaired")
    counted = {name: n for name, n in metrics.counts.items() if name != "made/tied_pairs"}
    assert counted == {f"made/left_out/{reason}": left_out.get(reason, 0) for reason in reasons}


def chosen_share(config: PreferenceSamplingConfig, difference: float, n: int = 4000) -> float:
    """How often the first of two is chosen, over many prompts."""
    chosen = 0
    for prompt in range(n):
        group = [item("a", difference, prompt=prompt), item("b", 0.0, prompt=prompt)]
        (row,) = preferences(group, config, 0, MetricSums())
        chosen += row["chosen"] == "a"
    return chosen / n


def test_labels_are_turned_round_as_often_as_asked() -> None:
    # Three standard deviations of a share of 0.1 over 4,000 draws.
    assert chosen_share(preference(flip=0.1), 1.0) == pytest.approx(0.9, abs=0.0143)


def test_labels_follow_bradley_and_terry() -> None:
    expected = 1 / (1 + math.exp(-0.8 / 0.5))
    assert chosen_share(preference(temperature=0.5), 0.8) == pytest.approx(expected, abs=0.018)


def test_labels_do_not_depend_on_what_else_is_sampled() -> None:
    config = preference(flip=0.4)
    pair = [item("a", 1.0), item("b", 0.0)]
    alone = preferences(pair, config, 0, MetricSums())
    together = preferences([*pair, item("c", 1.0), item("d", 0.0)], config, 0, MetricSums())
    assert together[0] == alone[0]


# -- whole runs ---------------------------------------------------------------------------------


def recipe(folder: Path, *overrides: str) -> Recipe:
    loaded = load_recipe("tiny/preferences", [f"run.dir={folder}", "expect=[]", *overrides])
    assert isinstance(loaded, Recipe)
    return loaded


def test_a_single_pass_draws_every_prompt_once(tmp_path: Path) -> None:
    # 81 prompts in steps of 32: the last step has the 17 that are left.
    settings = ("algorithm.steps=null", "algorithm.prompts_per_step=32")
    run = train(recipe(tmp_path, *settings, "algorithm.samples_per_prompt=2"))
    rows = [json.loads(line) for line in run.data.read_text(encoding="utf-8").splitlines()]
    metrics = [r for r in read_metrics(run.metrics) if r["step"] > 0]
    assert len(metrics) == 3
    assert sum(r["made/rows"] for r in metrics) == len(rows)
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == len(set(prompts)) > 10
    assert not run.model_dir.exists()


def test_a_resumed_run_makes_the_same_rows(tmp_path: Path, monkeypatch: Any) -> None:
    whole = train(recipe(tmp_path / "whole"))
    again = recipe(tmp_path / "again", "checkpoint.every=1")
    collect = DataMaker.collect

    def fails_in_step_three(self: Any, step: int, metrics: MetricSums) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return collect(self, step, metrics)

    monkeypatch.setattr(DataMaker, "collect", fails_in_step_three)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.setattr(DataMaker, "collect", collect)
    resumed = train(again)
    assert resumed.data.read_bytes() == whole.data.read_bytes()


def test_more_kept_than_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5 of 4 samples .* cannot be kept"):
        rejection(keep=5)


def test_a_method_that_makes_data_needs_no_learning_rate(tmp_path: Path) -> None:
    assert recipe(tmp_path).optim.lr is None
    with pytest.raises(UserInputError, match="required by rejection_sampling"):
        recipe(
            tmp_path,
            "algorithm={type: rejection_sampling, prompts_per_step: 2, samples_per_prompt: 2}",
            "rewards=[]",
        )
