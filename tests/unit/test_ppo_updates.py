"""PPO: the rollout of a step, its minibatches, and the updates on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import (
    CRITICS,
    GRADES,
    LENGTHS,
    keep_gradients,
    made_up,
    moved_trainer,
    run,
    trainer_of,
    updates_of,
)
from tiny_runs import metrics_of
from torch import Tensor

from alignment.rollout.native import NativeEngine
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import minibatch_slices
from alignment.trainers.minibatches import Minibatch, Targets, shuffled_rows
from alignment.types import Completion, SamplingParams, StopReason

# -- the rollout ------------------------------------------------------------------------------


def test_a_step_samples_whole_episodes_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each to its end token or to the limit; the next step begins new ones."""
    asked: list[tuple[int, int]] = []
    generate = NativeEngine.generate

    def watched(self: NativeEngine, prompts: Any, params: SamplingParams) -> list[Completion]:
        asked.append((len(prompts), params.n))
        return generate(self, prompts, params)

    monkeypatch.setattr(NativeEngine, "generate", watched)
    trainer = trainer_of(tmp_path, "rollout={max_new_tokens: 40, temperature: 1.9}")
    end = trainer.context.tokenizer.eos_token_id
    reasons, prompts = set(), []
    for step in (1, 2):
        items = trainer.collect(step, MetricSums()).items
        prompts += [item.prompt.index for item in items]
        for item in items:
            *before, last = item.completion.token_ids
            reasons.add(item.completion.stop_reason)
            assert end not in before
            assert (last == end) == (item.completion.stop_reason is StopReason.STOP)
            assert last == end or len(before) == 39
    assert asked == [(4, 2), (4, 2)]
    assert prompts == [number for number in range(8) for _ in range(2)]
    assert reasons == {StopReason.STOP, StopReason.LENGTH}


def test_completions_say_how_many_updates_are_behind_them(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    versions = []
    for step in (1, 2):
        rollout = trainer.step(step).rollout
        assert rollout is not None
        versions.append({item.completion.policy_version for item in rollout.items})
    assert versions == [{0}, {4}]  # two passes of two minibatches


# -- minibatches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_groups", "n_parts", "group_size"), [(8, 4, 1), (6, 2, 3), (1, 1, 2)])
def test_a_pass_takes_every_row_once(n_groups: int, n_parts: int, group_size: int) -> None:
    groups = [7 * i + 3 for i in range(n_groups)]
    parts = shuffled_rows(groups, groups, n_parts, group_size, key=1)
    assert sorted(row for part in parts for row in part) == list(range(n_groups * group_size))
    assert {len(part) for part in parts} == {n_groups * group_size // n_parts}
    for part in parts:  # completions of one prompt stay together, and share its computation
        for row in part:
            first = row - row % group_size
            assert set(range(first, first + group_size)) <= set(part)


def test_a_pass_shuffles_anew() -> None:
    groups = list(range(16))
    passes = [shuffled_rows(groups, groups, 4, 1, key) for key in range(5)]
    made = {tuple(map(tuple, parts)) for parts in passes}
    drawn = [list(range(16))[part] for part in minibatch_slices(groups, groups, 4, 1)]
    assert len(made) == 5
    assert drawn not in passes
    assert passes[0] == shuffled_rows(groups, groups, 4, 1, 0)


def test_minibatches_do_not_depend_on_who_holds_what() -> None:
    everyones = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]  # of rank 0, then of rank 1
    whole = shuffled_rows(list(range(10)), everyones, 5, 1, key=3)
    ranks = [list(range(rank, 10, 2)) for rank in (0, 1)]
    shares = [shuffled_rows(own, everyones, 5, 1, key=3) for own in ranks]
    for part in range(5):
        held = [own[row] for own, parts in zip(ranks, shares, strict=True) for row in parts[part]]
        assert sorted(held) == sorted(whole[part])


def test_a_step_makes_all_its_passes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "algorithm.epochs_per_step=3", "algorithm.prompts_per_step=8")
    rollout = trainer.collect(1, MetricSums())
    rows = [list(part) for part in trainer.minibatches(rollout)]
    assert rows[:2] == [list(range(8)), list(range(8, 16))]  # as they were drawn and recorded
    for number in range(3):
        assert sorted(rows[2 * number] + rows[2 * number + 1]) == list(range(16))
    assert len({tuple(map(tuple, rows[i : i + 2])) for i in (0, 2, 4)}) == 3
    assert [list(part) for part in trainer.minibatches(rollout)] == rows
    other = trainer.collect(2, MetricSums())
    assert [list(part) for part in trainer.minibatches(other)] != rows


def test_a_minibatch_without_a_grade_makes_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizers' moments and counts would move on, though there is nothing to learn."""
    made = keep_gradients(monkeypatch)
    trainer = moved_trainer(tmp_path, "algorithm.updates_per_step=2", "algorithm.stop_kl=9.0")
    grades = (None, None, None, 0.6, 0.4, 0.1)
    metrics, _ = updates_of(trainer, made_up(trainer, grades, LENGTHS), made)
    assert len(made) == 2  # the second minibatch's, of policy and critic
    assert trainer.update.policy_version == 1
    assert metrics["optim/grad_norm"] > 0.0


