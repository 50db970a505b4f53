"""Invariants of PPO: ratios, values, rewards and masks, on the trainer itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import (
    CRITICS,
    FAILED,
    GRADES,
    LENGTHS,
    LORA,
    MADE_UP,
    assert_same_gradient,
    keep_gradients,
    made_up,
    moved_trainer,
    run,
    trainer_of,
    updates_of,
)
from tiny_runs import metrics_of, rollouts_of, steps_of, weights_of
from torch import Tensor

from alignment.advantages import gae
from alignment.losses import TokenLoss, clipped_value_loss, ppo_clip_loss
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import Experience, training_samples
from alignment.trainers.minibatches import Targets, loss_mask
from alignment.types import Rollout


@dataclass(frozen=True)
class Seen:
    """What a micro-batch's losses compare with what was recorded."""

    ratio: float  # largest distance from 1
    clip_fraction: float
    approx_kl: float


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What the policy loss is given, one entry a micro-batch, in order."""
    seen: list[Seen] = []

    def watched(own: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **how: Any) -> Any:
        loss: TokenLoss = ppo_clip_loss(own, old, advantages, mask, **how)
        clipped = sum(loss.metrics[f"clip_fraction/{side}"].value() for side in ("low", "high"))
        furthest = (own.detach() - old).exp().sub(1).abs()[mask].max()
        seen.append(Seen(float(furthest), clipped, loss.metrics["approx_kl"].value()))
        return loss

    monkeypatch.setattr("alignment.trainers.ppo.ppo_clip_loss", watched)
    return seen


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far the critic's values are from the recorded ones, one entry a micro-batch."""
    seen: list[float] = []

    def watched(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, **how: Any) -> Any:
        seen.append(float((values.detach() - old).abs()[mask].max()))
        return clipped_value_loss(values, old, returns, mask, **how)

    monkeypatch.setattr("alignment.trainers.critic.clipped_value_loss", watched)
    return seen


# -- ratios and values ------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_i13_first_minibatch_ratio_is_one(
    tmp_path: Path, ratios: list[Seen], moves: list[float], dtype: str, critic: str
) -> None:
    settings = (f"model.dtype={dtype}", "rollout.temperature=0.6", "algorithm.steps=3")
    run(tmp_path, *settings, *CRITICS[critic])
    assert len(ratios) == len(moves) == 3 * 4  # two passes of two minibatches
    for step in range(3):
        first, *later = ratios[4 * step : 4 * step + 4]
        assert first == Seen(0.0, 0.0, 0.0)
        assert max(seen.ratio for seen in later) > 1e-3
        assert moves[4 * step] == 0.0  # the first values are the recorded ones
        assert max(moves[4 * step + 1 : 4 * step + 4]) > 0.0


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_i10_temperature_is_in_the_logprobs(
    tmp_path: Path, ratios: list[Seen], temperature: float
) -> None:
    directory = run(tmp_path, f"rollout.temperature={temperature}")
    assert ratios[0].ratio < 1e-6
    assert ratios[4].ratio < 1e-6  # the first of the second step
    for record in metrics_of(directory):
        assert record["engine/logprob_gap_max"] < 1e-4


def test_i12_no_dropout_is_active(tmp_path: Path, ratios: list[Seen], moves: list[float]) -> None:
    dropped = (
        "model.lora={rank: 4, dropout: 0.5}",
        "algorithm.critic.lora={rank: 4, dropout: 0.5}",
    )
    run(tmp_path, *dropped)
    assert ratios[0].ratio == ratios[4].ratio == 0.0
    assert moves[0] == moves[4] == 0.0


@pytest.mark.parametrize("settings", [(), LORA], ids=["frozen copy", "adapter off"])
def test_i19_kl_of_the_first_step_is_zero(tmp_path: Path, settings: tuple[str, ...]) -> None:
    first, second = metrics_of(run(tmp_path, *settings))
    assert first["kl/mean"] == first["kl/sequence"] == 0.0
    assert first["objective/total"] == pytest.approx(first["objective/score"], abs=1e-7)
    assert abs(second["kl/mean"]) > 1e-6
    penalty = second["objective/score"] - second["objective/total"]
    assert penalty == pytest.approx(0.05 * second["kl/sequence"], abs=1e-6)


def test_i19_a_synced_reference_is_where_the_policy_is(tmp_path: Path) -> None:
    """It follows after the updates, so that the next rollout starts from it."""
    synced = "model.reference={mode: synced, every: 2}"
    kl = [record["kl/mean"] for record in metrics_of(run(tmp_path, synced, "algorithm.steps=4"))]
    assert kl[0] == kl[2] == 0.0  # measured before the step's updates: copied after step 2
    assert kl[1] != 0.0 and kl[3] != 0.0


