"""What changes a preference loss from outside: divergences, weighted sums, desensitized sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.losses import (
    DIVERGENCE_KINDS,
    DIVERGENCES,
    PREFERENCE_KINDS,
    desensitized_sums,
    divergence_score,
    preference_loss,
    sequence_weights,
)
from alignment.types import AlignmentError, UserInputError

LN3 = math.log(3)
# beta c = ln 3, -ln 3 and beta r = 0, ln 3 at beta = ln 3
CHOSEN, REJECTED = [-4.0, -6.0], [-7.0, -3.0]
REF_CHOSEN, REF_REJECTED = [-5.0, -5.0], [-7.0, -4.0]
LENGTHS = {"chosen_lengths": torch.tensor([2, 4]), "rejected_lengths": torch.tensor([7, 1])}


def sums() -> list[Tensor]:
    rows = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


# ---------------------------------------------------------------- divergences


@pytest.mark.parametrize(
    ("divergence", "at_2", "at_half"),
    [
        ("reverse_kl", 0.6931471806, -0.6931471806),
        ("forward_kl", 0.5, -1.0),  # 1 - 1/2, 1 - 2
        ("js", 0.2876820724, -0.4054651081),  # log 4/3, log 2/3
        ("alpha", 0.5857864376, -0.8284271247),  # 2 (1 - 2^-1/2), 2 (1 - 2^1/2)
    ],
)
def test_divergence_scores_by_hand(divergence: str, at_2: float, at_half: float) -> None:
    log_ratio = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).log().requires_grad_()
    score = divergence_score(log_ratio, divergence=divergence, alpha=0.5)
    assert score.tolist() == pytest.approx([at_2, at_half, 0.0], abs=1e-9)
    score[2].backward()
    assert log_ratio.grad is not None and log_ratio.grad[2] == pytest.approx(
        0.5 if divergence == "js" else 1.0
    )


def test_alpha_divergence_goes_from_reverse_to_forward_kl() -> None:
    log_ratio = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for alpha, limit in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        near = divergence_score(log_ratio, divergence="alpha", alpha=alpha)
        torch.testing.assert_close(
            near, divergence_score(log_ratio, divergence=limit), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_with_a_divergence_by_hand(divergence: str) -> None:
    """-log s(beta (f'(2) - f'(1/2)))."""
    score = {"reverse_kl": 2 * math.log(2), "forward_kl": 1.5, "js": math.log(2)}
    score["alpha"] = 2 * (2**0.5 - 2**-0.5)
    logps = [torch.tensor([x]) for x in (-3 + math.log(2), -5 - math.log(2), -3.0, -5.0)]
    loss = preference_loss(*logps, kind="sigmoid", beta=0.7, divergence=divergence)
    expected = math.log1p(math.exp(-0.7 * score[divergence]))
    assert loss.per_sequence.item() == pytest.approx(expected, rel=1e-6)
    # what is logged is the log-ratio, so that it compares between divergences
    assert loss.metrics["reward/margin"].value() == pytest.approx(1.4 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", sorted(DIVERGENCE_KINDS))
def test_gradients_with_a_divergence(kind: str, divergence: str) -> None:
    chosen, rejected, *refs = sums()

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return preference_loss(
            c,
            r,
            *refs,
            kind=kind,
            beta=0.3,
            divergence=divergence,
            alpha=0.4,
            label_smoothing=0.1 if kind == "exo" else 0.0,
            **LENGTHS,
        ).per_sequence

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("side", [0, 1], ids=["chosen", "rejected"])
@pytest.mark.parametrize("nats", [7.0, 60.0, 900.0, 1e6])
@pytest.mark.parametrize(
    ("kind", "divergence"),
    [(kind, "reverse_kl") for kind in PREFERENCE_KINDS]
    + [(kind, one) for kind in sorted(DIVERGENCE_KINDS) for one in DIVERGENCES[1:]],
)
def test_a_completion_pushed_far_down_keeps_loss_and_gradient_finite(
    kind: str, divergence: str, nats: float, side: int
) -> None:
    logps = [torch.tensor([-3.0]), torch.tensor([-4.0])]
    refs = [x.clone() for x in logps]
    logps[side] -= nats
    loss = preference_loss(
        *(x.requires_grad_() for x in logps),
        *refs,
        kind=kind,
        beta=0.1,
        divergence=divergence,
        label_smoothing=1e-3 if kind == "exo" else 0.0,
        chosen_lengths=torch.tensor([3]),
        rejected_lengths=torch.tensor([2]),
    )
    loss.per_sequence.sum().backward()
    assert loss.per_sequence.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in logps)


@pytest.mark.parametrize(
    ("log_ratio", "divergence", "value", "slope"),
    [
        # x = 0.1 (1 - e^7): the gate is shut, and -log s(x) = -x
        (-7.0, "forward_kl", 109.5633158, -109.6633158),
        (-2000.0, "reverse_kl", 200.0, -0.1),
        (2000.0, "reverse_kl", 0.0, 0.0),
        # the gate is open: exp(-x), x = 2, and its slope -beta exp(-x)
        (20.0, "reverse_kl", 0.1353352832, -0.0135335283),
    ],
)
def test_discopop_far_from_zero_by_hand(
    log_ratio: float, divergence: str, value: float, slope: float
) -> None:
    chosen, zero = torch.tensor([log_ratio], requires_grad=True), torch.zeros(1)
    options: dict[str, Any] = {"kind": "discopop", "beta": 0.1, "divergence": divergence}
    loss = preference_loss(chosen, zero, zero, zero, **options, discopop_tau=0.05)
    assert loss.per_sequence.item() == pytest.approx(value, rel=1e-5)
    loss.per_sequence.sum().backward()
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(slope, rel=1e-5)


# ---------------------------------------------------------------- weighted sums


def test_weighted_sum_by_hand() -> None:
    loss = preference_loss(
        *sums(), kind={"sigmoid": 0.8, "apo_zero": 2.0, "nll": 0.5}, beta=LN3, **LENGTHS
    )
    # D = 1, -2: -log 3/4, -log 1/10. APO-zero: 1/4 + 1/2, 3/4 + 3/4. NLL: 4/2, 6/4
    sigmoid = [0.2876820724, 2.3025850930]
    apo, nll = [0.75, 1.5], [2.0, 1.5]
    expected = [0.8 * s + 2.0 * a + 0.5 * n for s, a, n in zip(sigmoid, apo, nll, strict=True)]
    assert loss.per_sequence.tolist() == pytest.approx(expected)
    values = {name: metric.value() for name, metric in loss.metrics.items()}
    assert values == pytest.approx(
        {
            "loss/sigmoid": 2.5902671654 / 2,
            "loss/apo_zero": 1.125,
            "nll": 1.75,
            "reward/chosen": 0.0,
            "reward/rejected": LN3 / 2,
            "reward/margin": -LN3 / 2,
            "reward/accuracy": 0.5,
            "logps/chosen": -5.0,
            "logps/rejected": -5.0,
        }
    )


def test_a_reference_free_kind_keeps_its_meaning_in_a_sum() -> None:
    """cpo: beta (C - R) = 3 ln 3, -3 ln 3, and its NLL, whatever the references are."""
    loss = preference_loss(*sums(), kind={"cpo": 0.5, "sigmoid": 1.0}, beta=LN3, **LENGTHS)
    cpo = [math.log1p(1 / 27), math.log1p(27)]
    expected = [
        0.5 * c + 0.5 * nll + s
        for c, nll, s in zip(cpo, [2.0, 1.5], [0.2876820724, 2.3025850930], strict=True)
    ]
    assert loss.per_sequence.tolist() == pytest.approx(expected)
    assert loss.metrics["reward/rejected"].value() == pytest.approx(LN3 / 2)  # of the log-ratios
    assert loss.metrics["loss/cpo"].value() == pytest.approx(sum(cpo) / 2)
    chosen, rejected, *_ = sums()
    free = preference_loss(
        chosen, rejected, None, None, kind={"simpo": 1.0, "cpo": 1.0}, beta=LN3, **LENGTHS
    )
    assert free.metrics["reward/chosen"].value() == pytest.approx(-LN3 * 1.75)  # simpo's mean


def test_options_reach_the_kinds_of_a_sum() -> None:
    """Smoothing is for sigmoid alone: 0.9 * 0.28768 + 0.1 * 1.38629; bco is shifted by ln 3."""
    one = [x[:1] for x in sums()]
    loss = preference_loss(
        *one,
        kind={"sigmoid": 1.0, "bco": 1.0},
        beta=LN3,
        label_smoothing=0.1,
        bco_shift=LN3,
    )
    assert loss.per_sequence.item() == pytest.approx(0.3975433013 + math.log(2) + 0.2876820724)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"sigmoid": 1.0, "bcoo": 0.2}, {}, "did you mean 'bco'"),
        ({"sigmoid": 1.0, "nl": 0.2}, {}, "did you mean 'nll'"),
        ({"sigmoid": 0.0, "bco": 0.2}, {}, "weight of preference loss 'sigmoid' is 0.0"),
        ({"sigmoid": 1.0, "nll": math.inf}, {}, "weight of preference loss 'nll' is inf"),
        ({"nll": 1.0}, {}, "name no preference loss"),
        ({}, {}, "name no preference loss"),
        ({"bco": 1.0, "hinge": 1.0}, {"label_smoothing": 0.1}, "'hinge', 'bco'; drop it"),
        ({"bco": 1.0, "hinge": 1.0}, {"divergence": "js"}, "loss 'bco'; drop it"),
        (
            {"sigmoid": 1.0, "simpo": 1.0},
            {},
            "part of preference loss 'simpo'; give",
        ),
        (
            {"orpo": 0.5, "hinge": 1.0, "simpo": 1.0},
            {},
            r"part of preference loss 'simpo', 'orpo' and of the NLL term \(weight 0.5\); give",
        ),
        ({"sigmoid": 1.0, "nll": 0.5}, {}, r"part of the NLL term \(weight 0.5\); give"),
        ({"sigmoid": 1.0}, {"nll_coef": 0.5}, "nll_coef is 0.5 beside a weighted sum; name 'nll'"),
    ],
)
def test_bad_sums_are_named(
    weights: dict[str, float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        preference_loss(*sums(), kind=weights, beta=0.1, **options)


def test_a_sum_needs_a_reference_if_one_kind_does() -> None:
    chosen, rejected, *_ = sums()
    with pytest.raises(UserInputError, match="loss 'bco' compares with a reference"):
        preference_loss(
            chosen, rejected, None, None, kind={"cpo": 1.0, "bco": 1.0}, beta=0.1, **LENGTHS
        )


# ---------------------------------------------------------------- desensitized sums


def test_desensitized_sums_by_hand() -> None:
    nan = float("nan")
    logprobs = torch.tensor([[-1.0, nan, -2.0, -4.0], [-8.0, -16.0, nan, nan]], requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    lengths = torch.tensor([2, 2])
    sums = desensitized_sums(logprobs, mask, lengths, 0.25)
    assert sums.tolist() == [-4.0, -24.0]  # -1 - 2 - 4/4: the hole is no place
    sums.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[1.0, 0.0, 1.0, 0.25], [1.0, 1.0, 0.0, 0.0]]
    assert desensitized_sums(logprobs, mask, lengths, 1.0).tolist() == [-7.0, -24.0]
    assert desensitized_sums(logprobs, mask, lengths, 0.0).tolist() == [-3.0, -24.0]
    assert desensitized_sums(logprobs.bfloat16(), mask, lengths, 1.0).dtype == torch.float32


def test_desensitized_sums_check_their_arguments() -> None:
    logprobs, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserInputError, match="length-desensitized sum is"):
            desensitized_sums(logprobs, mask, torch.tensor([1, 1]), alpha)
    with pytest.raises(AlignmentError, match="public_lengths has shape"):
        desensitized_sums(logprobs, mask, torch.tensor([1]), 0.5)
    with pytest.raises(AlignmentError, match="mask has shape"):
        desensitized_sums(logprobs, mask[:1], torch.tensor([1, 1]), 0.5)


# ---------------------------------------------------------------- weights of a gradient


def test_sequence_weights_by_hand() -> None:
    """IPO's slope is 2 (D - target): D = 1 and -2, target 0.5. They stay constants, also where
    gradients are off."""
    chosen, rejected, *refs = sums()
    chosen.requires_grad_()
    with torch.no_grad():
        weights = sequence_weights(
            lambda c, r: preference_loss(c, r, *refs, kind="ipo", beta=1.0), chosen, rejected
        )
    assert weights[0].tolist() == [1.0, -5.0] and weights[1].tolist() == [-1.0, 5.0]
    assert not weights[0].requires_grad and chosen.grad is None
