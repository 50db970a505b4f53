"""Invariants of the trainers that learn from preferences: DPO, KTO, online DPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import (
    Gradients,
    catch_gradients,
    made_up_labelled,
    made_up_pairs,
    parts_of,
    run,
)
from tiny_runs import events_of, metrics_of, rollouts_of, steps_of, weights_of
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from alignment.modeling.catalog import fetch
from alignment.runs.checkpoint import list_checkpoints
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import TrainingContext
from alignment.trainers.dpo import DPOTrainer
from alignment.trainers.experience import shaped_rewards
from alignment.trainers.kto import KTOTrainer
from alignment.trainers.online_dpo import OnlineDPOTrainer
from alignment.trainers.preference import PairSums
from alignment.trainers.setup import Loaded
from alignment.types import PairBatch, Sample

LN2 = math.log(2)
BUDGETS = (4096, 60, 1)
"""All pairs in one micro-batch, some, one each."""

REFERENCES: dict[str, tuple[str, ...]] = {
    "frozen copy": ("model.reference=frozen_copy",),
    "synced": ("model.reference={mode: synced, every: 100, mix: 0.5}",),
    "LoRA, adapter off": ("model.reference=adapter_off", "model.lora={rank: 4, dropout: 0.5}"),
    "precomputed": ("model.reference=precomputed",),
    "LoRA, precomputed": ("model.reference=precomputed", "model.lora={rank: 4}"),
}


def tune(loaded: Loaded) -> None:
    """Hand over another policy than the one that was loaded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.02)


