"""Losses and gradients of the preference trainers against float64 by hand, however they are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import (
    Gradients,
    assert_same_gradient,
    catch_gradients,
    drift,
    made_up_labelled,
    made_up_pairs,
    parts_of,
    with_pairs,
)
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from alignment.modeling.catalog import fetch
from alignment.trainers.context import TrainingContext
from alignment.trainers.dpo import DPOTrainer
from alignment.trainers.kto import KTOTrainer
from alignment.types import PairBatch, Sample

BUDGETS = (4096, 60, 1)
"""All pairs in one micro-batch, some, one each."""


class PlainModel:
    """Weights in transformers, float64, one row at a time: shares no code with the toolkit."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(fetch("tiny-random"))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        self.model = self.model.double()

    def log_probabilities(self, sample: Sample) -> Tensor:
        """Of the completion's tokens that count."""
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
        logits = self.model(ids, use_cache=False).logits[0]
        first = len(sample.prompt_ids) - 1
        everything = logits[first:-1].log_softmax(-1)
        chosen: Tensor = everything[range(len(everything)), sample.completion_ids]
        return chosen[torch.tensor(sample.loss_mask)]

    def gradients_of(self, loss: Tensor) -> Gradients:
        named = dict(self.model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


class Sides:
    """Log-probabilities of the pairs' tokens by hand: [(chosen, rejected)] per pair."""

    def __init__(self, policy: PlainModel, reference: PlainModel, pairs: PairBatch) -> None:
        def both(model: PlainModel) -> list[tuple[Tensor, Tensor]]:
            sides = zip(pairs.chosen, pairs.rejected, strict=True)
            return [(model.log_probabilities(c), model.log_probabilities(r)) for c, r in sides]

        self.own = both(policy)
        with torch.no_grad():
            self.ref = both(reference)

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of the summed chosen and rejected log-probabilities, `[P]` each."""
        chosen, rejected = zip(
            *(
                (own[0].sum() - ref[0].sum(), own[1].sum() - ref[1].sum())
                for own, ref in zip(self.own, self.ref, strict=True)
            ),
            strict=True,
        )
        return torch.stack(chosen), torch.stack(rejected)

    def margins(self, which: str) -> Tensor:
        rows = self.own if which == "own" else self.ref
        return torch.stack([c.sum() - r.sum() for c, r in rows])

    def nll(self) -> Tensor:
        return torch.stack([-c.mean() for c, _ in self.own])

    def cut(self, alpha: float) -> Tensor:
        """D with the longer side's excess tokens weighed by alpha."""
        out = []
        for own, ref in zip(self.own, self.ref, strict=True):
            shared = min(len(own[0]), len(own[1]))
            c, r = (a - b for a, b in zip(own, ref, strict=True))
            sums = [x[:shared].sum() + alpha * x[shared:].sum() for x in (c, r)]
            out.append(sums[0] - sums[1])
        return torch.stack(out)


def _aot(sides: Sides) -> Tensor:
    own, ref = (sides.margins(which).sort().values for which in ("own", "ref"))
    return -logsigmoid(0.2 * (own - ref))


def _logits(sides: Sides) -> Tensor:
    chosen, rejected = sides.ratios()
    return 0.2 * (chosen - rejected)


def _sigmoid(sides: Sides) -> Tensor:
    return -logsigmoid(_logits(sides))


def _cdpo(sides: Sides) -> Tensor:
    z = _logits(sides)
    return -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z)


def _robust(sides: Sides) -> Tensor:
    z = _logits(sides)
    return (-0.8 * logsigmoid(z) + 0.2 * logsigmoid(-z)) / 0.6


def _simpo(sides: Sides) -> Tensor:
    means = torch.stack([c.mean() - r.mean() for c, r in sides.own])
    return -logsigmoid(0.2 * means - 1.3)


def _discopop(sides: Sides) -> Tensor:
    z = _logits(sides)
    gate = 1 / (1 + (-z / 0.2).exp())
    return -(1 - gate) * logsigmoid(z) + gate * (-z).exp()


def _alpha_divergence(sides: Sides) -> Tensor:
    """f'(t) = (1 - t^-0.7) / 0.7 of both ratios t in the place of their logarithms."""
    chosen, rejected = ((1 - (-0.7 * x).exp()) / 0.7 for x in sides.ratios())
    return -logsigmoid(0.2 * (chosen - rejected))


BY_HAND: dict[str, tuple[str, Callable[[Sides], Tensor]]] = {
    "sigmoid": ("{kind: sigmoid, beta: 0.2}", _sigmoid),
    "conservative": ("{kind: sigmoid, beta: 0.2, label_smoothing: 0.1}", _cdpo),
    "robust": ("{kind: robust, beta: 0.2, label_smoothing: 0.2}", _robust),
    "simpo": ("{kind: simpo, beta: 0.2, simpo_gamma: 1.3}", _simpo),
    "discopop": ("{kind: discopop, beta: 0.2, discopop_tau: 0.2}", _discopop),
    "alpha-divergence": (
        "{kind: sigmoid, beta: 0.2, divergence: alpha, alpha: 0.7}",
        _alpha_divergence,
    ),
    "with a likelihood term": (
        "{kind: sigmoid, beta: 0.2, nll_coef: 0.5}",
        lambda sides: _sigmoid(sides) + 0.5 * sides.nll(),
    ),
    "length-desensitized": (
        "{kind: sigmoid, beta: 0.2, desensitize: 0.3}",
        lambda sides: -logsigmoid(0.2 * sides.cut(0.3)),
    ),
    "aot": ("{kind: aot, beta: 0.2}", _aot),
    "aot_unpaired": (
        "{kind: aot_unpaired, beta: 0.2}",
        lambda sides: (
            -logsigmoid(0.2 * (sides.ratios()[0].sort().values - sides.ratios()[1].sort().values))
        ),
    ),
    "weighted sum with a coupled one": (
        "{kind: {aot: 0.5, sigmoid: 1.5, nll: 0.2}, beta: 0.2}",
        lambda sides: 0.5 * _aot(sides) + 1.5 * _sigmoid(sides) + 0.2 * sides.nll(),
    ),
}


