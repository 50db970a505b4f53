"""Invariants of the trainers that learn from preferences: DPO, KTO, online DPO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import (
    assert_same_gradient,
    catch_gradients,
    drift,
    made_up_pairs,
    parts_of,
    run,
    with_pairs,
)
from tiny_runs import events_of, metrics_of, rollouts_of, steps_of, weights_of

from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.metrics import MetricSums
from alignment.trainers.dpo import DPOTrainer
from alignment.trainers.experience import shaped_rewards
from alignment.trainers.kto import KTOTrainer
from alignment.trainers.online_dpo import OnlineDPOTrainer
from alignment.trainers.preference import PairSums
from alignment.trainers.setup import Loaded
from alignment.types import PairBatch, Sample

LN2 = math.log(2)
BUDGETS = (4096, 60, 1)
"""All pairs in one micro-batch, some, one each."""

REFERENCES: dict[str, tuple[str, ...]] = {
    "frozen copy": ("model.reference=frozen_copy",),
    "synced": ("model.reference={mode: synced, every: 100, mix: 0.5}",),
    "LoRA, adapter off": ("model.reference=adapter_off", "model.lora={rank: 4, dropout: 0.5}"),
    "precomputed": ("model.reference=precomputed",),
    "LoRA, precomputed": ("model.reference=precomputed", "model.lora={rank: 4}"),
}


def tune(loaded: Loaded) -> None:
    """Hand over another policy than the one that was loaded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.02)


# -- the start --------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES)
def test_i38_dpo_starts_at_ln2_with_margin_zero(tmp_path: Path, reference: str) -> None:
    small = "optim.micro_batch_tokens=100"
    context = parts_of("dpo", tmp_path, *REFERENCES[reference], small, change=tune)
    metrics = DPOTrainer(context).step(1).metrics.result()
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-6)
    # Rows that are scored in other micro-batches differ by rounding.
    tolerance = 1e-5 if "precomputed" in reference else 0.0
    for name in ("reward/chosen", "reward/rejected", "reward/margin", "log_ratio/chosen"):
        assert metrics[f"dpo/{name}"] == pytest.approx(0.0, abs=tolerance), name


@pytest.mark.parametrize("budget", [4096, 80])
@pytest.mark.parametrize("reference", [name for name in REFERENCES if "precomp" not in name])
def test_i38_margins_are_exactly_zero_in_bfloat16(
    tmp_path: Path, reference: str, budget: int
) -> None:
    settings = ("model.dtype=bfloat16", f"optim.micro_batch_tokens={budget}")
    size = "algorithm.pairs_per_step=12"
    context = parts_of("dpo", tmp_path, *REFERENCES[reference], *settings, size, change=tune)
    # Pairs of one prompt that are not neighbours would be laid out otherwise one by one.
    pairs = made_up_pairs(6)
    twice = PairBatch(
        pairs.chosen + pairs.rejected[::-1],
        pairs.rejected + pairs.chosen[::-1],
    )
    metrics = DPOTrainer(with_pairs(context, twice)).step(1).metrics.result()
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-6)
    for name in ("reward/chosen", "reward/rejected", "reward/margin"):
        assert metrics[f"dpo/{name}"] == 0.0


def test_i38_kto_starts_at_a_half_with_kl_zero(tmp_path: Path) -> None:
    """s(0) = 1/2 for both classes."""
    context = parts_of("kto", tmp_path, "model.dtype=bfloat16", change=tune)
    metrics = KTOTrainer(context).step(1).metrics.result()
    assert metrics["loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["kto/kl"] == 0.0
    assert metrics["kto/reward/desirable"] == metrics["kto/reward/undesirable"] == 0.0


def test_i38_swapping_the_sides_negates_margin_and_first_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = catch_gradients(monkeypatch)
    pairs = made_up_pairs(4)
    for sides in ((pairs.chosen, pairs.rejected), (pairs.rejected, pairs.chosen)):
        context = with_pairs(parts_of("dpo", tmp_path), PairBatch(*sides))
        trainer = DPOTrainer(context)
        trainer.step(1)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], -gradient, rtol=1e-4, atol=1e-6)
    margins = []
    for sides in ((pairs.chosen, pairs.rejected), (pairs.rejected, pairs.chosen)):
        context = with_pairs(parts_of("dpo", tmp_path), PairBatch(*sides))
        trainer = DPOTrainer(context)
        drift(context)
        margins.append(trainer.step(1).metrics.result()["dpo/reward/margin"])
    assert abs(margins[0]) > 1e-2
    assert margins[1] == pytest.approx(-margins[0], abs=1e-6)


@pytest.mark.parametrize("reference", REFERENCES)
def test_i21_the_policy_moves_and_the_reference_does_not(tmp_path: Path, reference: str) -> None:
    context = parts_of("dpo", tmp_path, *REFERENCES[reference])
    trainer = DPOTrainer(context)
    rows = [0, 1, 2]
    samples = [context.train.pairs.chosen[0], context.train.pairs.rejected[0]] * 3
    before = trainer.reference(rows, samples)
    own = context.policy.logprobs(samples, 4096)
    trainer.step(1)
    after = trainer.reference(rows, samples)
    assert before is not None and after is not None
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    moved = context.policy.logprobs(samples, 4096)
    assert not any(torch.equal(a, b) for a, b in zip(own, moved, strict=True))


