"""A whole step of PPO, from grades to gradients, against one written out by hand.

The second implementation shares no code with the toolkit: log-probabilities and values come from
`transformers` in float64, one row at a time, and what PPO makes of them is written token by token
in plain Python and numpy, as the papers have it. Both sides are given the same weights: those of
the reference, those that recorded the rollout, and others for the update, so that no ratio is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ppo_runs import (
    SHARED,
    assert_same_gradient,
    keep_gradients,
    made_up,
    shift,
    trainer_of,
)
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from alignment.modeling.catalog import fetch
from alignment.runs.metrics import MetricSums
from alignment.trainers.context import StepResult
from alignment.trainers.experience import Experience
from alignment.trainers.minibatches import Targets
from alignment.trainers.ppo import PPOTrainer
from alignment.types import (
    RewardedCompletion,
    Rollout,
)

Rows = list[NDArray[np.float64]]
Gradients = dict[str, Tensor]

GRADES = (0.9, 0.2, None, 0.6, 0.4, 0.1)
LENGTHS = (1, 12, 4, 5, 3, 9)
CUT_OFF = (1, 2, 5)
KEPT = [i for i, grade in enumerate(GRADES) if grade is not None]

ONE_UPDATE = (
    "algorithm.prompts_per_step=3",
    "algorithm.epochs_per_step=1",
    "algorithm.updates_per_step=1",
    "optim.max_grad_norm=1e9",
    "optim.micro_batch_tokens=90",
    "limits.logprob_gap=99",
)
CASES: dict[str, tuple[str, ...]] = {
    "separate critic": (),
    "shared critic, entropy bonus": (*SHARED, "algorithm.entropy_coef=0.05"),
    "shared and scaled critic, temperature": (
        "algorithm.critic={kind: shared, normalize: true, coef: 0.3}",
        "rollout.temperature=0.6",
    ),
    "k3, whitened rewards, discount, raw advantages": (
        "algorithm.kl={coef: 0.4, placement: reward, estimator: k3}",
        "algorithm.whiten_rewards=true",
        "algorithm.whiten_advantages=false",
        "algorithm.gamma=0.9",
        "algorithm.lam=0.7",
    ),
    "scaled and clipped scores, penalty for no end, scaled critic": (
        "algorithm.normalize_rewards=true",
        "algorithm.clip_rewards=0.8",
        "algorithm.missing_eos_penalty=0.5",
        "algorithm.critic={normalize: true, clip: 0.05}",
    ),
    "fixed score for no end, no value clip, asymmetric clip": (
        "algorithm.missing_eos_score=-1.0",
        "algorithm.critic={clip: null}",
        "algorithm.clip_low=0.1",
        "algorithm.clip_high=0.3",
    ),
    "KL in the loss": ("algorithm.kl={coef: 0.4, placement: loss, estimator: k3}",),
    "exact KL in the loss, temperature": (
        "algorithm.kl={coef: 0.4, placement: loss, estimator: full}",
        "rollout.temperature=0.6",
    ),
}


# -- the second implementation ----------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """The tiny model's weights at one moment, in transformers and float64."""

    decoder: Any
    lm_head: Any
    head: Tensor | None

    def hidden(self, item: RewardedCompletion) -> Tensor:
        """Hidden states `[T, D]` that each completion token is chosen in."""
        ids = torch.tensor([[*item.prompt.token_ids, *item.completion.token_ids]])
        states = self.decoder(ids, use_cache=False).last_hidden_state[0]
        return torch.as_tensor(states[len(item.prompt.token_ids) - 1 : -1])

    def log_p(self, item: RewardedCompletion, temperature: float) -> Tensor:
        return torch.as_tensor((self.lm_head(self.hidden(item)) / temperature).log_softmax(-1))

    def chosen(self, item: RewardedCompletion, temperature: float) -> Tensor:
        ids = torch.tensor(item.completion.token_ids)
        return self.log_p(item, temperature)[torch.arange(len(ids)), ids]

    def values(self, item: RewardedCompletion) -> Tensor:
        assert self.head is not None
        return self.hidden(item) @ self.head[0]

    def named(self) -> dict[str, Tensor]:
        return dict(self.decoder.named_parameters())