def weights_in(context: TrainingContext) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in context.policy.model.named_parameters()}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("case", BY_HAND)
def test_i01_dpo_loss_and_gradient_for_every_micro_batch_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, budget: int
) -> None:
    loss, by_hand = BY_HAND[case]
    pairs = made_up_pairs(7)
    context = with_pairs(
        parts_of(
            "dpo",
            tmp_path,
            f"algorithm={{type: dpo, steps: 1, pairs_per_step: 7, loss: {loss}}}",
            f"optim.micro_batch_tokens={budget}",
            "optim.max_grad_norm=1e9",
        ),
        pairs,
    )
    reference = PlainModel(weights_in(context))
    trainer = DPOTrainer(context)
    drift(context)
    policy = PlainModel(weights_in(context))
    gradients = catch_gradients(monkeypatch)
    metrics = trainer.step(1).metrics.result()
    sides = Sides(policy, reference, pairs)
    expected = by_hand(sides).mean()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradient(gradients[0], policy.gradients_of(expected))
    if case == "simpo":  # compares with no reference
        return
    chosen, rejected = sides.ratios()
    if "desensitized" not in case:
        assert metrics["dpo/reward/margin"] == pytest.approx(
            0.2 * (chosen - rejected).mean().item(), abs=1e-5
        )
    tokens = sum(len(c) for c, _ in sides.own)
    assert metrics["dpo/log_ratio/chosen"] == pytest.approx(chosen.sum().item() / tokens, abs=1e-5)


def _kto_term(kind: str, log_ratio: Tensor, point: float, desirable: bool) -> Tensor:
    """One sample's loss at beta 0.2, undesirable ones weighing 2.5."""
    signed = (0.2 * log_ratio - point) if kind == "bco" else 0.2 * (log_ratio - point)
    signed = signed if desirable else -signed
    loss = -torch.log(torch.sigmoid(signed)) if kind == "bco" else 1 - torch.sigmoid(signed)
    return loss if desirable else 2.5 * loss


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired", "bco"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_i01_kto_loss_and_gradient_for_every_micro_batch_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, kind: str
) -> None:
    labelled = made_up_labelled(7)
    context = parts_of(
        "kto",
        tmp_path,
        "algorithm={type: kto, steps: 1, samples_per_step: 7}",
        f"algorithm.loss={{kind: {kind}, beta: 0.2, undesirable_weight: 2.5}}",
        f"optim.micro_batch_tokens={budget}",
        "optim.max_grad_norm=1e9",
    )
    order = type(context.order)(7, seed=0, shuffle=False)
    context = replace(context, train=replace(context.train, labelled=labelled), order=order)
    reference = PlainModel(weights_in(context))
    trainer = KTOTrainer(context)
    trainer.bco_shift = 0.3 if kind == "bco" else 0.0
    drift(context)
    policy = PlainModel(weights_in(context))
    gradients = catch_gradients(monkeypatch)
    metrics = trainer.step(1).metrics.result()

    def ratio(sample: Sample) -> Tensor:
        with torch.no_grad():
            ref = reference.log_probabilities(sample).sum()
        return policy.log_probabilities(sample).sum() - ref

    samples = [one.sample for one in labelled]
    # The first two have one prompt, so the first takes the third's; the last goes around.
    partners = [2, 2, 3, 4, 5, 6, 0]
    moved = [
        replace(sample, prompt_ids=samples[partner].prompt_ids)
        for sample, partner in zip(samples, partners, strict=True)
    ]
    kl = sum(ratio(s).item() for s in _cut(moved, trainer.max_tokens)) / 7
    point = {"kto": max(kl, 0.0), "apo_zero_unpaired": 0.0, "bco": 0.3}[kind]
    assert metrics.get("kto/kl", 0.3) == pytest.approx(point, abs=1e-4)
    ratios = [ratio(sample) for sample in samples]
    wanted = [one.desirable for one in labelled]
    terms = [_kto_term(kind, r, point, good) for r, good in zip(ratios, wanted, strict=True)]
    expected = torch.stack(terms).mean()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradient(gradients[0], policy.gradients_of(expected))
    # bco's point moves by the middle between the classes, whatever their sizes.
    good, bad = (
        [r.item() for r, w in zip(ratios, wanted, strict=True) if w is x] for x in (True, False)
    )
    middle = 0.2 * (sum(good) / len(good) + sum(bad) / len(bad)) / 2
    moved_to = 0.9 * 0.3 + 0.1 * middle if kind == "bco" else 0.0
    assert trainer.bco_shift == pytest.approx(moved_to, abs=1e-6)


def _cut(samples: Sequence[Sample], limit: int) -> list[Sample]:
    out = []
    for s in samples:
        room = limit - len(s.prompt_ids)
        out.append(Sample(s.prompt_ids, s.completion_ids[:room], s.loss_mask[:room]))
    return out
