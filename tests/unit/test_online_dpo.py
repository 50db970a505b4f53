"""Online DPO: which completions become pairs, and that the rest is DPO on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import catch_gradients, parts_of, recipe_of, run
from tiny_runs import events_of, metrics_of, rollouts_of, steps_of

from alignment.config.counts import describe_counts
from alignment.runs.metrics import MetricSums
from alignment.trainers.dpo import DPOTrainer
from alignment.trainers.experience import shaped_rewards
from alignment.trainers.online_dpo import COMPARISONS, OnlineDPOTrainer, Paired, pair_up
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    PairBatch,
    Prompt,
    RewardedCompletion,
    StopReason,
    UserInputError,
)

NAN = float("nan")


def items(n: int, *, same: Sequence[int] = ()) -> list[RewardedCompletion]:
    """`n` completions of one prompt, each its own token; those in `same` are one."""
    prompt = Prompt((1, 2), "", 0)
    made = []
    for i in range(n):
        ids = (99,) if i in same else (i,)
        completion = Completion(0, i, ids, (-1.0,), StopReason.STOP, 0, "")
        made.append(RewardedCompletion(prompt, completion, 0.0, Outcome.SCORED, {}))
    return made


def paired(rewards: Sequence[float], kind: str, *, same: Sequence[int] = ()) -> Paired:
    group = items(len(rewards), same=same)
    # Two other completions come before the group in the rollout.
    return pair_up(group, 2, [0.0, 0.0, *rewards], kind, random.Random(0))


@pytest.mark.parametrize(
    ("rewards", "pairs", "n_tied", "n_failed"),
    [
        ((0.1, 0.9, 0.5), [(3, 2)], 0, 0),
        ((0.5, 0.5, 0.5), [], 1, 0),
        ((NAN, 0.9, 0.5), [(3, 4)], 0, 1),
        ((NAN, 0.9, NAN), [], 0, 2),
        ((NAN, NAN, NAN), [], 0, 3),
        ((0.9, 0.1, 0.9, 0.1), [(2, 3)], 0, 0),  # the first of each
    ],
)
def test_best_against_worst(
    rewards: tuple[float, ...], pairs: list[tuple[int, int]], n_tied: int, n_failed: int
) -> None:
    assert paired(rewards, "best_worst") == Paired(pairs, n_tied, n_failed)


def test_all_against_all() -> None:
    found = paired((0.1, 0.9, 0.1, NAN), "all_pairs")
    assert found == Paired([(3, 2), (3, 4)], 1, 1)


def test_equal_completions_are_no_pair_whatever_their_rewards() -> None:
    assert paired((0.1, 0.9), "best_worst", same=(0, 1)) == Paired([], 1, 0)


def test_a_random_pair_is_random_and_in_order_of_reward() -> None:
    rewards = [0.0, 0.1, 0.2, 0.3]
    seen = set()
    for seed in range(60):
        found = pair_up(items(4), 0, rewards, "random_pair", random.Random(seed))
        ((chosen, rejected),) = found.pairs
        assert rewards[chosen] > rewards[rejected]
        seen.add((chosen, rejected))
    assert len(seen) == 6


def test_the_recipe_names_what_the_table_has(tmp_path: Path) -> None:
    for kind in COMPARISONS:
        recipe_of("online_dpo", tmp_path, f"algorithm.pairs={kind}")
    with pytest.raises(UserInputError, match="did you mean 'best_worst'") as refused:
        recipe_of("online_dpo", tmp_path, "algorithm.pairs=best_wost")
    assert all(kind in str(refused.value) for kind in COMPARISONS)


# -- steps ------------------------------------------------------------------------------------


def test_a_step_is_one_of_dpo_on_its_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = catch_gradients(monkeypatch)
    settings = ("algorithm.pairs=all_pairs", "algorithm.loss={kind: ipo, beta: 0.2}")
    context = parts_of("online_dpo", tmp_path, *settings)
    online = OnlineDPOTrainer(context)
    rollout = online.collect(1, MetricSums())
    (samples,) = online.pairs(
        rollout, shaped_rewards(rollout, max_new_tokens=1).tolist(), MetricSums()
    )
    fresh = OnlineDPOTrainer(parts_of("online_dpo", tmp_path, *settings))
    metrics = fresh.step(1).metrics.result()

    n = len(samples) // 2
    offline = parts_of(
        "dpo",
        tmp_path,
        f"algorithm={{type: dpo, steps: 1, pairs_per_step: {n}, loss: {{kind: ipo, beta: 0.2}}}}",
    )
    pairs = PairBatch(tuple(samples[::2]), tuple(samples[1::2]))
    order = type(offline.order)(n, seed=0, shuffle=False)
    offline = replace(offline, train=replace(offline.train, pairs=pairs), order=order)
    theirs = DPOTrainer(offline).step(1).metrics.result()

    assert n > 6
    assert metrics["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    for name in ("logps/chosen", "logps/rejected", "reward/margin"):
        assert metrics[f"dpo/{name}"] == pytest.approx(theirs[f"dpo/{name}"], abs=1e-5)
    ours, others = gradients
    for name, gradient in others.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", COMPARISONS)
def test_pairs_are_counted(tmp_path: Path, kind: str) -> None:
    directory = run("online_dpo", tmp_path, f"algorithm.pairs={kind}", "algorithm.group_size=4")
    compared = 6 if kind == "all_pairs" else 1
    for record, rows in zip(metrics_of(directory), rollouts_of(directory), strict=True):
        per_prompt, tied = record["pairs/per_prompt"], record["pairs/tied"]
        assert per_prompt == pytest.approx(compared * (1 - tied))
        assert record["pairs/failed"] == 0.0
        if kind == "best_worst":
            groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
            spread = [len({row["reward"] for row in group}) > 1 for group in groups]
            assert per_prompt == sum(spread) / len(spread)


def test_failed_completions_are_in_no_pair(tmp_path: Path) -> None:
    directory = run(
        "online_dpo",
        tmp_path,
        "algorithm.group_size=6",
        "algorithm.pairs=all_pairs",
        "rewards=[{type: 'tiny_runs:FailsOn', samples: [4]}]",
    )
    for record in metrics_of(directory):
        assert record["pairs/failed"] == pytest.approx(1 / 6)
        assert record["unscorable/crash"] == pytest.approx(1 / 6)
        assert record["pairs/per_prompt"] <= 10  # of 5 completions


def test_a_constant_reward_is_diagnosed_and_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="nothing could be learned in 2 steps in a row"):
        run(
            "online_dpo",
            tmp_path,
            "rewards=[{type: 'tiny_runs:constant'}]",
            "algorithm.steps=9",
            "limits.idle_steps=2",
        )


def test_several_updates_share_out_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = parts_of("online_dpo", tmp_path, "algorithm.updates_per_step=2")
    trainer = OnlineDPOTrainer(context)
    batches: list[int] = []
    original = trainer.update.__call__

    def watched(step: int, samples: Any, *rest: Any, **options: Any) -> None:
        batches.append(len({sample.prompt_ids for sample in samples}))
        original(step, samples, *rest, **options)

    monkeypatch.setattr(trainer.learn, "_update", watched)
    first = trainer.step(1).metrics.result()
    assert batches == [2, 2]
    assert trainer.update.policy_version == 2
    # The reference was scored before both updates, and the second's policy has moved on.
    assert first["dpo/reward/margin"] != 0.0


def test_iterative_dpo_starts_anew_each_time_the_reference_is_synced(tmp_path: Path) -> None:
    directory = run(
        "online_dpo",
        tmp_path,
        "algorithm.steps=6",
        "model.reference={mode: synced, every: 2}",
        "optim.lr=1e-2",
    )
    margins = [record["dpo/reward/margin"] for record in metrics_of(directory)]
    assert [margin == 0.0 for margin in margins] == [True, False] * 3


def test_a_penalty_for_cut_off_completions(tmp_path: Path) -> None:
    plain, penalized = (
        metrics_of(run("online_dpo", tmp_path / str(i), *settings))[0]
        for i, settings in enumerate([(), ("algorithm.truncation_penalty=0.5",)])
    )
    cut_off = plain["completion/cut_off"]
    assert cut_off > 0.5
    assert penalized["reward/mean"] == pytest.approx(plain["reward/mean"] - 0.5 * cut_off)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_i14_the_engine_is_compared_at_its_own_temperature(
    tmp_path: Path, temperature: float
) -> None:
    settings = (f"rollout.temperature={temperature}", "rollout.top_k=40")
    for record in metrics_of(run("online_dpo", tmp_path, *settings)):
        assert record["engine/logprob_gap_max"] < 1e-4


def test_without_a_reference(tmp_path: Path) -> None:
    loss = "algorithm.loss={kind: simpo}"
    directory = run("online_dpo", tmp_path, loss, "model.reference=none")
    assert all(record["optim/grad_norm"] > 0.0 for record in metrics_of(directory))
    assert not events_of(directory, "warning")


def test_a_run_is_reproducible(tmp_path: Path) -> None:
    setting = "algorithm.pairs=random_pair"
    one, other = (run("online_dpo", tmp_path / name, setting) for name in "ab")
    assert steps_of(one) == steps_of(other)


def test_counts_and_bad_input(tmp_path: Path) -> None:
    recipe = recipe_of("online_dpo", tmp_path, "algorithm.pairs=all_pairs")
    assert describe_counts(recipe)[0] == (
        "4 prompts x 3 completions = 12 samples a step, paired into at most 12 pairs, 1 update; "
        "2 steps = 24 samples, 2 updates"
    )
    with pytest.raises(UserInputError, match="3 updates do not divide 4 prompts"):
        recipe_of("online_dpo", tmp_path, "algorithm.updates_per_step=3")
    with pytest.raises(UserInputError, match="a number of at least 2"):
        recipe_of("online_dpo", tmp_path, "algorithm.group_size=1")
    with pytest.raises(UserInputError, match="rewards: required by online_dpo"):
        recipe_of("online_dpo", tmp_path, "rewards=[]")