def plain_policy(trainer: PPOTrainer) -> Plain:
    model: Any = AutoModelForCausalLM.from_pretrained(fetch("tiny-random")).double()
    model.load_state_dict(trainer.policy.model.state_dict())
    head = trainer.policy.value_head
    weight = None if head is None else head.weight.detach().double().requires_grad_()
    return Plain(model.model, model.lm_head, weight)


def plain_reference(trainer: PPOTrainer) -> Plain:
    """The policy as it was loaded: nothing has moved yet."""
    return plain_policy(trainer)


def plain_critic(trainer: PPOTrainer) -> Plain:
    if trainer.context.critic is None:
        return plain_policy(trainer)
    model: Any = trainer.context.critic.model
    decoder = AutoModel.from_pretrained(fetch("tiny-random")).double()
    decoder.load_state_dict(model.decoder.state_dict())
    return Plain(decoder, None, model.head.weight.detach().double().requires_grad_())


def scores_by_hand(config: Any, items: Sequence[RewardedCompletion]) -> dict[int, float]:
    scores = {i: float(items[i].reward or 0.0) for i in KEPT}
    if config.normalize_rewards:
        mean = sum(scores.values()) / len(scores)
        deviation = (sum((s - mean) ** 2 for s in scores.values()) / len(scores)) ** 0.5
        scores = {i: (s - mean) / deviation for i, s in scores.items()}
    if config.clip_rewards is not None:
        bound = config.clip_rewards
        scores = {i: max(-bound, min(bound, s)) for i, s in scores.items()}
    for i in KEPT:
        if i in CUT_OFF and config.missing_eos_penalty is not None:
            scores[i] -= config.missing_eos_penalty
        if i in CUT_OFF and config.missing_eos_score is not None:
            scores[i] = config.missing_eos_score
    return scores


def estimate(config: Any, difference: float) -> float:
    if config.kl.estimator == "k1":
        return difference
    return float(np.exp(-difference) - 1 + difference)


def whitened(rows: dict[int, NDArray[np.float64]], keep_mean: bool) -> None:
    everything = np.concatenate(list(rows.values()))
    mean, deviation = everything.mean(), np.sqrt(everything.var() + 1e-8)
    for i in rows:
        rows[i] = (rows[i] - mean) / deviation + (mean if keep_mean else 0.0)


@dataclass
class ByHand:
    """The constants of the step, by sample."""

    rewards: dict[int, NDArray[np.float64]]
    values: dict[int, NDArray[np.float64]]
    advantages: dict[int, NDArray[np.float64]]
    returns: dict[int, NDArray[np.float64]]
    total: float
    kl: float
    scale: float


def constants_by_hand(
    config: Any, items: Sequence[RewardedCompletion], old: Rows, reference: Rows, values: Rows
) -> ByHand:
    scores = scores_by_hand(config, items)
    rewards, kls = {}, {}
    for i in KEPT:
        kls[i] = np.array(
            [estimate(config, o - r) for o, r in zip(old[i], reference[i], strict=True)]
        )
        rewards[i] = np.zeros(LENGTHS[i])
        rewards[i][-1] = scores[i]
        if config.kl.placement == "reward":
            rewards[i] = rewards[i] - config.kl.coef * kls[i]
    total = float(np.mean([row.sum() for row in rewards.values()]))
    if config.whiten_rewards:
        whitened(rewards, keep_mean=True)
    advantages, returns = {}, {}
    for i in KEPT:
        # Not by recursion: the sum over all later surprises, as in the paper's equation 16.
        following = [*values[i][1:], 0.0]
        surprises = rewards[i] + config.gamma * np.array(following) - values[i]
        advantages[i] = np.array(
            [
                sum(
                    (config.gamma * config.lam) ** (later - t) * surprises[later]
                    for later in range(t, LENGTHS[i])
                )
                for t in range(LENGTHS[i])
            ]
        )
        returns[i] = advantages[i] + values[i]
    if config.whiten_advantages:
        whitened(advantages, keep_mean=False)
    everything = np.concatenate(list(returns.values()))
    return ByHand(
        rewards,
        {i: values[i] for i in KEPT},
        advantages,
        returns,
        total,
        float(np.mean([row.sum() for row in kls.values()])),
        float(np.sqrt((everything**2).mean())) if config.critic.normalize else 1.0,
    )


