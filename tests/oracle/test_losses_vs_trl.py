"""Losses and their gradients against trl's own trainers.

trl's loss methods are called unbound, on a stand-in `self` that holds just the attributes they
read, and a stand-in model that returns given log-probabilities: nothing of ours is in the oracle.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.advantages import group_relative
from alignment.losses import (
    bradley_terry_loss,
    cispo_loss,
    kl_estimate,
    ppo_clip_loss,
    preference_loss,
    reduce_loss,
)

pytest.importorskip("trl")

from trl import DPOTrainer, GRPOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import nanstd

ROWS, LENGTH = 4, 7
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],  # a tool's output in the middle
        [1, 0, 0, 0, 0, 0, 0],
    ]
)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def accelerator() -> SimpleNamespace:
    def same(x: Tensor, **_: Any) -> Tensor:
        return x

    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        sync_gradients=True,
    )


def metrics() -> dict[str, dict[str, list[Any]]]:
    return defaultdict(lambda: defaultdict(list))


# ---------------------------------------------------------------- GRPO and its variants


def rollout() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    old = -3 * torch.rand(ROWS, LENGTH, generator=generator)
    moved = 0.4 * torch.randn(ROWS, LENGTH, generator=generator)
    moved[0, 0] = 1.6  # a ratio past the two-sided clip, with a negative advantage
    return {
        "logprobs": old + moved,
        "old": old,
        "ref": old + 0.3 * torch.randn(ROWS, LENGTH, generator=generator),
        "advantages": torch.tensor([-1.5, 0.7, 1.1, -0.4]),
    }


def trl_grpo(data: dict[str, Tensor], **attributes: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    logprobs = data["logprobs"].clone().requires_grad_()
    options = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "delta": None,
        "beta": 0.0,
        **attributes,
    }
    logged = metrics()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logprobs,
            torch.zeros(ROWS, LENGTH),
            None,
        ),
        args=SimpleNamespace(
            delta=options["delta"], use_bias_correction_kl=False, steps_per_generation=1
        ),
        loss_type=options["loss_type"],
        importance_sampling_level=options["importance_sampling_level"],
        beta=options["beta"],
        epsilon_low=0.2,
        epsilon_high=options.get("epsilon_high", 0.28),
        max_completion_length=10,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        _metrics=logged,
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 2, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": MASK,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": MASK.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, logged["train"]


REDUCTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"mode": "sequence", "count": ROWS},
    "bnpo": {"mode": "token", "count": MASK.sum()},
    "dapo": {"mode": "token", "count": MASK.sum()},
    "dr_grpo": {"mode": "constant", "count": ROWS * 10},
}


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("delta", [None, 2.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", sorted(REDUCTIONS))
def test_clipped_surrogate_and_reductions(
    loss_type: str, level: Any, delta: float | None, beta: float
) -> None:
    data = rollout()
    theirs, their_gradient, logged = trl_grpo(
        data, loss_type=loss_type, importance_sampling_level=level, delta=delta, beta=beta
    )
    logprobs = data["logprobs"].clone().requires_grad_()
    mask = MASK.bool()
    loss = ppo_clip_loss(
        logprobs,
        data["old"],
        data["advantages"],
        mask,
        clip_low=0.2,
        clip_high=0.28,
        ratio_level=level,
        dual_clip=delta,
    )
    kl = kl_estimate(logprobs, data["ref"], estimator="k3")
    ours = reduce_loss(loss.per_token + beta * kl, mask, **REDUCTIONS[loss_type])
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs, **TOLERANCE)
    torch.testing.assert_close(logprobs.grad, their_gradient, **TOLERANCE)
    if level == "token":
        for side in ("low", "high"):
            fraction = loss.metrics[f"clip_fraction/{side}"].value()
            assert fraction == pytest.approx(logged[f"clip_ratio/{side}_mean"][0], abs=1e-6)


def test_cispo() -> None:
    data = rollout()
    theirs, their_gradient, _ = trl_grpo(data, loss_type="cispo", epsilon_high=1.3)
    logprobs = data["logprobs"].clone().requires_grad_()
    mask = MASK.bool()
    # trl's epsilon_high is the largest weight itself, ours a width above 1
    loss = cispo_loss(logprobs, data["old"], data["advantages"], mask, clip_high=0.3)
    ours = reduce_loss(loss.per_token, mask, mode="token", count=MASK.sum())
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs, **TOLERANCE)
    torch.testing.assert_close(logprobs.grad, their_gradient, **TOLERANCE)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_group_relative_against_trls_deviation(scale: Any) -> None:
    rewards = torch.tensor([[0.1, 0.9, float("nan"), 0.4], [2.0, -1.0, 0.0, 0.5]])
    std = nanstd(rewards, dim=1, keepdim=True) if scale == "group" else nanstd(rewards)
    expected = (rewards - rewards.nanmean(dim=1, keepdim=True)) / (std + 1e-4)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    ours = group_relative(rewards.flatten(), groups, scale=scale)
    torch.testing.assert_close(ours, expected.nan_to_num(0.0).flatten(), **TOLERANCE)


# ---------------------------------------------------------------- preferences

PAIRS = 3
LENGTHS = torch.tensor([4, 2, 6, 3, 5, 1])  # chosen, then rejected


def pair_logprobs() -> tuple[Tensor, Tensor, Tensor]:
    """Per-token log-probabilities `[2 * PAIRS, 7]`, the completion mask, reference sums."""
    generator = torch.Generator().manual_seed(6)
    completion_mask = (torch.arange(8)[None] > 0) & (torch.arange(8)[None] <= LENGTHS[:, None])
    per_token = -2 * torch.rand(2 * PAIRS, 7, generator=generator) * completion_mask[:, 1:]
    ref = per_token.sum(1) + 2 * torch.randn(2 * PAIRS, generator=generator)
    return per_token, completion_mask, ref


def trl_dpo(loss_type: str, smoothing: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    per_token, completion_mask, ref = pair_logprobs()
    per_token.requires_grad_()
    zeros = torch.zeros(2 * PAIRS, 7)
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    logged = metrics()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=0.2,
        label_smoothing=smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=logged,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, 8, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, 8, dtype=torch.long),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref[:PAIRS],
        "ref_rejected_logps": ref[PAIRS:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    loss.backward()
    assert per_token.grad is not None
    return loss.detach(), per_token.grad * completion_mask[:, 1:], logged["train"]


@pytest.mark.parametrize(
    ("kind", "loss_type", "smoothing"),
    [
        ("sigmoid", "sigmoid", 0.0),
        ("sigmoid_norm", "sigmoid_norm", 0.0),
        ("hinge", "hinge", 0.0),
        ("ipo_norm", "ipo", 0.0),
        ("exo", "exo_pair", 0.01),
        ("nca", "nca_pair", 0.0),
        ("robust", "robust", 0.1),
        ("bco", "bco_pair", 0.0),
        ("sppo", "sppo_hard", 0.0),
        ("aot", "aot", 0.1),
        ("aot_unpaired", "aot_unpaired", 0.1),
        ("apo_zero", "apo_zero", 0.0),
        ("apo_down", "apo_down", 0.0),
        ("discopop", "discopop", 0.0),
    ],
)
def test_preference_kinds(kind: str, loss_type: str, smoothing: float) -> None:
    theirs, their_gradient, logged = trl_dpo(loss_type, smoothing)
    per_token, completion_mask, ref = pair_logprobs()
    per_token.requires_grad_()
    sums = torch.where(completion_mask[:, 1:], per_token, 0.0).sum(1)
    loss = preference_loss(
        sums[:PAIRS],
        sums[PAIRS:],
        ref[:PAIRS],
        ref[PAIRS:],
        kind=kind,
        beta=0.2,
        label_smoothing=smoothing,
        chosen_lengths=LENGTHS[:PAIRS],
        rejected_lengths=LENGTHS[PAIRS:],
    )
    ours = loss.per_sequence.sum() / PAIRS
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs, **TOLERANCE)
    torch.testing.assert_close(per_token.grad, their_gradient, **TOLERANCE)
    names = {"chosen": "chosen", "rejected": "rejected", "margin": "margins"}
    for name, their_name in {**names, "accuracy": "accuracies"}.items():
        value = loss.metrics[f"reward/{name}"].value()
        assert value == pytest.approx(logged[f"rewards/{their_name}"][0], abs=1e-6)


@pytest.mark.parametrize("kind", ["simpo", "cpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_and_simpo(kind: str, smoothing: float) -> None:
    per_token, _, _ = pair_logprobs()
    sums = per_token.sum(1)
    given = sums / LENGTHS if kind == "simpo" else sums
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=0.4,
        simpo_gamma=0.5,
        label_smoothing=smoothing,
        loss_type="simpo" if kind == "simpo" else "sigmoid",
        accelerator=accelerator(),
    )
    theirs, chosen_rewards, _ = CPOTrainer.cpo_loss(trainer, given[:PAIRS], given[PAIRS:])
    loss = preference_loss(
        sums[:PAIRS],
        sums[PAIRS:],
        None,
        None,
        kind=kind,
        beta=0.4,
        label_smoothing=smoothing,
        chosen_lengths=LENGTHS[:PAIRS],
        rejected_lengths=LENGTHS[PAIRS:],
        nll_coef=0.0,  # trl adds it elsewhere
    )
    torch.testing.assert_close(loss.per_sequence, theirs, **TOLERANCE)
    assert loss.metrics["reward/chosen"].value() == pytest.approx(chosen_rewards.mean().item())


def test_orpo() -> None:
    per_token, _, _ = pair_logprobs()
    sums = per_token.sum(1)
    means = sums / LENGTHS
    trainer = SimpleNamespace(beta=0.1, accelerator=accelerator())
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:PAIRS], means[PAIRS:])
    loss = preference_loss(
        sums[:PAIRS],
        sums[PAIRS:],
        None,
        None,
        kind="orpo",
        beta=0.1,
        chosen_lengths=LENGTHS[:PAIRS],
        rejected_lengths=LENGTHS[PAIRS:],
    )
    expected = -means[:PAIRS] - theirs  # trl's sign: NLL less the returned value
    torch.testing.assert_close(loss.per_sequence, expected, **TOLERANCE)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_reward_model(with_margin: bool, center: float | None) -> None:
    scores = torch.tensor([1.5, -0.2, 0.4, 0.9, -0.1, 0.3])
    margin = torch.tensor([0.5, 0.0, 1.0])
    theirs_in, ours_in = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=accelerator(),
        _metrics=metrics(),
        _total_train_tokens=0,
    )
    inputs: dict[str, Any] = {"margin": margin} if with_margin else {}
    theirs = RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=theirs_in[:, None]), inputs
    )
    theirs.backward()
    loss = bradley_terry_loss(
        ours_in[:3],
        ours_in[3:],
        margin=margin if with_margin else None,
        center_coef=center or 0.0,
    )
    ours = loss.per_sequence.mean()
    ours.backward()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **TOLERANCE)
    logged = trainer._metrics["eval"]
    assert loss.metrics["accuracy"].value() == pytest.approx(logged["accuracy"][0])
    assert loss.metrics["margin"].value() == pytest.approx(logged["margin"][0], abs=1e-6)