# -- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, 1e6])
@pytest.mark.parametrize("desensitize", [None, 0.5])
def test_i29_poisoned_padding_reaches_no_sum(poison: float, desensitize: float | None) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    clean = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.25, -4.0]])
    logprobs = torch.where(mask, clean, poison).requires_grad_()
    sums = PairSums.of(logprobs, logprobs.detach(), mask, desensitize=desensitize)
    weight = 1.0 if desensitize is None else desensitize
    assert sums.rows() == [[-3.0, -0.75 - 4 * weight, -3.0, -0.75 - 4 * weight, 2.0, 3.0]]
    (gradient,) = torch.autograd.grad((sums.chosen - sums.rejected).sum(), logprobs)
    assert gradient.tolist() == [[1.0, 1.0, 0.0], [-1.0, -1.0, -weight]]


@pytest.mark.parametrize("kind", ["sigmoid", "aot"])
def test_i29_tokens_outside_the_mask_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The tail of a completion is masked out: what stands there changes nothing."""
    gradients = catch_gradients(monkeypatch)
    pairs = made_up_pairs(4)
    losses = []
    for tail in ((5, 6, 7), (200, 201, 202)):
        longer = [
            Sample(s.prompt_ids, s.completion_ids + tail, s.loss_mask + (False,) * 3)
            for s in pairs.chosen
        ]
        context = parts_of("dpo", tmp_path, f"algorithm.loss.kind={kind}")
        trainer = DPOTrainer(with_pairs(context, PairBatch(tuple(longer), pairs.rejected)))
        drift(context)
        losses.append(trainer.step(1).metrics.result()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same_gradient(gradients[0], {n: g.double() for n, g in gradients[1].items()})


# -- samples ----------------------------------------------------------------------------------


def test_i34_online_pairs_are_the_sampled_ids(tmp_path: Path) -> None:
    context = parts_of("online_dpo", tmp_path)
    trainer = OnlineDPOTrainer(context)
    rollout = trainer.collect(1, MetricSums())
    rewards = shaped_rewards(rollout, max_new_tokens=1).tolist()
    (samples,) = trainer.pairs(rollout, rewards, MetricSums())
    assert samples
    reward_of = {
        (item.prompt.token_ids, item.completion.token_ids): item.reward for item in rollout.items
    }
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        assert chosen.prompt_ids == rejected.prompt_ids
        assert all(chosen.loss_mask) and all(rejected.loss_mask)
        better, worse = (reward_of[s.prompt_ids, s.completion_ids] for s in (chosen, rejected))
        assert better is not None and worse is not None
        assert better > worse


# -- resuming ---------------------------------------------------------------------------------

SYNCED = "model.reference={mode: synced, every: 2, mix: 0.5}"
RESUMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo, bco's moving average": ("dpo", ("algorithm.loss.kind=bco", SYNCED)),
    "dpo, coupled, precomputed": (
        "dpo",
        ("algorithm.loss.kind={aot: 0.5, bco: 0.5}", "model.reference=precomputed"),
    ),
    "dpo, LoRA in bfloat16": (
        "dpo",
        ("model.lora={rank: 4}", "model.reference=adapter_off", "model.dtype=bfloat16"),
    ),
    "kto": ("kto", (SYNCED,)),
    "online dpo": (
        "online_dpo",
        (SYNCED, "algorithm.updates_per_step=2", "algorithm.pairs=random_pair"),
    ),
}
TRAINERS: dict[str, Any] = {"dpo": DPOTrainer, "kto": KTOTrainer, "online_dpo": OnlineDPOTrainer}


@pytest.mark.parametrize("case", RESUMED)
def test_i45_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    method, settings = RESUMED[case]
    settings = (*settings, "algorithm.steps=5", "checkpoint={every: 1, keep: 3}", "optim.lr=1e-2")
    whole = run(method, tmp_path / "whole", *settings)
    evaluated = case in ("dpo, coupled, precomputed", "dpo, LoRA in bfloat16")
    if evaluated:  # which changes nothing
        settings += ("eval={every: 2, tasks: [{type: preference}]}",)
    with monkeypatch.context() as patch:
        original = TRAINERS[method].step

        def failing(self: Any, step: int) -> Any:
            result = original(self, step)
            if step == 4:
                raise InterruptedError  # when the step is made, and nothing of it is recorded
            return result

        patch.setattr(TRAINERS[method], "step", failing)
        with pytest.raises(InterruptedError):
            run(method, tmp_path / "cut", *settings)
    resumed = run(method, tmp_path / "cut", *settings)
    assert [event["step"] for event in events_of(resumed, "resume")] == [3]
    assert any(resumed.evals_dir.glob("*")) == evaluated
    assert steps_of(resumed) == steps_of(whole)
    if "LoRA" not in case:
        ours, theirs = weights_of(resumed), weights_of(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if method == "online_dpo":
        assert rollouts_of(resumed) == rollouts_of(whole)
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (resumed, whole))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()


def test_i45_the_moving_average_matters(tmp_path: Path) -> None:
    """The case above has state to lose: without the shift the steps are others."""
    settings = ("algorithm.loss.kind=bco", "algorithm.steps=3", "optim.lr=1e-2")
    kept = metrics_of(run("dpo", tmp_path / "a", *settings, "algorithm.loss.bco_decay=0.5"))
    slow = metrics_of(run("dpo", tmp_path / "b", *settings, "algorithm.loss.bco_decay=0.99"))
    assert [one["loss"] == other["loss"] for one, other in zip(kept, slow, strict=True)] == [
        True,
        True,  # the rewards of step 1 were 0
        False,
    ]