@pytest.mark.parametrize("critic", CRITICS)
def test_i21_the_first_step_moves_policy_and_critic_and_not_the_reference(
    tmp_path: Path, critic: str
) -> None:
    trainer = trainer_of(tmp_path, *CRITICS[critic])
    parts = [slice(0, 6)]
    samples = training_samples(made_up(trainer, GRADES, LENGTHS), mask_truncated=False)

    def scored() -> list[Tensor]:
        policy = trainer.policy
        own = torch.cat(policy.logprobs(samples, 4096))
        reference = torch.cat(policy.logprobs(samples, 4096, of_reference=True))
        return [own, reference, torch.cat(trainer.critic.values(samples, parts))]

    before = scored()
    trainer.step(1)
    after = scored()
    assert not before[2].any()  # a head of zeros
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]


# -- rewards ----------------------------------------------------------------------------------


@pytest.fixture
def gae_inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rewards, values, mask) of each step."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(rewards: Tensor, values: Tensor, mask: Tensor, **how: Any) -> Any:
        seen.append((rewards, values, mask))
        return gae(rewards, values, mask, **how)

    monkeypatch.setattr("alignment.trainers.ppo.gae", watched)
    return seen


def test_i27_the_score_is_at_the_last_completion_token(
    tmp_path: Path, gae_inputs: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    fixed = "rewards=[{type: 'tiny_runs:constant', value: 0.5}]"
    directory = run(
        tmp_path,
        fixed,
        "algorithm.kl.coef=0.0",
        "rollout.max_new_tokens=40",
        "rollout.temperature=1.9",
    )
    lengths = set()
    for (rewards, _, mask), rows in zip(gae_inputs, rollouts_of(directory), strict=True):
        for row, reward, counts in zip(rows, rewards, mask, strict=True):
            length = len(row["completion_ids"])
            lengths.add(length)
            assert reward.nonzero().flatten().tolist() == [length - 1]
            assert reward[length - 1] == 0.5
            assert counts.tolist() == [t < length for t in range(len(counts))]
    assert len(lengths) > 1  # some rows have padding


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_i18_the_kl_penalty_is_at_every_token(tmp_path: Path, estimator: str) -> None:
    kl = f"algorithm.kl={{coef: 0.5, placement: reward, estimator: {estimator}}}"
    trainer = trainer_of(tmp_path, kl, *MADE_UP)
    samples = training_samples(made_up(trainer, (1.0, None, 2.0), (3, 2, 1)), mask_truncated=False)
    old = [torch.tensor(row) for row in ([-1.0, -2.0, -0.5], [-9.0, -9.0], [-0.3])]
    reference = [torch.tensor(row) for row in ([-1.2, -1.5, -0.9], [-1.0, -1.0], [-0.7])]
    metrics = MetricSums()
    experience = Experience(samples, [], old, reference)
    scores = torch.tensor([1.0, float("nan"), 2.0])
    rewards = trainer.token_rewards(scores, experience, loss_mask(samples), metrics)
    penalties = {
        # own - reference
        "k1": [[0.2, -0.5, 0.4], [0.4]],
        # exp(-d) - 1 + d of these: e^-0.2 = 0.818731, e^0.5 = 1.648721, e^-0.4 = 0.670320
        "k3": [[0.018731, 0.148721, 0.070320], [0.070320]],
    }[estimator]
    first, last = penalties
    expected = [[-0.5 * p for p in first], [0.0] * 3, [2.0 - 0.5 * last[0], 0.0, 0.0]]
    expected[0][2] += 1.0
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=0.0, atol=2e-6)
    result = metrics.result()
    # The failed completion is in neither mean.
    assert result["kl/mean"] == pytest.approx(sum(first + last) / 4, abs=2e-6)
    assert result["kl/sequence"] == pytest.approx(sum(first + last) / 2, abs=2e-6)
    assert result["objective/total"] == pytest.approx(1.5 - 0.25 * sum(first + last), abs=2e-6)