def policy_loss_by_hand(
    config: Any,
    items: Sequence[RewardedCompletion],
    now: Plain,
    hand: ByHand,
    old: Rows,
    reference: Plain,
    temperature: float,
) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for i in KEPT:
        log_p = now.log_p(items[i], temperature)
        own = now.chosen(items[i], temperature)
        with torch.no_grad():
            others = reference.log_p(items[i], temperature)
            chosen = reference.chosen(items[i], temperature)
        for t in range(LENGTHS[i]):
            advantage = float(hand.advantages[i][t])
            ratio = (own[t] - float(old[i][t])).exp()
            inside = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            loss = loss - torch.minimum(ratio * advantage, inside * advantage)
            entropy = -(log_p[t].exp() * log_p[t]).sum()
            loss = loss - config.entropy_coef * entropy
            if config.kl.estimator == "full":
                loss = loss + config.kl.coef * (log_p[t].exp() * (log_p[t] - others[t])).sum()
            elif config.kl.placement == "loss":
                d = own[t] - chosen[t]
                loss = loss + config.kl.coef * ((-d).exp() - 1 + d)
    return loss / sum(LENGTHS[i] for i in KEPT)


def value_loss_by_hand(
    config: Any, items: Sequence[RewardedCompletion], now: Plain, hand: ByHand
) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for i in KEPT:
        for t, value in enumerate(now.values(items[i])):
            target = float(hand.returns[i][t]) / hand.scale
            before = float(hand.values[i][t]) / hand.scale
            error = (value - target) ** 2
            if config.critic.clip is not None:
                near = value.clamp(before - config.critic.clip, before + config.critic.clip)
                error = torch.maximum(error, (near - target) ** 2)
            loss = loss + 0.5 * error
    return loss / sum(LENGTHS[i] for i in KEPT)


# -- the trainer ------------------------------------------------------------------------------


@dataclass
class Observed:
    """What the trainer's step did, and the weights it did it with."""

    config: Any
    items: Sequence[RewardedCompletion]
    temperature: float
    reference: Plain
    recording: tuple[Plain, Plain]
    updating: tuple[Plain, Plain]
    targets: Targets
    result: StepResult
    made: list[Gradients]


@pytest.fixture
def observe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def observing(*settings: str) -> Observed:
        made = keep_gradients(monkeypatch)
        trainer = trainer_of(tmp_path, *ONE_UPDATE, *settings)
        reference = plain_reference(trainer)
        head: Any = trainer.policy.value_head
        models: list[Any] = [trainer.policy.model, *([head] if head is not None else [])]
        if trainer.context.critic is not None:
            models.append(trainer.context.critic.model)
        for seed, model in enumerate(models):
            shift(model, 0.02, seed)
        recording = plain_policy(trainer), plain_critic(trainer)
        rollout = made_up(trainer, GRADES, LENGTHS, CUT_OFF, group_size=2)
        learn = trainer.learn
        seen: dict[str, Any] = {}

        def moved(rollout: Rollout, own: Experience, targets: Targets, metrics: MetricSums) -> None:
            for seed, model in enumerate(models):
                shift(model, 0.01, 10 + seed)
            seen["updating"] = plain_policy(trainer), plain_critic(trainer)
            seen["targets"] = targets
            learn(rollout, own, targets, metrics)

        monkeypatch.setattr(trainer, "collect", lambda step, metrics: rollout)
        monkeypatch.setattr(trainer, "learn", moved)
        result = trainer.step(1)
        return Observed(
            trainer.config,
            rollout.items,
            trainer.rollout_config.temperature,
            reference,
            recording,
            seen["updating"],
            seen["targets"],
            result,
            made,
        )

    return observing


