"""Preference losses against a second implementation in plain floats, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.losses import (
    COUPLED_KINDS,
    DIVERGENCE_KINDS,
    PREFERENCE_KINDS,
    REFERENCE_FREE_KINDS,
    SMOOTHED_KINDS,
    preference_loss,
)
from alignment.types import AlignmentError, UserInputError

BETA, SMOOTH = 0.3, 0.1
CHOSEN, REJECTED = [-10.0, -4.0, -7.5], [-12.0, -3.0, -7.0]
REF_CHOSEN, REF_REJECTED = [-11.0, -5.5, -6.0], [-11.5, -3.5, -9.0]
CHOSEN_LENGTHS, REJECTED_LENGTHS = [4, 2, 5], [6, 3, 2]

Pair = dict[str, float]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross(x: float, e: float = 0.0) -> float:
    return -(1 - e) * math.log(sigma(x)) - e * math.log(sigma(-x))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


def exo(x: float, e: float) -> float:
    p, q = sigma(x), sigma(-x)
    return p * math.log(p / (1 - e)) + q * math.log(q / e)


def discopop(x: float, tau: float) -> float:
    gate = sigma(x / tau)
    return (1 - gate) * cross(x) + gate * math.exp(-x)


# c, r: log-ratios; C, R: log-probabilities; lc, lr: lengths
ORACLE: dict[str, Callable[[Pair], float]] = {
    "sigmoid": lambda p: cross(BETA * (p["c"] - p["r"]), SMOOTH),
    "sigmoid_norm": lambda p: cross(BETA * (p["c"] / p["lc"] - p["r"] / p["lr"]), SMOOTH),
    "robust": lambda p: (
        ((1 - SMOOTH) * cross(BETA * (p["c"] - p["r"])) - SMOOTH * cross(-BETA * (p["c"] - p["r"])))
        / (1 - 2 * SMOOTH)
    ),
    "ipo": lambda p: (p["c"] - p["r"] - 1 / (2 * BETA)) ** 2,
    "ipo_norm": lambda p: (p["c"] / p["lc"] - p["r"] / p["lr"] - 1 / (2 * BETA)) ** 2,
    "hinge": lambda p: max(0.0, 1 - BETA * (p["c"] - p["r"])),
    "exo": lambda p: exo(BETA * (p["c"] - p["r"]), SMOOTH),
    "nca": lambda p: (
        cross(BETA * p["c"]) + 0.5 * cross(-BETA * p["c"]) + 0.5 * cross(-BETA * p["r"])
    ),
    "sppo": lambda p: (p["c"] - 0.5 / BETA) ** 2 + (p["r"] + 0.5 / BETA) ** 2,
    "apo_zero": lambda p: 1 - sigma(BETA * p["c"]) + sigma(BETA * p["r"]),
    "apo_down": lambda p: sigma(BETA * p["c"]) + 1 - sigma(BETA * (p["c"] - p["r"])),
    "discopop": lambda p: discopop(BETA * (p["c"] - p["r"]), 0.5),
    "bco": lambda p: cross(BETA * p["c"] - 0.2) + cross(-(BETA * p["r"] - 0.2)),
    "simpo": lambda p: cross(BETA * (p["C"] / p["lc"] - p["R"] / p["lr"]) - 0.7, SMOOTH),
    "cpo": lambda p: cross(BETA * (p["C"] - p["R"]), SMOOTH) - p["C"] / p["lc"],
    "orpo": lambda p: (
        BETA * cross(log_odds(p["C"] / p["lc"]) - log_odds(p["R"] / p["lr"])) - p["C"] / p["lc"]
    ),
}
SMOOTHING = {"sigmoid", "sigmoid_norm", "robust", "exo", "aot", "aot_unpaired", "simpo", "cpo"}


def pairs() -> list[Pair]:
    columns = zip(
        CHOSEN,
        REJECTED,
        REF_CHOSEN,
        REF_REJECTED,
        CHOSEN_LENGTHS,
        REJECTED_LENGTHS,
        strict=True,
    )
    return [
        {"C": C, "R": R, "c": C - RC, "r": R - RR, "lc": lc, "lr": lr}
        for C, R, RC, RR, lc, lr in columns
    ]


def sums(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]


def options(kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "beta": BETA,
        "label_smoothing": SMOOTH if kind in SMOOTHING else 0.0,
        "chosen_lengths": torch.tensor(CHOSEN_LENGTHS),
        "rejected_lengths": torch.tensor(REJECTED_LENGTHS),
        "simpo_gamma": 0.7,
        "bco_shift": 0.2,
        "discopop_tau": 0.5,
    }


@pytest.mark.parametrize("kind", sorted(ORACLE))
def test_kind_against_floats(kind: str) -> None:
    loss = preference_loss(*sums(), **options(kind)).per_sequence
    assert loss.tolist() == pytest.approx([ORACLE[kind](pair) for pair in pairs()], rel=1e-12)


def test_every_kind_has_an_oracle() -> None:
    assert set(PREFERENCE_KINDS) == set(ORACLE) | {"aot", "aot_unpaired"}


def test_aot_against_floats() -> None:
    rows = pairs()
    margins = sorted(row["C"] - row["R"] for row in rows)
    refs = sorted(a - b for a, b in zip(REF_CHOSEN, REF_REJECTED, strict=True))
    expected = [cross(BETA * (m - q), SMOOTH) for m, q in zip(margins, refs, strict=True)]
    loss = preference_loss(*sums(), **options("aot")).per_sequence
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    both = zip(sorted(r["c"] for r in rows), sorted(r["r"] for r in rows), strict=True)
    expected = [cross(BETA * (c - r), SMOOTH) for c, r in both]
    loss = preference_loss(*sums(), **options("aot_unpaired")).per_sequence
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


LN3 = math.log(3)  # s(ln 3) = 3/4, s(2 ln 3) = 9/10
LOG_3_4 = -0.2876820724
# beta, then (logp, ref logp, length) of chosen and of rejected, options, and the loss by hand
BY_HAND: dict[str, tuple[float, tuple[float, ...], tuple[float, ...], dict[str, Any], float]] = {
    # D = 1, x = ln 3
    "sigmoid": (LN3, (-4, -5, 1), (-7, -7, 1), {}, 0.2876820724),
    # 0.9 * 0.28768 + 0.1 * 1.38629
    "sigmoid conservative": (LN3, (-4, -5, 1), (-7, -7, 1), {"label_smoothing": 0.1}, 0.3975433013),
    # means 4/2 and 3/3 apart: x = ln 3
    "sigmoid_norm": (LN3, (-1, -5, 2), (-4, -7, 3), {}, 0.2876820724),
    # (0.9 * 0.28768 - 0.1 * 1.38629) / 0.8
    "robust": (LN3, (-4, -5, 1), (-7, -7, 1), {"label_smoothing": 0.1}, 0.1503555363),
    # D = 3, target 2
    "ipo": (0.25, (-3, -5, 1), (-8, -7, 1), {}, 1.0),
    # 2/2 + 3/3 = 2, target 5
    "ipo_norm": (0.1, (-3, -5, 2), (-10, -7, 3), {}, 9.0),
    "hinge": (0.5, (-4, -5, 1), (-7, -7, 1), {}, 0.5),
    # 3/4 ln(0.75/0.9) + 1/4 ln(0.25/0.1)
    "exo": (LN3, (-4, -5, 1), (-7, -7, 1), {"label_smoothing": 0.1}, 0.0923315145),
    # c = 1, r = -1: 0.28768 + 1.38629/2 + 0.28768/2
    "nca": (LN3, (-4, -5, 1), (-8, -7, 1), {}, 1.1246702892),
    # (2 - 1)^2 + (-3 + 1)^2
    "sppo": (0.5, (-3, -5, 1), (-10, -7, 1), {}, 5.0),
    # 1 - 3/4 + 1/4
    "apo_zero": (LN3, (-4, -5, 1), (-8, -7, 1), {}, 0.5),
    # 3/4 + 1 - 9/10
    "apo_down": (LN3, (-4, -5, 1), (-8, -7, 1), {}, 0.85),
    # g = 3/4: 0.28768/4 + 3/4 * 1/3
    "discopop": (LN3, (-4, -5, 1), (-7, -7, 1), {"discopop_tau": 1.0}, 0.3219205181),
    # beta c - shift = ln 3, shift - beta r = ln 3
    "bco": (LN3, (-3, -5, 1), (-7, -7, 1), {"bco_shift": LN3}, 0.5753641449),
    # means -1 and -2: 2 - gamma = ln 3
    "simpo": (2.0, (-3, 0, 3), (-4, 0, 2), {"simpo_gamma": 2 - LN3}, 0.2876820724),
    # x = ln 3, NLL 6/3
    "cpo": (LN3, (-6, 0, 3), (-7, 0, 2), {}, 2.2876820724),
    # p = 1/2 and 1/4, odds 1 and 1/3: 0.1 * 0.28768 + ln 2
    "orpo": (0.1, (-2 * math.log(2), 0, 2), (-6 * math.log(2), 0, 3), {}, 0.7219153878),
    # one pair is sorted already
    "aot": (LN3, (-4, -5, 1), (-7, -7, 1), {}, 0.2876820724),
    "aot_unpaired": (LN3, (-4, -5, 1), (-7, -7, 1), {}, 0.2876820724),
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_kind_by_hand(name: str) -> None:
    beta, chosen, rejected, options, expected = BY_HAND[name]
    logps, ref_logps, lengths = (
        [torch.tensor([x], dtype=torch.float64) for x in pair]
        for pair in zip(chosen, rejected, strict=True)
    )
    loss = preference_loss(
        *logps,
        *ref_logps,
        kind=name.split()[0],
        beta=beta,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        **options,
    )
    assert loss.per_sequence.item() == pytest.approx(expected, abs=1e-9)


def test_what_the_kinds_take() -> None:
    assert {"aot", "aot_unpaired"} == COUPLED_KINDS
    assert {"simpo", "cpo", "orpo"} == REFERENCE_FREE_KINDS
    assert SMOOTHED_KINDS == SMOOTHING
    made_of_the_difference = {"sigmoid", "sigmoid_norm", "robust", "ipo", "ipo_norm", "hinge"}
    assert made_of_the_difference | {"exo", "discopop"} == DIVERGENCE_KINDS


def test_every_kind_is_worked_by_hand() -> None:
    assert {name.split()[0] for name in BY_HAND} == set(PREFERENCE_KINDS)


def test_aot_by_hand_matches_sorted_margins() -> None:
    """Margins 0 and 2 to the reference's 1 and -1: sorted they are 1 apart, twice; unsorted the
    differences would be -1 and 3."""
    zeros = torch.zeros(2)
    loss = preference_loss(
        torch.tensor([0.0, 2.0]), zeros, torch.tensor([1.0, -1.0]), zeros, kind="aot", beta=LN3
    )
    assert loss.per_sequence.tolist() == pytest.approx([-LOG_3_4, -LOG_3_4])
    # log-ratios 2, 0 and -1, 1: sorted 0 and 2 less -1 and 1
    loss = preference_loss(
        torch.tensor([2.0, 0.0]),
        torch.tensor([-1.0, 1.0]),
        zeros,
        zeros,
        kind="aot_unpaired",
        beta=LN3,
    )
    assert loss.per_sequence.tolist() == pytest.approx([-LOG_3_4, -LOG_3_4])


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_gradients_are_the_slopes_of_the_values(kind: str) -> None:
    chosen, rejected, *refs = sums()
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return preference_loss(c, r, *refs, **options(kind)).per_sequence

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_references_are_constants_and_unused_by_reference_free_kinds(kind: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (x.requires_grad_() for x in sums())
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, **options(kind))
    loss.per_sequence.sum().backward()
    assert chosen.grad is not None and ref_chosen.grad is None and ref_rejected.grad is None
    if kind in REFERENCE_FREE_KINDS:
        free = preference_loss(chosen, rejected, None, None, **options(kind))
        assert torch.equal(free.per_sequence, loss.per_sequence)
    else:
        with pytest.raises(UserInputError, match="compares with a reference"):
            preference_loss(chosen, rejected, None, None, **options(kind))


def test_metrics() -> None:
    metrics = preference_loss(*sums(), kind="sigmoid", beta=BETA).metrics
    rows = pairs()
    chosen = sum(BETA * row["c"] for row in rows) / 3
    rejected = sum(BETA * row["r"] for row in rows) / 3
    expected = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/margin": chosen - rejected,
        "reward/accuracy": 2 / 3,
        "logps/chosen": sum(CHOSEN) / 3,
        "logps/rejected": sum(REJECTED) / 3,
    }
    assert {k: m.value() for k, m in metrics.items()} == pytest.approx(expected)
    simpo = preference_loss(*sums(), **options("simpo")).metrics
    expected_mean = BETA * sum(row["C"] / row["lc"] for row in rows) / 3
    assert simpo["reward/chosen"].value() == pytest.approx(expected_mean)


def test_nll_term_can_join_any_kind() -> None:
    plain = preference_loss(*sums(), **options("sigmoid"))
    joined = preference_loss(*sums(), **options("sigmoid"), nll_coef=0.5)
    nll = [-row["C"] / row["lc"] for row in pairs()]
    difference = joined.per_sequence - plain.per_sequence
    assert difference.tolist() == pytest.approx([0.5 * x for x in nll])
    assert joined.metrics["nll"].value() == pytest.approx(sum(nll) / 3)
    assert "nll" not in plain.metrics


def test_orpo_stands_probability_one() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    ones = torch.ones(1)
    loss = preference_loss(
        chosen,
        torch.tensor([-1e4]),
        None,
        None,
        kind="orpo",
        beta=0.1,
        chosen_lengths=ones,
        rejected_lengths=ones,
    )
    loss.per_sequence.sum().backward()
    assert loss.per_sequence.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def test_low_precision_sums_are_upcast() -> None:
    low = [x.bfloat16() for x in sums()]
    loss = preference_loss(*low, **options("sigmoid")).per_sequence
    full = preference_loss(*(x.float() for x in low), **options("sigmoid")).per_sequence
    assert loss.dtype == torch.float32 and torch.equal(loss, full)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sigmod"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        (
            {"kind": "hinge", "label_smoothing": 0.1},
            "label_smoothing has no meaning in preference loss 'hinge'",
        ),
        ({"kind": "exo", "label_smoothing": 0.0}, "'exo' needs label_smoothing"),
        (
            {"kind": "simpo", "chosen_lengths": None},
            "part of preference loss 'simpo'; give",
        ),
        ({"kind": "cpo", "chosen_lengths": None}, r"part of the NLL term \(weight 1\); give"),
        ({"kind": "discopop", "label_smoothing": 0.0, "discopop_tau": 0.0}, "discopop_tau"),
        ({"divergence": "jss"}, "did you mean 'js'"),
        ({"kind": "aot", "divergence": "js"}, "divergence 'js' has no meaning in .* 'aot'"),
        ({"divergence": "alpha", "alpha": 1.0}, "alpha-divergence is 1.0.*'forward_kl'"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        preference_loss(*sums(), **{**options("sigmoid"), **changes})


def test_shapes_are_checked() -> None:
    chosen, rejected, ref_chosen, _ = sums()
    with pytest.raises(AlignmentError, match=r"ref_rejected_logps has shape \(3, 1\)"):
        preference_loss(chosen, rejected, ref_chosen, ref_chosen[:, None], kind="sigmoid", beta=0.1)