def drift(context: TrainingContext) -> None:
    """Move the policy away from its reference, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in context.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def with_pairs(context: TrainingContext, pairs: PairBatch) -> TrainingContext:
    """The same parts with other data."""
    order = type(context.order)(len(pairs), seed=0, shuffle=False)
    return replace(context, train=replace(context.train, pairs=pairs), order=order)


# -- the start --------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES)
def test_i38_dpo_starts_at_ln2_with_margin_zero(tmp_path: Path, reference: str) -> None:
    small = "optim.micro_batch_tokens=100"
    context = parts_of("dpo", tmp_path, *REFERENCES[reference], small, change=tune)
    metrics = DPOTrainer(context).step(1).metrics.result()
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-6)
    # Rows that are scored in other micro-batches differ by rounding.
    tolerance = 1e-5 if "precomputed" in reference else 0.0
    for name in ("reward/chosen", "reward/rejected", "reward/margin", "log_ratio/chosen"):
        assert metrics[f"dpo/{name}"] == pytest.approx(0.0, abs=tolerance), name


@pytest.mark.parametrize("budget", [4096, 80])
@pytest.mark.parametrize("reference", [name for name in REFERENCES if "precomp" not in name])
def test_i38_margins_are_exactly_zero_in_bfloat16(
    tmp_path: Path, reference: str, budget: int
) -> None:
    settings = ("model.dtype=bfloat16", f"optim.micro_batch_tokens={budget}")
    size = "algorithm.pairs_per_step=12"
    context = parts_of("dpo", tmp_path, *REFERENCES[reference], *settings, size, change=tune)
    # Pairs of one prompt that are not neighbours would be laid out otherwise one by one.
    pairs = made_up_pairs(6)
    twice = PairBatch(
        pairs.chosen + pairs.rejected[::-1],
        pairs.rejected + pairs.chosen[::-1],
    )
    metrics = DPOTrainer(with_pairs(context, twice)).step(1).metrics.result()
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-6)
    for name in ("reward/chosen", "reward/rejected", "reward/margin"):
        assert metrics[f"dpo/{name}"] == 0.0


def test_i38_kto_starts_at_a_half_with_kl_zero(tmp_path: Path) -> None:
    """s(0) = 1/2 for both classes."""
    context = parts_of("kto", tmp_path, "model.dtype=bfloat16", change=tune)
    metrics = KTOTrainer(context).step(1).metrics.result()
    assert metrics["loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["kto/kl"] == 0.0
    assert metrics["kto/reward/desirable"] == metrics["kto/reward/undesirable"] == 0.0


def test_i38_swapping_the_sides_negates_margin_and_first_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = catch_gradients(monkeypatch)
    pairs = made_up_pairs(4)
    for sides in ((pairs.chosen, pairs.rejected), (pairs.rejected, pairs.chosen)):
        context = with_pairs(parts_of("dpo", tmp_path), PairBatch(*sides))
        trainer = DPOTrainer(context)
        trainer.step(1)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], -gradient, rtol=1e-4, atol=1e-6)
    margins = []
    for sides in ((pairs.chosen, pairs.rejected), (pairs.rejected, pairs.chosen)):
        context = with_pairs(parts_of("dpo", tmp_path), PairBatch(*sides))
        trainer = DPOTrainer(context)
        drift(context)
        margins.append(trainer.step(1).metrics.result()["dpo/reward/margin"])
    assert abs(margins[0]) > 1e-2
    assert margins[1] == pytest.approx(-margins[0], abs=1e-6)


@pytest.mark.parametrize("reference", REFERENCES)
def test_i21_the_policy_moves_and_the_reference_does_not(tmp_path: Path, reference: str) -> None:
    context = parts_of("dpo", tmp_path, *REFERENCES[reference])
    trainer = DPOTrainer(context)
    rows = [0, 1, 2]
    samples = [context.train.pairs.chosen[0], context.train.pairs.rejected[0]] * 3
    before = trainer.reference(rows, samples)
    own = context.policy.logprobs(samples, 4096)
    trainer.step(1)
    after = trainer.reference(rows, samples)
    assert before is not None and after is not None
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    moved = context.policy.logprobs(samples, 4096)
    assert not any(torch.equal(a, b) for a, b in zip(own, moved, strict=True))


# -- gradients --------------------------------------------------------------------------------


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


def assert_same_gradient(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 1e-3
    for name, gradient in expected.items():
        error = float((got[name].double() - gradient).norm() / size)
        assert error < 3e-5, f"{name}: relative error {error:.1e}"


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


# -- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, 1e6])
@pytest.mark.parametrize("desensitize", [None, 0.5])
def test_i29_poisoned_padding_reaches_no_sum(poison: float, desensitize: float | None) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    clean = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.25, -4.0]])
    logprobs = torch.where(mask, clean, poison).requires_grad_()
    sums = PairSums.of(logprobs, logprobs.detach(), mask, desensitize=desensitize)
    weight = 1.0 if desensitize is None else desensitize
    assert sums.rows() == [[-3.0, -0.75 - 4 * weight, -3.0, -0.75 - 4 * weight, 2.0, 3.0]]
    (gradient,) = torch.autograd.grad((sums.chosen - sums.rejected).sum(), logprobs)
    assert gradient.tolist() == [[1.0, 1.0, 0.0], [-1.0, -1.0, -weight]]


@pytest.mark.parametrize("kind", ["sigmoid", "aot"])
def test_i29_tokens_outside_the_mask_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The tail of a completion is masked out: what stands there changes nothing."""
    gradients = catch_gradients(monkeypatch)
    pairs = made_up_pairs(4)
    losses = []
    for tail in ((5, 6, 7), (200, 201, 202)):
        longer = [
            Sample(s.prompt_ids, s.completion_ids + tail, s.loss_mask + (False,) * 3)
            for s in pairs.chosen
        ]
        context = parts_of("dpo", tmp_path, f"algorithm.loss.kind={kind}")
        trainer = DPOTrainer(with_pairs(context, PairBatch(tuple(longer), pairs.rejected)))
        drift(context)
        losses.append(trainer.step(1).metrics.result()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same_gradient(gradients[0], {n: g.double() for n, g in gradients[1].items()})


# -- samples ----------------------------------------------------------------------------------


def test_i34_online_pairs_are_the_sampled_ids(tmp_path: Path) -> None:
    context = parts_of("online_dpo", tmp_path)
    trainer = OnlineDPOTrainer(context)
    rollout = trainer.collect(1, MetricSums())
    rewards = shaped_rewards(rollout, max_new_tokens=1).tolist()
    (samples,) = trainer.pairs(rollout, rewards, MetricSums())
    assert samples
    reward_of = {
        (item.prompt.token_ids, item.completion.token_ids): item.reward for item in rollout.items
    }
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        assert chosen.prompt_ids == rejected.prompt_ids
        assert all(chosen.loss_mask) and all(rejected.loss_mask)
        better, worse = (reward_of[s.prompt_ids, s.completion_ids] for s in (chosen, rejected))
        assert better is not None and worse is not None
        assert better > worse


# -- resuming ---------------------------------------------------------------------------------

SYNCED = "model.reference={mode: synced, every: 2, mix: 0.5}"
RESUMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo, bco's moving average": ("dpo", ("algorithm.loss.kind=bco", SYNCED)),
    "dpo, coupled, precomputed": (
        "dpo",
        ("algorithm.loss.kind={aot: 0.5, bco: 0.5}", "model.reference=precomputed"),
    ),
    "dpo, LoRA in bfloat16": (
        "dpo",
        ("model.lora={rank: 4}", "model.reference=adapter_off", "model.dtype=bfloat16"),
    ),
    "kto": ("kto", (SYNCED,)),
    "online dpo": (
        "online_dpo",
        (SYNCED, "algorithm.updates_per_step=2", "algorithm.pairs=random_pair"),
    ),
}
TRAINERS: dict[str, Any] = {"dpo": DPOTrainer, "kto": KTOTrainer, "online_dpo": OnlineDPOTrainer}