def gradients(loss: Tensor, named: dict[str, Tensor]) -> Gradients:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_one_written_out_by_hand(observe: Any, case: str) -> None:
    seen: Observed = observe(*CASES[case])
    config, items, shared = seen.config, seen.items, seen.config.critic.kind == "shared"
    policy, critic = seen.recording
    with torch.no_grad():
        old = [policy.chosen(item, seen.temperature).numpy() for item in items]
        reference = [seen.reference.chosen(item, seen.temperature).numpy() for item in items]
        values = [critic.values(item).numpy() for item in items]
    hand = constants_by_hand(config, items, old, reference, values)

    # The constants: rewards become advantages and returns.
    for i, length in enumerate(LENGTHS):
        for name in ("advantages", "returns"):
            row = getattr(seen.targets, name)[i].double().numpy()
            expected = np.zeros(12)
            if i in KEPT:
                expected[:length] = getattr(hand, name)[i]
            if i in KEPT or name == "advantages":
                np.testing.assert_allclose(row, expected, rtol=2e-4, atol=2e-5, err_msg=name)
    metrics = seen.result.metrics.result()
    assert metrics["objective/total"] == pytest.approx(hand.total, rel=1e-4, abs=1e-5)
    assert metrics["kl/sequence"] == pytest.approx(hand.kl, rel=1e-3, abs=1e-5)
    assert abs(hand.kl) > 1e-3
    errors = np.concatenate([hand.returns[i] - hand.values[i] for i in KEPT])
    explained = 1 - errors.var() / np.concatenate([hand.returns[i] for i in KEPT]).var()
    assert metrics["critic/explained_variance"] == pytest.approx(explained, abs=1e-3)
    if config.critic.normalize:
        assert metrics["critic/scale"] == pytest.approx(hand.scale, rel=1e-4)

    # The losses and their gradients.
    policy, critic = seen.updating
    policy_loss = policy_loss_by_hand(
        config, items, policy, hand, old, seen.reference, seen.temperature
    )
    named = {f"model.model.{name}": tensor for name, tensor in policy.named().items()}
    if policy.lm_head.weight is not policy.decoder.embed_tokens.weight:
        named["model.lm_head.weight"] = policy.lm_head.weight
    if shared:
        value_loss = value_loss_by_hand(config, items, policy, hand)
        assert policy.head is not None
        named["value_head.weight"] = policy.head
        total = policy_loss + config.critic.coef * value_loss
    else:
        total, value_loss = policy_loss, value_loss_by_hand(config, items, critic, hand)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
    clipped = [metrics[f"policy/clip_fraction/{side}"] for side in ("low", "high")]
    assert min(clipped) > 0.0  # the clip took part
    assert_same_gradient(seen.made[0], gradients(total, named), within=3e-5)
    if not shared:
        assert metrics["critic/loss"] == pytest.approx(value_loss.item(), rel=1e-4, abs=1e-6)
        assert critic.head is not None
        own = {f"decoder.{name}": tensor for name, tensor in critic.named().items()}
        assert_same_gradient(
            seen.made[1], gradients(value_loss, own | {"head.weight": critic.head}), within=3e-5
        )
        if config.critic.clip is not None:
            assert metrics["critic/value/clip_fraction"] > 0.0
    assert seen.result.advantages is not None and seen.result.advantages[2] == 0.0  # it failed