def test_the_recorded_advantage_is_the_mean_over_the_tokens_that_count() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    advantages = torch.tensor([[1.0, 2.0, 6.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    targets = Targets(advantages, advantages, advantages, mask)
    assert targets.mean_advantages() == [3.0, -4.0, 0.0]


# -- learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "expected"), [((), 3e-3), (("critic.lr=1e-2",), 1e-2)])
def test_a_separate_critic_has_a_learning_rate_of_its_own(
    tmp_path: Path, settings: tuple[str, ...], expected: float
) -> None:
    own = [f"algorithm.{setting}" for setting in settings]
    off = "algorithm.critic={lr: null}"  # the recipe has one
    metrics = trainer_of(tmp_path, off, *own).step(1).metrics.result()
    assert metrics["optim/lr"] == 3e-3
    assert metrics["critic/optim/lr"] == expected


# -- clipping ---------------------------------------------------------------------------------


def length_of(gradient: dict[str, Tensor]) -> float:
    squares = [float(part.double().square().sum()) for part in gradient.values()]
    return float(sum(squares) ** 0.5)


@pytest.mark.parametrize("critic", CRITICS)
def test_policy_and_critic_are_clipped_each_by_its_own_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """A shared critic has no norm of its own: its head counts into the policy's."""
    made = keep_gradients(monkeypatch)
    # Large ones, which the critic sees and white advantages do not.
    grades = [None if grade is None else 5.0 * grade for grade in GRADES]

    def updated(limit: float) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        norm = f"optim.max_grad_norm={limit!r}"
        trainer = moved_trainer(tmp_path / str(limit), *CRITICS[critic], norm)
        return updates_of(trainer, made_up(trainer, grades, LENGTHS), made)

    _, free = updated(1e9)
    norms = [length_of(gradient) for gradient in free]
    names = ["optim/grad_norm", "critic/optim/grad_norm"][: len(free)]
    assert len(norms) == (1 if critic == "shared" else 2)
    assert ("value_head.weight" in free[0]) == (critic == "shared")
    assert critic == "shared" or norms[1] > 1.5 * norms[0]
    for limit in (0.5 * min(norms), 0.9 * max(norms)):  # both too long, and only the longer one
        metrics, clipped = updated(limit)
        for name, norm, before, after in zip(names, norms, free, clipped, strict=True):
            assert metrics[name] == pytest.approx(norm, rel=1e-4)  # as it was before
            for part, gradient in before.items():
                expected = gradient * min(1.0, limit / norm)
                torch.testing.assert_close(after[part], expected, rtol=1e-4, atol=1e-7 * limit)
        assert names[1:] or "critic/optim/grad_norm" not in metrics


# -- early stop -------------------------------------------------------------------------------


def test_stop_kl_ends_the_step(tmp_path: Path) -> None:
    def updates(folder: str, *settings: str) -> tuple[int, int, float | None]:
        trainer = trainer_of(tmp_path / folder, "algorithm.epochs_per_step=4", *settings)
        metrics = trainer.step(1).metrics.result()
        critic = trainer.update_critic
        assert critic is not None
        stopped = metrics.get("policy/stopped_early")
        return trainer.update.policy_version, critic.policy_version, stopped

    assert updates("off") == (8, 8, None)
    assert updates("far", "algorithm.stop_kl=50.0") == (8, 8, 0.0)
    # The first minibatch finds no distance; the second finds the first update's.
    assert updates("near", "algorithm.stop_kl=1e-7") == (2, 2, 1.0)


@pytest.mark.parametrize(
    ("distances", "n_made", "stopped"),
    [
        ([0.0, 0.1, 0.5, 0.0], 3, 1.0),  # 0.2 in the mean of the step so far
        ([0.0, 0.1, 0.2, 0.5], 4, 0.0),  # nothing is left that could be left out
    ],
)
def test_a_far_minibatch_ends_a_step_that_has_others_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    distances: list[float],
    n_made: int,
    stopped: float,
) -> None:
    trainer = trainer_of(tmp_path, "algorithm.stop_kl=0.3")
    made: list[Minibatch] = []

    def update(batch: Minibatch, metrics: MetricSums) -> None:
        metrics.add("policy/approx_kl", distances[len(made)] * batch.n_tokens, batch.n_tokens)
        made.append(batch)

    monkeypatch.setattr(trainer, "update_policy", update)
    metrics = trainer.step(1).metrics.result()
    assert len(made) == n_made
    assert metrics["policy/stopped_early"] == stopped


def test_the_distance_is_the_mean_over_the_tokens_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the ranks would disagree about the end of a step, and wait for each other forever."""
    trainer = trainer_of(tmp_path, "algorithm.stop_kl=0.3")
    measured = MetricSums()
    measured.add("policy/approx_kl", 0.6, 3)
    assert not trainer.is_far(measured)  # 0.2 a token

    def with_another(total: float, count: float) -> bool:
        def both(sums: tuple[float, float]) -> list[float]:
            return [sums[0] + total, sums[1] + count]

        monkeypatch.setattr(trainer.distributed, "sum", both)
        return trainer.is_far(measured)

    assert with_another(1.2, 1)  # 1.8 over 4 tokens
    assert not with_another(0.5, 1)
    monkeypatch.setattr(trainer.distributed, "sum", list)
    assert not trainer.is_far(MetricSums())  # no token, as in the critic's warm-up


# -- the entropy bonus ------------------------------------------------------------------------


def test_the_entropy_bonus_raises_the_entropy(tmp_path: Path) -> None:
    """A cold policy, so that there is room above."""

    def entropies(coef: float) -> list[float]:
        settings = (
            "rewards=[{type: 'tiny_runs:constant'}]",
            "algorithm.kl.coef=0.0",
            "algorithm.steps=4",
            f"algorithm.entropy_coef={coef}",
            "rollout.temperature=0.3",
        )
        records = metrics_of(run(tmp_path / str(coef), *settings))
        return [record["policy/entropy"] for record in records]

    up, down = entropies(5.0), entropies(-5.0)
    assert up[-1] > up[0] + 0.05
    assert down[-1] < down[0] - 0.05
