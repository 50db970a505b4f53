"""The score that a policy's loss gives a completion: by hand, and against the losses themselves."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.config.methods.base import compares_with_reference
from alignment.config.methods.kto import UnpairedLossConfig
from alignment.config.methods.preference import PreferenceLossConfig
from alignment.losses import (
    COUPLED_KINDS,
    DIVERGENCES,
    LOGISTIC_KINDS,
    PREFERENCE_KINDS,
    preference_loss,
    preference_score,
)
from alignment.trainers.pair_scores import pair_scores, scores_are_logits
from alignment.types import Sample, UserInputError

BETA = 0.3
# Chosen and rejected side: sum under the policy, sum under the reference, tokens.
SIDES = ((-10.0, -11.0, 4), (-4.0, -2.5, 8))


def column(i: int, j: int) -> Tensor:
    return torch.tensor([SIDES[i][j]], dtype=torch.float64)


def scores(kind: str, **options: Any) -> list[float]:
    return [
        float(preference_score(*(column(i, j) for j in range(3)), kind=kind, beta=BETA, **options))
        for i in (0, 1)
    ]


def odds(logp: float) -> float:
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


BY_HAND = {
    "sigmoid_norm": (0.3 * 1.0 / 4, 0.3 * -1.5 / 8),
    "ipo_norm": (0.3 * 1.0 / 4, 0.3 * -1.5 / 8),
    "simpo": (0.3 * -10 / 4, 0.3 * -4 / 8),
    "cpo": (0.3 * -10, 0.3 * -4),
    "orpo": (odds(-10 / 4), odds(-4 / 8)),
}


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_the_score_of_each_kind_by_hand(kind: str) -> None:
    expected = BY_HAND.get(kind, (0.3 * 1.0, 0.3 * -1.5))
    assert scores(kind) == pytest.approx(expected, abs=1e-12)


def test_another_divergence_takes_the_place_of_the_log_ratio() -> None:
    assert scores("sigmoid", divergence="forward_kl") == pytest.approx(
        [0.3 * (1 - math.exp(-1.0)), 0.3 * (1 - math.exp(1.5))], abs=1e-12
    )
    assert scores("sigmoid_norm", divergence="alpha", alpha=0.5) == pytest.approx(
        [0.3 * 2 * (1 - math.exp(-0.5)) / 4, 0.3 * 2 * (1 - math.exp(0.75)) / 8], abs=1e-12
    )


def loss_of(kind: str, **options: Any) -> float:
    (c, ref_c, n_c), (r, ref_r, n_r) = [[column(i, j) for j in range(3)] for i in (0, 1)]
    lengths = {"chosen_lengths": n_c, "rejected_lengths": n_r}
    given = {"kind": kind, "beta": BETA, "nll_coef": 0.0, "simpo_gamma": 0.0, **lengths, **options}
    return float(preference_loss(c, r, ref_c, ref_r, **given).per_sequence)


@pytest.mark.parametrize("kind", sorted(LOGISTIC_KINDS - {"exo"}))
def test_a_logistic_loss_is_the_log_loss_of_the_difference_in_score(kind: str) -> None:
    chosen, rejected = scores(kind)
    log_loss = math.log1p(math.exp(rejected - chosen))
    weight = BETA if kind == "orpo" else 1.0
    assert loss_of(kind) == pytest.approx(weight * log_loss, abs=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_under_each_divergence(divergence: str) -> None:
    chosen, rejected = scores("sigmoid", divergence=divergence)
    log_loss = math.log1p(math.exp(rejected - chosen))
    assert loss_of("sigmoid", divergence=divergence) == pytest.approx(log_loss, abs=1e-12)


def test_exo_fits_the_probability_of_its_scores() -> None:
    chosen, rejected = scores("exo")
    p = 1 / (1 + math.exp(rejected - chosen))
    divergence = p * math.log(p / 0.9) + (1 - p) * math.log((1 - p) / 0.1)
    assert loss_of("exo", label_smoothing=0.1) == pytest.approx(divergence, abs=1e-9)


# Those of aot are of a whole batch's sorted scores, which of one pair are its own.
@pytest.mark.parametrize(
    "kind", sorted(frozenset(PREFERENCE_KINDS) - LOGISTIC_KINDS - COUPLED_KINDS)
)
def test_no_other_loss_is_a_log_loss(kind: str) -> None:
    chosen, rejected = scores(kind)
    assert loss_of(kind) != pytest.approx(math.log1p(math.exp(rejected - chosen)), abs=1e-3)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserInputError, match="did you mean 'sigmoid'"):
        scores("sigmoyd")


# -- of a recipe's method ---------------------------------------------------------------------

# Two tokens that count around two that do not: the turn of somebody else.
SAMPLES = (
    Sample((1,), (2, 3, 4, 5), (True, False, False, True)),
    Sample((1,), (6,), (True,)),
)
OWN = [torch.tensor([-1.0, -50.0, -60.0, -2.0]), torch.tensor([-0.5])]
REFERENCE = [torch.tensor([-1.5, -10.0, -20.0, -2.25]), torch.tensor([-0.25])]


def method(**loss: Any) -> Any:
    config = PreferenceLossConfig.model_validate(loss)
    return SimpleNamespace(loss=config, uses_reference=config.uses_reference)


def of_pair(algorithm: Any, *, alone: bool = False) -> tuple[float, float]:
    chosen, rejected = pair_scores(algorithm, SAMPLES, OWN, None if alone else REFERENCE)
    (first,), (second,) = chosen, rejected
    return first, second


def test_tokens_outside_the_loss_do_not_count() -> None:
    assert of_pair(method(kind="sigmoid", beta=0.2)) == pytest.approx((0.2 * 0.75, 0.2 * -0.25))
    assert of_pair(method(kind="sigmoid_norm", beta=4.0)) == pytest.approx((4 * 0.375, 4 * -0.25))
    simpo = of_pair(method(kind="simpo", beta=2.0), alone=True)
    assert simpo == pytest.approx((2 * -1.5, 2 * -0.5))


def test_the_excess_of_the_longer_side_counts_as_in_training() -> None:
    # The shorter side has one token, so of the longer one's second a quarter counts.
    scores = of_pair(method(kind="sigmoid", beta=1.0, desensitize=0.25))
    assert scores == pytest.approx((0.5 + 0.25 * 0.25, -0.25))


def test_a_weighted_sum_ranks_by_its_first_kind_with_a_reference() -> None:
    mixed = method(kind={"cpo": 0.5, "sigmoid": 0.5, "nll": 1.0}, beta=1.0)
    assert of_pair(mixed) == pytest.approx((0.75, -0.25))
    without = method(kind={"simpo": 0.5, "cpo": 0.5}, beta=1.0)
    assert of_pair(without, alone=True) == pytest.approx((-1.5, -0.5))


def test_other_methods_rank_by_the_log_ratio() -> None:
    kto = SimpleNamespace(loss=UnpairedLossConfig(beta=0.5), uses_reference=True)
    assert of_pair(kto) == pytest.approx((0.375, -0.125))
    assert of_pair(SimpleNamespace()) == pytest.approx((0.75, -0.25))
    assert compares_with_reference(SimpleNamespace())
    assert not compares_with_reference(method(kind="orpo"))


@pytest.mark.parametrize(
    ("loss", "logits"),
    [
        ({"kind": "sigmoid"}, True),
        ({"kind": "sigmoid", "divergence": "js"}, True),
        ({"kind": "simpo"}, True),
        ({"kind": "ipo"}, False),
        ({"kind": "sppo"}, False),
        ({"kind": "hinge"}, False),
        ({"kind": {"sigmoid": 1.0, "nll": 1.0}}, True),
        ({"kind": {"sigmoid": 1.0, "bco": 1.0}}, False),
    ],
)
def test_only_a_logistic_loss_gives_probabilities(loss: dict[str, Any], logits: bool) -> None:
    assert scores_are_logits(method(**loss)) == logits
    assert not scores_are_logits(SimpleNamespace(loss=UnpairedLossConfig()))
    assert not scores_are_logits(SimpleNamespace())


@pytest.mark.parametrize(
    ("chosen", "rejected", "divergence"),
    [(-45.0, -60.0, "forward_kl"), (20.0, 18.0, "forward_kl"), (20.0, 18.0, "js")],
)
def test_what_a_divergence_flattens_out_is_ranked_all_the_same(
    chosen: float, rejected: float, divergence: str
) -> None:
    """f' of both is one number in float32."""
    better, worse = (
        preference_score(
            torch.tensor([log_ratio]),
            torch.zeros(1),
            torch.tensor([8.0]),
            kind="sigmoid",
            beta=0.1,
            divergence=divergence,
        )
        for log_ratio in (chosen, rejected)
    )
    assert better > worse