@pytest.mark.parametrize("case", RESUMED)
def test_i45_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    method, settings = RESUMED[case]
    settings = (*settings, "algorithm.steps=5", "checkpoint={every: 1, keep: 3}", "optim.lr=1e-2")
    whole = run(method, tmp_path / "whole", *settings)
    evaluated = case in ("dpo, bco's moving average", "dpo, LoRA in bfloat16")
    if evaluated:  # which changes nothing
        settings += ("eval={every: 2, tasks: [{type: preference}]}",)
    with monkeypatch.context() as patch:
        original = TRAINERS[method].step

        def failing(self: Any, step: int) -> Any:
            result = original(self, step)
            if step == 4:
                raise InterruptedError  # when the step is made, and nothing of it is recorded
            return result

        patch.setattr(TRAINERS[method], "step", failing)
        with pytest.raises(InterruptedError):
            run(method, tmp_path / "cut", *settings)
    resumed = run(method, tmp_path / "cut", *settings)
    assert [event["step"] for event in events_of(resumed, "resume")] == [3]
    assert any(resumed.evals_dir.glob("*")) == evaluated
    assert steps_of(resumed) == steps_of(whole)
    if "LoRA" not in case:
        ours, theirs = weights_of(resumed), weights_of(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if method == "online_dpo":
        assert rollouts_of(resumed) == rollouts_of(whole)
    (_, mine), (_, yours) = (list_checkpoints(r.checkpoints_dir)[-1] for r in (resumed, whole))
    for file in yours.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()


def test_i45_the_moving_average_matters(tmp_path: Path) -> None:
    """The case above has state to lose: without the shift the steps are others."""
    settings = ("algorithm.loss.kind=bco", "algorithm.steps=3", "optim.lr=1e-2")
    kept = metrics_of(run("dpo", tmp_path / "a", *settings, "algorithm.loss.bco_decay=0.5"))
    slow = metrics_of(run("dpo", tmp_path / "b", *settings, "algorithm.loss.bco_decay=0.99"))
    assert [one["loss"] == other["loss"] for one, other in zip(kept, slow, strict=True)] == [
        True,
        True,  # the rewards of step 1 were 0
        False,
    ]
