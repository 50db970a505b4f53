"""Process rewards and smoothing of outcome rewards, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.losses import bradley_terry_loss, process_reward_loss
from alignment.types import AlignmentError, Sample, SteppedSample, UserInputError
from evals import process_task

LN3 = math.log(3)
NAN = float("nan")
MASK = torch.tensor([[True, False, True, True], [False, True, False, True]])


def test_process_reward_loss_by_hand() -> None:
    scores = torch.tensor([[LN3, NAN, -LN3, LN3], [NAN, 0.0, NAN, -LN3]], requires_grad=True)
    labels = torch.tensor([[1.0, NAN, 1.0, 0.0], [NAN, 1.0, NAN, 0.25]])
    loss = process_reward_loss(scores, labels, MASK)
    # -log 3/4, -log 1/4 twice, -log 1/2; the soft one: 1/4 log 4 + 3/4 log 4/3
    expected = [0.2876820724, 0.0, 1.3862943611, 1.3862943611]
    expected += [0.0, 0.6931471806, 0.0, 0.25 * 1.3862943611 + 0.75 * 0.2876820724]
    assert loss.per_token.flatten().tolist() == pytest.approx(expected)
    loss.per_token.sum().backward()
    slopes = [-0.25, 0.0, -0.75, 0.75, 0.0, -0.5, 0.0, 0.0]
    assert scores.grad is not None
    assert scores.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-7)
    # good: right, wrong, and a score of 0 is a probability of 0.5, which is good; bad: wrong, right
    assert loss.metrics["accuracy"].value() == pytest.approx(3 / 5)
    assert loss.metrics["accuracy/good"].value() == pytest.approx(2 / 3)
    assert loss.metrics["accuracy/bad"].value() == 0.5


def test_a_step_is_good_by_the_rule_of_the_task_process() -> None:
    """From 0.5 upwards, label and probability alike: of each label the scores of 0 and 1 count as
    good, so two of the three agree with a good label and one with a bad one."""
    labels, scores = [0.5, 0.25, 1.0], [0.0, 1.0, -1.0]
    rows = torch.tensor([[label] * 3 for label in labels])
    loss = process_reward_loss(torch.tensor([scores] * 3), rows, torch.ones(3, 3, dtype=torch.bool))
    samples = [
        SteppedSample(Sample((1,), (2, 3, 4), (True,) * 3), (label,) * 3) for label in labels
    ]
    metrics, _ = process_task._summarize(samples, [scores] * 3)
    assert loss.metrics["accuracy"].value() == pytest.approx(5 / 9)
    assert loss.metrics["accuracy/good"].value() == pytest.approx(4 / 6)
    assert metrics["step_accuracy"] == pytest.approx(5 / 9)
    assert metrics["good_steps"] == pytest.approx(6 / 9)


def test_process_reward_labels_are_constants_of_any_type() -> None:
    scores = torch.tensor([[2.0, -1.0]], dtype=torch.bfloat16)
    mask = torch.ones(1, 2, dtype=torch.bool)
    labels = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = process_reward_loss(scores, labels, mask)
    assert loss.per_token.dtype == torch.float32 and not loss.per_token.requires_grad
    assert torch.equal(loss.per_token, process_reward_loss(scores, labels > 0, mask).per_token)
    with pytest.raises(AlignmentError, match="labels has shape"):
        process_reward_loss(scores, labels[:, :1], mask)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bradley_terry_smoothing_by_hand(smoothing: float) -> None:
    """d = ln 3: -0.8 log 3/4 - 0.2 log 1/4; its slope is s(d) - (1 - e)."""
    chosen = torch.tensor([LN3 + 1.0], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(
        chosen, torch.zeros(1, dtype=torch.float64), margin=1.0, label_smoothing=smoothing
    )
    expected = {0.0: 0.2876820724, 0.2: 0.5074045302}[smoothing]
    assert loss.per_sequence.item() == pytest.approx(expected)
    loss.per_sequence.sum().backward()
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(-0.25 + smoothing)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, NAN])
def test_bradley_terry_smoothing_is_a_probability_of_error(smoothing: float) -> None:
    with pytest.raises(UserInputError, match="label_smoothing is"):
        bradley_terry_loss(torch.ones(2), torch.zeros(2), label_smoothing=smoothing)
