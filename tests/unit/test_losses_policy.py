"""PPO, GSPO and CISPO against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignment.losses import TokenLoss, cispo_loss, ppo_clip_loss, reduce_loss
from alignment.types import AlignmentError, UserInputError

RATIOS = [[1.5, 1.5, 0.5, 0.5, 1.1]]
ADVANTAGES = [[2.0, -2.0, 2.0, -2.0, 3.0]]


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = torch.full((1, 5), -1.0)
    logprobs = (old + torch.tensor(RATIOS).log()).requires_grad_()
    return logprobs, old, torch.tensor(ADVANTAGES), torch.ones(1, 5, dtype=torch.bool)


def test_token_level_values_and_gradients_by_hand() -> None:
    logprobs, old, advantages, mask = _inputs()
    loss = ppo_clip_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2)
    # -min(r A, clamp(r, 0.8, 1.2) A)
    expected = torch.tensor([[-2.4, 3.0, -1.0, 1.6, -3.3]])
    torch.testing.assert_close(loss.per_token, expected, rtol=1e-6, atol=1e-6)
    loss.per_token.sum().backward()
    # d/dlogp (-r A) = -r A where the clip is not active, else 0
    expected = torch.tensor([[0.0, 3.0, -1.0, 0.0, -3.3]])
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-6, atol=1e-6)


def test_two_widths() -> None:
    logprobs, old, advantages, mask = _inputs()
    loss = ppo_clip_loss(logprobs, old, advantages, mask, clip_low=0.6, clip_high=0.05)
    expected = torch.tensor([[-2.1, 3.0, -1.0, 1.0, -3.15]])
    torch.testing.assert_close(loss.per_token, expected, rtol=1e-6, atol=1e-6)


def test_metrics_are_token_sums() -> None:
    logprobs, old, advantages, mask = _inputs()
    mask[0, 4] = False
    metrics = ppo_clip_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2).metrics
    kl = (0.5 - math.log(1.5)) / 2 + (-0.5 - math.log(0.5)) / 2
    expected = {
        "ratio/mean": 1.0,
        "ratio/max": 1.5,
        "clip_fraction/low": 0.25,
        "clip_fraction/high": 0.25,
        "approx_kl": kl,
    }
    assert {name: metric.value() for name, metric in metrics.items()} == pytest.approx(
        expected, abs=1e-6
    )


def test_dual_clip_by_hand() -> None:
    old = torch.zeros(1, 3)
    logprobs = torch.tensor([[4.0, 1.5, 4.0]]).log().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = ppo_clip_loss(
        logprobs,
        old,
        torch.tensor([[-1.0, -1.0, 1.0]]),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=2.0,
    )
    torch.testing.assert_close(loss.per_token, torch.tensor([[2.0, 1.5, -1.2]]))
    assert loss.metrics["clip_fraction/dual"].value() == pytest.approx(1 / 3)
    loss.per_token.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 1.5, 0.0]]))


def test_sequence_level_by_hand() -> None:
    """Two counted tokens with log-ratios ln 2 and 0: r = sqrt 2, and each token's gradient
    reaches both through the mean."""
    old = torch.zeros(1, 3)
    logprobs = torch.tensor([[math.log(2.0), 7.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    loss = ppo_clip_loss(
        logprobs,
        old,
        torch.tensor([[3.0, 0.0, 3.0]]),
        mask,
        clip_low=1.0,
        clip_high=1.0,
        ratio_level="sequence",
    )
    root = math.sqrt(2.0)
    torch.testing.assert_close(loss.per_token, torch.tensor([[-3 * root, 0.0, -3 * root]]))
    reduce_loss(loss.per_token, mask, mode="sequence", count=1).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.5 * root, 0.0, -1.5 * root]]))


def test_advantages_per_sequence_are_broadcast() -> None:
    logprobs, old = torch.randn(3, 3), torch.randn(3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    for loss in (_ppo, _cispo):
        by_sequence = loss(logprobs, old, advantages, mask)
        by_token = loss(logprobs, old, advantages[:, None].repeat(1, 3), mask)
        assert torch.equal(by_sequence.per_token, by_token.per_token)


def test_cispo_by_hand() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    logprobs = (old + torch.tensor([[3.0, 0.5, 3.0]]).log()).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.tensor([[1.0, 2.0, -1.0]])
    loss = cispo_loss(logprobs, old, advantages, mask, clip_high=1.0)
    weight = torch.tensor([[2.0, 0.5, 2.0]])
    torch.testing.assert_close(loss.per_token, -weight * advantages * logprobs.detach())
    loss.per_token.sum().backward()
    torch.testing.assert_close(logprobs.grad, -weight * advantages)
    assert loss.metrics["clip_fraction/high"].value() == pytest.approx(2 / 3)
    assert loss.metrics["clip_fraction/low"].value() == 0.0
    narrow = cispo_loss(logprobs, old, advantages, mask, clip_high=1.0, clip_low=0.2)
    assert narrow.per_token[0, 1].item() == pytest.approx(-0.8 * 2 * (-1 + math.log(0.5)))
    assert narrow.metrics["clip_fraction/low"].value() == pytest.approx(1 / 3)


def _ppo(*tensors: Tensor) -> TokenLoss:
    return ppo_clip_loss(*tensors, clip_low=0.2, clip_high=0.28)


def _cispo(*tensors: Tensor) -> TokenLoss:
    return cispo_loss(*tensors, clip_high=0.28)


def test_passing_the_same_tensor_as_old_gives_the_policy_gradient() -> None:
    """A forgotten detach would make the ratio's gradient vanish without a word."""
    logprobs = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    advantages = torch.randn(2, 4)
    for loss in (_ppo, _cispo):
        logprobs.grad = None
        loss(logprobs, logprobs, advantages, mask).per_token.sum().backward()
        torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages, 0.0))


def test_a_huge_ratio_on_the_clipped_side_has_gradient_zero_not_nan() -> None:
    logprobs = torch.tensor([[200.0]], requires_grad=True)
    one = torch.ones(1, 1)
    _ppo(logprobs, torch.zeros(1, 1), one, one.bool()).per_token.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.item() == 0.0


def test_nan_inside_the_mask_is_not_hidden() -> None:
    logprobs, old, advantages, mask = (t.detach().clone() for t in _inputs())
    logprobs[0, 2] = float("nan")
    assert _ppo(logprobs, old, advantages, mask).per_token.isnan().sum() == 1
    assert _cispo(logprobs, old, advantages, mask).per_token.isnan().sum() == 1


def test_bad_arguments_are_named() -> None:
    logprobs, old, advantages, mask = _inputs()
    with pytest.raises(AlignmentError, match=r"old_logprobs has shape \(1, 4\)"):
        _ppo(logprobs, old[:, :4], advantages, mask)
    with pytest.raises(AlignmentError, match="advantages has shape"):
        _ppo(logprobs, old, advantages[0], mask)
    with pytest.raises(UserInputError, match=r"clip_low is -0\.1"):
        ppo_clip_loss(logprobs, old, advantages, mask, clip_low=-0.1, clip_high=0.2)
    with pytest.raises(UserInputError, match=r"dual_clip is 1\.0"):
        ppo_clip_loss(logprobs, old, advantages, mask, clip_low=0, clip_high=0.2, dual_clip=1.0)
    with pytest.raises(UserInputError, match="did you mean 'sequence'"):
        ppo_clip_loss(
            logprobs, old, advantages, mask, clip_low=0, clip_high=0.2, ratio_level="sequences"
        )
