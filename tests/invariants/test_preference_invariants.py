"""The invariants of preference losses. Numbers are the rows of the project's list of silent bugs;
a test opens with its number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.losses import (
    COUPLED_KINDS,
    DIVERGENCES,
    PREFERENCE_KINDS,
    SequenceLoss,
    desensitized_sums,
    preference_loss,
    sequence_weights,
)

PairLossOf = Callable[[Tensor, Tensor, slice], SequenceLoss]
EVERYTHING = slice(0, 6)


def _close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- micro-batches


def _loss_of(kind: str) -> PairLossOf:
    """The loss of a slice of six pairs; references and lengths are fixed by the pairs."""
    generator = torch.Generator().manual_seed(4)
    refs = -20 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[3, 5, 2, 7, 4, 6], [4, 4, 6, 2, 5, 3]])

    def loss(chosen: Tensor, rejected: Tensor, rows: slice) -> SequenceLoss:
        given = (chosen, rejected, *refs[:, rows])
        sizes = {"chosen_lengths": lengths[0, rows], "rejected_lengths": lengths[1, rows]}
        if kind == "mixed":
            weights = {"aot": 0.5, "sigmoid": 1.0, "nll": 0.2}
            return preference_loss(*given, kind=weights, beta=0.1, **sizes)
        smoothing = 0.01 if kind == "exo" else 0.0
        return preference_loss(*given, kind=kind, beta=0.1, label_smoothing=smoothing, **sizes)

    return loss


class Linear:
    """Log-probabilities of six pairs, `[2, 6]`, that depend on four weights."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.features = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        self.theta = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()

    def logps(self, rows: slice) -> Tensor:
        return -8 - 2 * (self.features[:, rows] @ self.theta)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta)[0]

    def direct(self, loss: PairLossOf, rows: slice) -> Tensor:
        return self.gradient(loss(*self.logps(rows), rows).per_sequence.sum())


def _cuts(split: list[int]) -> list[slice]:
    return [slice(sum(split[:i]), sum(split[: i + 1])) for i in range(len(split))]


@pytest.mark.parametrize("split", [[1] * 6, [4, 2], [2, 3, 1]])
@pytest.mark.parametrize("kind", [*PREFERENCE_KINDS, "mixed"])
def test_i01_weighted_gradient_does_not_depend_on_the_micro_batch_split(
    kind: str, split: list[int]
) -> None:
    loss, policy = _loss_of(kind), Linear()
    with torch.no_grad():
        scored = policy.logps(EVERYTHING)
    weights = torch.stack(sequence_weights(lambda c, r: loss(c, r, EVERYTHING), *scored))
    parts = [
        policy.gradient((weights[:, rows] * policy.logps(rows)).sum()) for rows in _cuts(split)
    ]
    _close(torch.stack(parts).sum(0), policy.direct(loss, EVERYTHING))


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_i01_coupled_kinds_are_those_that_a_plain_cut_changes(kind: str) -> None:
    loss, policy = _loss_of(kind), Linear()
    parts = [policy.direct(loss, rows) for rows in _cuts([1] * 6)]
    whole = policy.direct(loss, EVERYTHING)
    difference = (torch.stack(parts).sum(0) - whole).norm() / whole.norm()
    assert difference > 0.05 if kind in COUPLED_KINDS else difference < 1e-12


# ---------------------------------------------------------------- padding

# Ragged rows with a hole, and one row without any counted token.
MASK = torch.tensor(
    [
        [True, True, False, True, True, False],
        [True, True, True, True, True, True],
        [False, True, False, False, False, False],
        [False] * 6,
    ]
)
POISONS = (float("nan"), float("inf"), -float("inf"), 1e6, -1e6)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_i29_poisoned_padding_does_not_reach_the_desensitized_sums(
    alpha: float, poison: float
) -> None:
    clean, results = -torch.rand(4, 6), []
    for value in (0.0, poison):
        logprobs = torch.where(MASK, clean, value).requires_grad_()
        sums = desensitized_sums(logprobs, MASK, torch.tensor([2, 6, 0, 0]), alpha)
        sums.square().sum().backward()
        assert logprobs.grad is not None and not logprobs.grad[~MASK].any()
        results.append((sums.detach(), logprobs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---------------------------------------------------------------- the start of a run


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_i38_dpo_starts_at_ln2_with_margin_zero(divergence: str) -> None:
    """And at slope -beta/2 in chosen; half of it for JS, whose f'' is 1/2 at 1."""
    chosen, rejected = -50 * torch.rand(2, 16)
    chosen.requires_grad_()
    loss = preference_loss(
        chosen,
        rejected,
        chosen.detach().clone(),
        rejected,
        kind="sigmoid",
        beta=0.1,
        divergence=divergence,
    )
    assert (loss.per_sequence - math.log(2)).abs().max() < 1e-6
    assert loss.metrics["reward/margin"].value() == 0.0
    loss.per_sequence.sum().backward()
    slope = -0.05 / 2 if divergence == "js" else -0.05
    torch.testing.assert_close(chosen.grad, torch.full((16,), slope))


SWAPPED = ("sigmoid", "sigmoid_norm", "cpo")


@pytest.mark.parametrize("kind", SWAPPED)
def test_i38_swapping_the_pair_negates_the_margin(kind: str) -> None:
    """-log s(x) and -log s(-x) differ by x, and the gradients in chosen and rejected mirror."""
    chosen, rejected, ref_chosen, ref_rejected = -20 * torch.rand(4, 8, dtype=torch.float64)
    lengths = {"chosen_lengths": torch.full((8,), 3), "rejected_lengths": torch.full((8,), 3)}
    options: dict[str, Any] = {"kind": kind, "beta": 0.1, "nll_coef": 0.0, **lengths}
    one = preference_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    two = preference_loss(rejected, chosen, ref_rejected, ref_chosen, **options)
    margin = 0.1 * (chosen - rejected)
    if kind != "cpo":
        margin = margin - 0.1 * (ref_chosen - ref_rejected)
    if kind == "sigmoid_norm":
        margin = margin / 3
    _close(two.per_sequence - one.per_sequence, margin)
    assert one.metrics["reward/margin"].value() == pytest.approx(
        -two.metrics["reward/margin"].value()
    )
    assert one.metrics["reward/accuracy"].value() + two.metrics["reward/accuracy"].value() == 1


UP_DOWN = tuple(kind for kind in PREFERENCE_KINDS if kind not in ("apo_down", "discopop"))


@pytest.mark.parametrize("kind", UP_DOWN)
def test_i38_at_the_start_chosen_goes_up_and_rejected_down(kind: str) -> None:
    """APO-down pushes both down; DiscoPOP's slope at margin 0 is inverted, as published."""
    logps = torch.tensor([-4.0, -7.0], dtype=torch.float64)
    chosen, rejected = logps.clone().requires_grad_(), (logps - 1).requires_grad_()
    preference_loss(
        chosen,
        rejected,
        logps,
        logps - 1,
        kind=kind,
        beta=0.1,
        label_smoothing=0.01 if kind == "exo" else 0.0,
        chosen_lengths=torch.tensor([3, 4]),
        rejected_lengths=torch.tensor([5, 2]),
    ).per_sequence.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and (rejected.grad >= 0).all() and rejected.grad.any()
