"""Policy losses and their gradients against trl's own trainers.

trl's loss methods are called unbound, on a stand-in `self` that holds just the attributes they
read, and a stand-in model that returns given log-probabilities: nothing of ours is in the oracle.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_stand_ins import accelerator, metrics

from alignment.advantages import group_relative
from alignment.losses import cispo_loss, kl_estimate, ppo_clip_loss, reduce_loss

pytest.importorskip("trl")

from trl import GRPOTrainer
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
