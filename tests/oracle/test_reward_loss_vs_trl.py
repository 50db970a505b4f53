"""The reward model's loss and its gradient against trl's trainer, called on a stand-in `self`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl_stand_ins import accelerator, metrics

from alignment.losses import bradley_terry_loss

pytest.importorskip("trl")

from trl import RewardTrainer

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


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