# -- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_i28_i29_poisoned_padding_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    made = keep_gradients(monkeypatch)
    trainer = moved_trainer(tmp_path, *CRITICS[critic], "algorithm.entropy_coef=0.1")
    rollout = made_up(trainer, GRADES, LENGTHS)

    def poisoned(targets: Targets) -> Targets:
        def put(x: Tensor) -> Tensor:
            return torch.where(targets.mask, x, float("nan"))

        return replace(
            targets,
            advantages=put(targets.advantages),
            returns=put(targets.returns),
            old_values=put(targets.old_values),
        )

    clean, gradients = updates_of(trainer, rollout, made)
    spoilt, others = updates_of(trainer, rollout, made, poisoned)
    assert spoilt == clean
    for got, expected in zip(others, gradients, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("critic", CRITICS)
def test_i28_a_failed_row_poisons_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """Whatever was recorded of a completion without a grade: NaN here."""
    made = keep_gradients(monkeypatch)
    trainer = moved_trainer(
        tmp_path,
        *CRITICS[critic],
        "algorithm.whiten_rewards=true",
        "algorithm.critic.normalize=true",
    )
    rollout = made_up(trainer, GRADES, LENGTHS)
    clean, gradients = updates_of(trainer, rollout, made)
    other = moved_trainer(
        tmp_path / "b",
        *CRITICS[critic],
        "algorithm.whiten_rewards=true",
        "algorithm.critic.normalize=true",
    )
    record, values = other.record, other.critic.values

    def spoilt_record(*arguments: Any) -> Experience:
        experience = record(*arguments)
        for rows in (experience.old_logprobs, experience.ref_logprobs):
            assert rows is not None
            rows[FAILED].fill_(float("nan"))
        return experience

    def spoilt_values(*arguments: Any) -> list[Tensor]:
        rows = values(*arguments)
        rows[FAILED].fill_(float("nan"))
        return rows

    monkeypatch.setattr(other, "record", spoilt_record)
    monkeypatch.setattr(other.critic, "values", spoilt_values)
    spoilt, others = updates_of(other, rollout, made)
    assert spoilt == clean
    for got, expected in zip(others, gradients, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("critic", CRITICS)
def test_i04_i47_a_failed_grader_is_as_if_it_was_not_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """Rewards, their moments, KL, whitening, policy and critic: none of them sees it."""
    made = keep_gradients(monkeypatch)
    settings = (
        *CRITICS[critic],
        "algorithm.normalize_rewards=true",
        "algorithm.whiten_rewards=true",
        "algorithm.kl={coef: 0.2, placement: reward, controller: adaptive, target: 1, horizon: 50}",
    )
    results = []
    for number, keep in enumerate((range(6), [i for i in range(6) if i != FAILED])):
        trainer = moved_trainer(tmp_path / str(number), *settings)
        everything = made_up(trainer, GRADES, LENGTHS, cut_off=(1, 2)).items
        rollout = Rollout(tuple(everything[i] for i in keep), group_size=1, step=1)
        metrics, gradients = updates_of(trainer, rollout, made)
        results.append((metrics, gradients, trainer.score_moments.state_dict()))
    (with_it, ours, moments), (without, theirs, others) = results
    assert moments == others
    assert with_it.keys() == without.keys()
    for name, value in without.items():
        if not name.startswith("engine/"):
            assert with_it[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for got, expected in zip(ours, theirs, strict=True):
        assert_same_gradient(got, expected, within=1e-5)


@pytest.mark.parametrize("critic", CRITICS)
def test_i01_micro_batches_change_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    made = keep_gradients(monkeypatch)
    found = []
    for budget in (4096, 100, 1):
        trainer = moved_trainer(
            tmp_path / str(budget),
            *CRITICS[critic],
            f"optim.micro_batch_tokens={budget}",
            "algorithm.entropy_coef=0.1",
            "algorithm.updates_per_step=2",
        )
        metrics, gradients = updates_of(trainer, made_up(trainer, GRADES, LENGTHS), made)
        found.append((metrics["loss"], gradients))
    assert len(found[0][1]) == (2 if critic == "shared" else 4)
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-7)
        for got, expected in zip(gradients, found[0][1], strict=True):
            assert_same_gradient(got, expected, within=1e-5)


@pytest.mark.parametrize("critic", CRITICS)
def test_i01_the_minibatches_of_a_pass_add_up_to_the_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """In each pass, as drawn and shuffled: every row meets its own constants, and once."""
    made = keep_gradients(monkeypatch)  # the weights stand still
    settings = (*CRITICS[critic], "algorithm.entropy_coef=0.1")
    whole = moved_trainer(tmp_path / "whole", *settings)
    _, expected = updates_of(whole, made_up(whole, GRADES, LENGTHS), made)
    trainer = moved_trainer(
        tmp_path / "parts",
        *settings,
        "algorithm.updates_per_step=3",
        "algorithm.epochs_per_step=3",
    )
    rollout = made_up(trainer, GRADES, LENGTHS)
    _, gradients = updates_of(trainer, rollout, made)
    models = len(expected)
    tokens = [
        sum(LENGTHS[row] for row in rows if row != FAILED) for rows in trainer.minibatches(rollout)
    ]
    assert len(tokens) == 9 and len(gradients) == 9 * models
    for number in range(3):
        for model in range(models):
            updates = range(3 * number, 3 * number + 3)
            total = {
                name: torch.stack(
                    [gradients[models * u + model][name] * tokens[u] for u in updates]
                ).sum(0)
                / sum(tokens[:3])
                for name in expected[model]
            }
            assert_same_gradient(total, expected[model], within=1e-5)


# -- whitening --------------------------------------------------------------------------------


def test_i31_advantages_are_white_over_the_mask(tmp_path: Path) -> None:
    trainer = moved_trainer(tmp_path)
    rollout = made_up(trainer, GRADES, LENGTHS)
    samples = training_samples(rollout, mask_truncated=False)
    mask = loss_mask(samples)
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.arange(6.0)
    values = [torch.linspace(-1.0, 2.0, length) for length in LENGTHS]
    targets = trainer.targets(rewards, values, mask, MetricSums())
    counted = torch.cat([targets.advantages[i, : LENGTHS[i]] for i in range(6) if i != FAILED])
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(counted.var(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert not targets.advantages[~mask].any()
    # The returns are those before whitening.
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    raw, returns = gae(rewards, padded, mask, gamma=1.0, lam=0.95)
    assert torch.equal(targets.returns, returns)
    assert not torch.equal(targets.advantages, raw)


def test_i31_whitened_rewards_keep_their_mean(tmp_path: Path) -> None:
    trainer = moved_trainer(tmp_path, "algorithm.whiten_rewards=true", "algorithm.kl.coef=0.0")
    samples = training_samples(made_up(trainer, GRADES, LENGTHS), mask_truncated=False)
    mask = loss_mask(samples)
    scores = torch.tensor([float("nan") if grade is None else 10 * grade for grade in GRADES])
    experience = trainer.record(made_up(trainer, GRADES, LENGTHS), [slice(0, 6)], MetricSums())
    counted = trainer.token_rewards(scores, experience, mask, MetricSums())[mask]
    n = sum(LENGTHS) - LENGTHS[FAILED]
    assert len(counted) == n
    assert float(counted.mean()) == pytest.approx(22.0 / n, abs=1e-5)
    assert float(counted.var(correction=0)) == pytest.approx(1.0, abs=1e-4)


# -- value clipping ---------------------------------------------------------------------------


def test_i40_the_value_loss_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "algorithm.critic={normalize: true, clip: 0.5}")
    trainer.critic.scale = 2.0
    # In units of the head: old 1, 1, 1, 1; returns 3, 3, 3, 1; clip 0.5
    predicted = torch.tensor([[1.0, 1.3, 2.0, 0.0]], requires_grad=True)
    old, returns = torch.full((1, 4), 2.0), torch.tensor([[6.0, 6.0, 6.0, 2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    metrics = MetricSums()
    loss = trainer.critic.loss(predicted, old, returns, mask, metrics)
    # half of: 2^2 (no move); 1.7^2 (inside); clipped to 1.5: 1.5^2 > 1^2; clipped to 0.5, but the
    # plain error 1 is larger than 0.25
    expected = torch.tensor([[2.0, 1.445, 1.125, 0.5]])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), predicted)
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, -1.7, 0.0, -1.0]]))
    assert metrics.result()["critic/value/clip_fraction"] == 0.25


