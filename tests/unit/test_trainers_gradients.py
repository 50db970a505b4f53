"""The gradient a trainer makes, against one written out by hand from a plain forward pass.

The second implementation shares no code with the toolkit: `transformers` in float64, one row at a
time, no packing, no micro-batches, and the formulas of the papers token by token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import even_tokens, recipe_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment.distributed import Distributed
from alignment.modeling.catalog import fetch
from alignment.modeling.optimizer import MasterWeightOptimizer
from alignment.runs.events import EventLog
from alignment.runs.metrics import MetricSums
from alignment.trainers.experience import Experience, training_samples
from alignment.trainers.grpo import GRPOTrainer
from alignment.trainers.setup import assemble, load_parts
from alignment.trainers.sft import SFTTrainer
from alignment.types import (
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    Sample,
    StopReason,
)

Gradients = dict[str, Tensor]
NO_CLIP = ("optim.max_grad_norm=1e9",)
# Rows of about 40 tokens: one micro-batch for all, a few rows each, one row each.
BUDGETS = (4096, 100, 1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Gradients]:
    """The gradients that reach the optimizer, which then stands still."""
    seen: list[Gradients] = []

    def keep(self: MasterWeightOptimizer) -> float:
        names = list(self._parameters)
        plain = [name.removeprefix("model.") for name in names]  # as in the model itself
        seen.append(dict(zip(plain, (g.clone() for g in self.gradients), strict=True)))
        self.drop_gradients()
        return 0.0

    monkeypatch.setattr(MasterWeightOptimizer, "step", keep)
    return seen


def parts_of(method: str, folder: Path, *overrides: str) -> Any:
    recipe = recipe_of(method, folder, *NO_CLIP, *overrides)
    return assemble(
        load_parts(recipe), Distributed(), EventLog(folder / "events.jsonl"), cache=folder
    )


class PlainModel:
    """The same weights in transformers, float64."""

    def __init__(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(fetch("tiny-random")).double()

    def log_probabilities(self, sample: Sample, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(of the completion's tokens, `[T]`; of the whole vocabulary, `[T, V]`)."""
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
        logits = self.model(ids, use_cache=False).logits[0] / temperature
        first = len(sample.prompt_ids) - 1
        everything = logits[first:-1].log_softmax(-1)
        chosen = everything[torch.arange(len(everything)), torch.tensor(sample.completion_ids)]
        return chosen, everything

    def gradients_of(self, loss: Tensor) -> Gradients:
        named = dict(self.model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same_gradient(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 1e-4
    for name, gradient in expected.items():
        error = float((got[name].double() - gradient).norm() / size)
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


# -- supervised fine-tuning -------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_i01_i03_sft_gradient(
    tmp_path: Path, made: list[Gradients], reduction: str, budget: int
) -> None:
    settings = (f"algorithm.reduction={reduction}", f"optim.micro_batch_tokens={budget}")
    context = parts_of("sft", tmp_path, *settings, "data.high=12")
    trainer = SFTTrainer(context)
    trainer.step(1)
    trainer.step(2)  # another batch: its gradient has nothing of the first
    rows = [row for _, row in type(context.order)(len(context.train.samples), seed=0).take(8)]
    plain = PlainModel()
    for got, batch in zip(made, (rows[:4], rows[4:]), strict=True):
        samples = [context.train.samples[row] for row in batch]
        lengths = [sum(sample.loss_mask) for sample in samples]
        assert len(set(lengths)) > 1  # a mean of means would show
        loss = torch.zeros((), dtype=torch.float64)
        for sample, length in zip(samples, lengths, strict=True):
            chosen, _ = plain.log_probabilities(sample)
            nll = -sum(
                (p for p, counts in zip(chosen, sample.loss_mask, strict=True) if counts),
                start=torch.zeros((), dtype=torch.float64),
            )
            loss = loss + (nll / sum(lengths) if reduction == "token" else nll / length / 4)
        assert_same_gradient(got, plain.gradients_of(loss))


# -- reinforcement learning -------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """A rollout that was made up, with what was recorded before its update."""

    rollout: Rollout
    old: Sequence[Tensor]
    reference: Sequence[Tensor]
    advantages: Tensor

    def experience(self) -> Experience:
        items = self.rollout.items
        samples = training_samples(self.rollout, mask_truncated=False)
        logprobs = [item.completion.sampling_logprobs for item in items]
        return Experience(samples, logprobs, self.old, self.reference)


def made_up(trainer: GRPOTrainer, *, failed: Sequence[int] = ()) -> Fixed:
    """Two prompts with four completions each, of 1 to 12 tokens, old and reference nearby."""
    draw = random.Random(3)
    noise = torch.Generator().manual_seed(5)
    items = []
    for i in range(8):
        prompt: Prompt = replace(trainer.context.train.prompts[i // 4], index=i // 4)
        ids = tuple(draw.randrange(256) for _ in range((1, 12, 5, 7, 3, 9, 2, 6)[i]))
        logprobs = tuple(-5.5 for _ in ids)
        completion = Completion(i // 4, i % 4, ids, logprobs, StopReason.STOP, 0, "")
        reward = None if i in failed else even_tokens([ids])[0]
        outcome = Outcome.CRASH if i in failed else Outcome.SCORED
        items.append(RewardedCompletion(prompt, completion, reward, outcome, {}))
    rollout = Rollout(tuple(items), group_size=4, step=1)
    samples = training_samples(rollout, mask_truncated=False)
    own = trainer.policy.logprobs(samples, 4096, sampling=trainer.sampler.params(1))

    def nearby(scale: float) -> list[Tensor]:
        return [row + scale * torch.randn(row.shape, generator=noise) for row in own]

    advantages = torch.tensor([1.3, -0.7, 0.4, -1.0, 0.9, 0.2, -1.6, 0.5])
    old, reference = nearby(0.4), nearby(0.3)
    old[1][3] = own[1][3] - 1.5  # has become 4.5 times as likely, with advantage -0.7
    return Fixed(rollout, old, reference, advantages)


PolicyTerm = Callable[[Tensor, Tensor, float], Tensor]
"""(log-probabilities of a row, old ones, advantage) to the policy loss of each of its tokens."""


def _clipped(own: Tensor, old: Tensor, advantage: float) -> Tensor:
    ratio = (own - old).exp()
    return -torch.minimum(ratio * advantage, torch.clamp(ratio, 0.8, 1.2) * advantage)


def _dual_clipped(own: Tensor, old: Tensor, advantage: float) -> Tensor:
    ratio = (own - old).exp()
    objective = torch.minimum(ratio * advantage, torch.clamp(ratio, 0.9, 1.3) * advantage)
    return -torch.clamp(objective, min=3.0 * advantage) if advantage < 0 else -objective


def _gspo(own: Tensor, old: Tensor, advantage: float) -> Tensor:
    """One ratio and one clip a row."""
    ratio = (own - old).mean().exp()
    objective = torch.minimum(ratio * advantage, torch.clamp(ratio, 0.95, 1.05) * advantage)
    return -objective.repeat(len(own))


def _cispo(own: Tensor, old: Tensor, advantage: float) -> Tensor:
    weight = torch.clamp((own - old).exp(), 0.7, 1.1).detach()
    return -weight * advantage * own


LOW_AND_HIGH = ("low", "high")
POLICY_TERMS: dict[str, tuple[str, PolicyTerm, tuple[str, ...]]] = {
    "clip": ("{clip_low: 0.2, clip_high: 0.2}", _clipped, LOW_AND_HIGH),
    "dual clip": (
        "{dual_clip: 3.0, clip_low: 0.1, clip_high: 0.3}",
        _dual_clipped,
        (*LOW_AND_HIGH, "dual"),
    ),
    "gspo": ("{ratio_level: sequence, clip_low: 0.05, clip_high: 0.05}", _gspo, LOW_AND_HIGH),
    "cispo": ("{type: cispo, clip_low: 0.3, clip_high: 0.1}", _cispo, LOW_AND_HIGH),
}
"""The section `loss`, its formula, and the clips that take part."""


def hand_built_loss(
    plain: PlainModel,
    fixed: Fixed,
    config: Any,
    temperature: float,
    longest: int,
    policy_term: PolicyTerm = _clipped,
) -> Tensor:
    """Policy term + KL - entropy, row by row, then reduced.

    Args:
        longest: tokens that stand for one sequence under the constant reduction.
    """
    samples = fixed.experience().samples
    counted = [i for i, sample in enumerate(samples) if any(sample.loss_mask)]
    n_tokens = sum(len(samples[i].completion_ids) for i in counted)
    total = torch.zeros((), dtype=torch.float64)
    for i in counted:
        chosen, everything = plain.log_probabilities(samples[i], temperature)
        entropy = -(everything.exp() * everything).sum(-1)
        row = policy_term(chosen, fixed.old[i].double(), float(fixed.advantages[i])).sum()
        for t, logprob in enumerate(chosen):
            x = fixed.reference[i][t].double() - logprob
            row = row + config.kl.coef * (x.exp() - x - 1) - config.entropy_coef * entropy[t]
        divisor = {
            "token": n_tokens,
            "sequence": len(chosen) * len(counted),
            "constant": longest * len(counted),
        }
        total = total + row / divisor[config.reduction]
    return total


def assert_learns_by(
    term: str, folder: Path, made: list[Gradients], *overrides: str, longest: int = 8
) -> None:
    """Loss and gradient of an update are those built by hand with this policy term."""
    section, policy_term, clips = POLICY_TERMS[term]
    context = parts_of(
        "grpo",
        folder,
        f"algorithm.loss={section}",
        "rollout.temperature=0.8",
        "algorithm.kl.coef=0.3",
        "algorithm.entropy_coef=0.05",
        "limits.logprob_gap=9",
        *overrides,
    )
    trainer = GRPOTrainer(context)
    fixed = made_up(trainer)
    metrics = MetricSums()
    trainer.learn(1, fixed.experience(), fixed.advantages, slice(0, 8), metrics)
    plain = PlainModel()
    loss = hand_built_loss(plain, fixed, trainer.config, 0.8, longest, policy_term)
    result = metrics.result()
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for clip in clips:
        assert result[f"policy/clip_fraction/{clip}"] > 0.0  # the clip took part
    assert_same_gradient(made[0], plain.gradients_of(loss))


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant", "constant of 3"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_i01_i03_grpo_gradient(
    tmp_path: Path, made: list[Gradients], reduction: str, budget: int
) -> None:
    settings = [f"optim.micro_batch_tokens={budget}", f"algorithm.reduction={reduction.split()[0]}"]
    longest = 8
    if reduction == "constant of 3":
        settings.append("algorithm.constant_divisor=3")
        longest = 3
    assert_learns_by("clip", tmp_path, made, *settings, longest=longest)


@pytest.mark.parametrize("term", ["dual clip", "gspo", "cispo"])
def test_i01_the_gradient_of_every_policy_loss(
    tmp_path: Path, made: list[Gradients], term: str
) -> None:
    reduction = "sequence" if term == "gspo" else "token"
    settings = (f"algorithm.reduction={reduction}", "optim.micro_batch_tokens=100")
    assert_learns_by(term, tmp_path, made, *settings)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_i04_a_failed_completion_does_not_weigh(
    tmp_path: Path, made: list[Gradients], reduction: str
) -> None:
    context = parts_of("grpo", tmp_path, f"algorithm.reduction={reduction}", "limits.logprob_gap=9")
    trainer = GRPOTrainer(context)
    failed = [1, 4]
    whole = made_up(trainer, failed=failed)
    kept = [i for i in range(8) if i not in failed]
    without = Fixed(
        replace(whole.rollout, items=tuple(whole.rollout.items[i] for i in kept)),
        [whole.old[i] for i in kept],
        [whole.reference[i] for i in kept],
        whole.advantages[kept],
    )
    for fixed in (whole, without):
        rows = slice(0, len(fixed.rollout.items))
        trainer.learn(1, fixed.experience(), fixed.advantages, rows, MetricSums())
    plain = PlainModel()
    loss = hand_built_loss(plain, without, trainer.config, temperature=1.0, longest=8)
    by_hand = plain.gradients_of(loss)
    for gradients in made:
        assert_same_gradient(gradients, by_hand)


def test_i47_a_failed_grader_has_no_loss_and_no_advantage(tmp_path: Path) -> None:
    trainer = GRPOTrainer(parts_of("grpo", tmp_path))
    fixed = made_up(trainer, failed=[1, 4])
    masks = [any(sample.loss_mask) for sample in fixed.experience().samples]
    assert masks == [i not in (1, 4) for i in range(8)]
    rewards = torch.tensor([1.0, float("nan"), 0.0, 0.5, float("nan"), 1.0, 0.0, 0.0])
    advantages = trainer.advantages(rewards, 4)
    # by hand: mean 0.5, unbiased deviation 0.5; mean 1/3, deviation sqrt(1/3)
    deviation = (1 / 3) ** 0.5
    expected = [0.5, 0.0, -0.5, 0.0, 0.0, 2 / 3, -1 / 3, -1 / 3]
    scaled = [value / (0.5 if i < 4 else deviation) for i, value in enumerate(expected)]
    torch.testing.assert_close(advantages, torch.tensor(scaled), rtol=1e-3, atol=0.0)


# Of the rewards 1, 0, 0, 1 and 3, 1, 1, 1.
ADVANTAGES_BY_HAND: dict[str, list[float]] = {
    # less the means 0.5 and 1.5
    "{scale: none}": [0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5],
    # by the unbiased deviations sqrt(1/3) and 1 of the groups
    "{scale: group}": [0.8660, -0.8660, -0.8660, 0.8660, 1.5, -0.5, -0.5, -0.5],
    # by that of all eight around their mean 1, sqrt(6/7)
    "{scale: batch}": [0.5401, -0.5401, -0.5401, 0.5401, 1.6202, -0.5401, -0.5401, -0.5401],
    # less the mean of the others: 1/3 or 2/3; 1 or 5/3
    "{baseline: leave_one_out}": [2 / 3, -2 / 3, -2 / 3, 2 / 3, 2.0, -2 / 3, -2 / 3, -2 / 3],
}


@pytest.mark.parametrize("section", ADVANTAGES_BY_HAND)
def test_advantages_by_hand(tmp_path: Path, section: str) -> None:
    trainer = GRPOTrainer(parts_of("grpo", tmp_path, f"algorithm.advantage={section}"))
    advantages = trainer.advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0]), 4)
    expected = torch.tensor(ADVANTAGES_BY_HAND[section])
    # The deviations have 1e-4 added to them.
    torch.testing.assert_close(advantages, expected, rtol=3e-4, atol=0.0)


