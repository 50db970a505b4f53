"""SFT, value and reward losses, the reduction, and metrics, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.losses import (
    Max,
    Mean,
    bradley_terry_loss,
    clipped_value_loss,
    loss_count,
    merge_metrics,
    reduce_loss,
    sft_loss,
)
from alignment.types import AlignmentError, UserInputError

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sft_loss_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-6.0, -9.0, -9.0]], requires_grad=True)
    loss = sft_loss(logprobs, MASK)
    assert loss.per_token.tolist() == [[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]]
    assert loss.metrics["nll"].value() == 3.0
    reduce_loss(loss.per_token, MASK, count=3).backward()
    expected = torch.tensor([[-1 / 3, -1 / 3, 0], [-1 / 3, 0, 0]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 1.0, 5.0], [3.0, 0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    returns = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    loss = clipped_value_loss(values, old, returns, MASK, clip=0.5)
    # kept; moved 1 from the old value, so the clipped 0.5 counts: (0.5-1)^2; clipped to 0.5: 3.5^2
    assert loss.per_token.tolist() == [[2.0, 0.125, 0.0], [6.125, 0.0, 0.0]]
    assert loss.metrics["value/clip_fraction"].value() == pytest.approx(2 / 3)
    assert loss.metrics["value/mean"].value() == pytest.approx(5 / 3)
    assert loss.metrics["return/mean"].value() == pytest.approx(8 / 3)
    assert loss.metrics["return/squared"].value() == pytest.approx(26 / 3)
    assert loss.metrics["value/squared_error"].value() == pytest.approx(5 / 3)
    loss.per_token.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-2.0, 0, 0], [0, 0, 0]]))
    unclipped = clipped_value_loss(values, old, returns, MASK, clip=None)
    assert unclipped.per_token.tolist() == [[2.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    with pytest.raises(UserInputError, match="value clip is 0"):
        clipped_value_loss(values, old, returns, MASK, clip=0)


def test_bradley_terry_by_hand() -> None:
    chosen = torch.tensor([2.0, 0.0], requires_grad=True)
    rejected = torch.tensor([1.0, 1.0])
    margin = torch.tensor([1.0, 0.0])
    loss = bradley_terry_loss(chosen, rejected, margin=margin, center_coef=0.1)
    expected = [math.log(2) + 0.9, math.log(1 + math.e) + 0.1]
    assert loss.per_sequence.tolist() == pytest.approx(expected)
    assert loss.metrics["accuracy"].value() == 0.5
    assert loss.metrics["margin"].value() == 0.0
    loss.per_sequence.sum().backward()
    sigmoid = 1 / (1 + math.exp(-1))
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.5 + 0.6, -sigmoid + 0.2])


def test_bradley_terry_smoothing_and_a_single_margin() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    loss = bradley_terry_loss(chosen, rejected, margin=0.5, label_smoothing=0.2)
    expected = 0.8 * math.log1p(math.exp(-0.5)) + 0.2 * math.log1p(math.exp(0.5))
    assert loss.per_sequence.item() == pytest.approx(expected)
    with pytest.raises(AlignmentError, match="rejected_scores has shape"):
        bradley_terry_loss(chosen, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_compute_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 3).to(dtype), torch.randn(2, 3).to(dtype)
    low = clipped_value_loss(x, y, y, MASK, clip=0.2).per_token
    full = clipped_value_loss(x.float(), y.float(), y.float(), MASK, clip=0.2).per_token
    assert low.dtype == torch.float32 and torch.equal(low, full)
    assert sft_loss(x, MASK).per_token.dtype == torch.float32
    assert bradley_terry_loss(x[0], y[0]).per_sequence.dtype == torch.float32
    assert reduce_loss(x, MASK, count=3).dtype == torch.float32
    assert sft_loss(x.double(), MASK).per_token.dtype == torch.float64


def test_reduce_rejects_what_has_no_meaning() -> None:
    x = torch.ones(2, 3)
    for count in (0, -1, float("nan")):
        with pytest.raises(AlignmentError, match="skip a step that has no loss token"):
            reduce_loss(x, MASK, count=count)
    assert not reduce_loss(x, MASK & False, count=torch.tensor(0)).isfinite()
    with pytest.raises(UserInputError, match="did you mean 'sequence'"):
        reduce_loss(x, MASK, mode="sequences", count=1)
    with pytest.raises(AlignmentError, match="mask has shape"):
        reduce_loss(x, MASK[:1], count=1)


def test_loss_count() -> None:
    mask = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.bool)])
    assert loss_count(mask, mode="token").item() == 3
    assert loss_count(mask, mode="sequence").item() == 2


def test_metrics_merge_exactly() -> None:
    parts = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    merged = merge_metrics(
        *({"mean": Mean.of(part), "max": Max.of(part)} for part in parts), {"once": Mean.of(MASK)}
    )
    assert merged["mean"].value() == 4.0  # the mean of the two means would be 6
    assert merged["max"].value() == 10.0
    assert merged["once"].value() == 0.5
    assert math.isnan(Mean.of(parts[0], torch.zeros(3, dtype=torch.bool)).value())
    assert Max.of(torch.zeros(0)).value() == -math.inf
    with pytest.raises(AlignmentError, match="'x' is a Mean in one"):
        merge_metrics({"x": Mean.of(MASK)}, {"x": Max.of(MASK)})


def test_metrics_carry_no_gradient() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    for metric in (Mean.of(x), Mean.of(x, MASK)):
        assert not metric.total.requires_grad
    assert not Max.of(x, MASK).largest.requires_grad