def test_i40_moves_inside_the_clip_are_not_counted_as_clipped(tmp_path: Path) -> None:
    """Not even by rounding: old + (value - old) is not the value."""
    trainer = trainer_of(tmp_path)
    draw = torch.Generator().manual_seed(0)
    predicted, move, returns = torch.randn(3, 50, 20, generator=draw)
    predicted = 0.05 * predicted
    old = predicted + 0.1 * move.clamp(-1.9, 1.9)
    assert not torch.equal(old + (predicted - old), predicted)
    metrics = MetricSums()
    loss = trainer.critic.loss(predicted, old, returns, torch.ones(50, 20).bool(), metrics)
    assert metrics.result()["critic/value/clip_fraction"] == 0.0
    assert torch.equal(loss, 0.5 * (predicted - returns).square())


# -- evaluation -------------------------------------------------------------------------------


def test_i43_evaluation_changes_no_weight(tmp_path: Path) -> None:
    task = "eval={every: 1, tasks: [{type: verifiable, samples: 1, prompts: 2}]}"
    on = run(tmp_path / "on", task)
    off = run(tmp_path / "off", "eval={at_start: false, tasks: []}")
    ours, theirs = weights_of(on), weights_of(off)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_of(on) == steps_of(off)
    assert any(name.startswith("eval/") for name in metrics_of(on)[-1])
