"""Losses on unpaired data, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.losses import SequenceLoss, bco_loss, kto_kl, kto_loss, merge_metrics
from alignment.types import AlignmentError, UserInputError

LN3 = math.log(3)
# log-ratios 2, 0, 1, -1
LOGPS = torch.tensor([-3.0, -5.0, -6.0, -9.0], dtype=torch.float64)
REF_LOGPS = torch.tensor([-5.0, -5.0, -7.0, -8.0], dtype=torch.float64)
DESIRABLE = torch.tensor([True, True, False, False])


def kto(logps: Tensor, **options: Any) -> SequenceLoss:
    given: dict[str, Any] = {"kl": 1.0, "beta": LN3, **options}
    return kto_loss(logps, REF_LOGPS, DESIRABLE, given.pop("kl"), **given)


def test_kto_by_hand() -> None:
    """beta (c - kl) = ln 3, -ln 3 where desirable; beta (kl - c) = 0, 2 ln 3 where not."""
    logps = LOGPS.clone().requires_grad_()
    loss = kto(logps, desirable_weight=2.0, undesirable_weight=0.5)
    assert loss.per_sequence.tolist() == pytest.approx([0.5, 1.5, 0.25, 0.05])
    loss.per_sequence.sum().backward()
    slope = [-2 * 3 / 16, -2 * 3 / 16, 0.5 * 1 / 4, 0.5 * 9 / 100]
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx([LN3 * x for x in slope])
    assert {name: metric.value() for name, metric in loss.metrics.items()} == pytest.approx(
        {
            "reward/desirable": LN3,
            "reward/undesirable": 0.0,
            "logps/desirable": -4.0,
            "logps/undesirable": -7.5,
            "kl": 1.0,
        }
    )


def test_kto_starts_at_one_half() -> None:
    loss = kto_loss(REF_LOGPS, REF_LOGPS, DESIRABLE, 0.0, beta=0.1)
    assert loss.per_sequence.tolist() == [0.5] * 4


def test_kto_reference_point_is_a_constant_not_below_zero() -> None:
    kl = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    logps = LOGPS.clone().requires_grad_()
    kto(logps, kl=kl).per_sequence.sum().backward()
    assert kl.grad is None
    below = kto(LOGPS, kl=-3.0)
    assert torch.equal(below.per_sequence, kto(LOGPS, kl=0.0).per_sequence)
    assert below.metrics["kl"].value() == 0.0


def test_kto_kl_by_hand() -> None:
    policy = torch.tensor([-3.0, -6.0, -4.0], requires_grad=True)
    reference = torch.tensor([-5.0, -5.0, -6.5])
    kl = kto_kl(policy, reference)
    assert kl.item() == pytest.approx(3.5 / 3) and not kl.requires_grad and kl.shape == ()
    # the mean is clamped, not its terms
    assert kto_kl(policy, torch.tensor([-5.0, -1.0, -4.0])).item() == 0.0
    assert kto_kl(policy.bfloat16(), reference.bfloat16()).dtype == torch.float32
    with pytest.raises(AlignmentError, match="two or more samples"):
        kto_kl(torch.zeros(0), torch.zeros(0))
    with pytest.raises(AlignmentError, match="ref_mismatched_logps has shape"):
        kto_kl(policy, reference[:2])


def test_bco_by_hand() -> None:
    """beta c - shift = ln 3, -ln 3 where desirable; shift - beta c = 0, 2 ln 3 where not."""
    loss = bco_loss(
        LOGPS, REF_LOGPS, DESIRABLE, LN3, beta=LN3, desirable_weight=2.0, undesirable_weight=0.5
    )
    expected = [2 * 0.2876820724, 2 * 1.3862943611, 0.5 * math.log(2), -0.5 * math.log(0.9)]
    assert loss.per_sequence.tolist() == pytest.approx(expected)
    assert loss.metrics["reward/desirable"].value() == pytest.approx(LN3)
    assert "kl" not in loss.metrics


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_unpaired_gradients_are_the_slopes_of_the_values(name: str) -> None:
    function = {"kto": kto_loss, "bco": bco_loss}[name]
    logps, ref_logps = LOGPS.clone().requires_grad_(), REF_LOGPS.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: function(x, REF_LOGPS, DESIRABLE, 0.4, beta=0.3).per_sequence, logps
    )
    function(logps, ref_logps, DESIRABLE, 0.4, beta=0.3).per_sequence.sum().backward()
    assert ref_logps.grad is None
    low = function(LOGPS.bfloat16(), REF_LOGPS.bfloat16(), DESIRABLE, 0.4, beta=0.3)
    assert low.per_sequence.dtype == torch.float32


def test_metrics_of_a_class_merge_over_micro_batches() -> None:
    """A micro-batch without a desirable sample adds nothing to their mean."""
    whole = kto(LOGPS).metrics
    parts = [
        kto_loss(LOGPS[i], REF_LOGPS[i], DESIRABLE[i], 1.0, beta=LN3).metrics
        for i in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    merged = merge_metrics(*parts)
    assert math.isnan(parts[0]["reward/undesirable"].value())
    for name, metric in whole.items():
        assert merged[name].value() == pytest.approx(metric.value())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight is nan"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        kto(LOGPS, **options)


def test_shapes_are_checked() -> None:
    with pytest.raises(AlignmentError, match="desirable has shape"):
        kto_loss(LOGPS, REF_LOGPS, DESIRABLE[:2], 0.0, beta=0.1)
    with pytest.raises(AlignmentError, match="kl has shape"):
        kto_loss(LOGPS, REF_LOGPS, DESIRABLE, torch.zeros(4), beta=0.1)