@pytest.mark.usefixtures("made")
def test_i18_the_penalty_is_subtracted_in_a_step(tmp_path: Path) -> None:
    """Rewards are all equal: what sets a completion apart from its group is its KL alone."""
    context = parts_of(
        "grpo",
        tmp_path,
        "model.reference=frozen_copy",
        "algorithm.kl={coef: 0.5, placement: reward}",
        "algorithm.advantage={scale: none}",
        "rewards=[{type: 'tiny_runs:constant'}]",
    )
    trainer = GRPOTrainer(context)
    generator = torch.Generator().manual_seed(2)
    policy, reference = PlainModel(), PlainModel()
    weights = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, parameter in context.policy.model.named_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            weights[name].copy_(parameter)
    result = trainer.step(1)
    assert result.rollout is not None and result.advantages is not None
    penalties = []
    with torch.no_grad():
        for sample in training_samples(result.rollout, mask_truncated=False):
            own, of_reference = (m.log_probabilities(sample)[0] for m in (policy, reference))
            penalties.append(0.5 * (own - of_reference).sum())
    groups = torch.stack(penalties).view(4, 4)
    expected = groups.mean(dim=1, keepdim=True) - groups
    assert expected.abs().max() > 0.05
    found = torch.tensor(result.advantages, dtype=torch.float64).view(4, 4)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
