"""The `algorithm` section of proximal policy optimization with a critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import (
    Bool,
    Count,
    Fraction,
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Section,
    problem,
    raise_problems,
)
from alignment.config.methods.base import MethodConfig, Needs, many
from alignment.config.methods.sections import KLConfig
from alignment.config.model import LoraConfig


class CriticConfig(Section):
    """Estimates the value of each state: the reward still to come."""

    kind: Literal["separate", "shared"] = "separate"
    """A model of its own, or a head on the policy's hidden states."""
    path: str | None = None
    """Model that a separate critic starts from, such as a reward model, head included; null takes
    the policy's, with a head of zeros."""
    lora: LoraConfig | None = None
    """Adapters of a separate critic; null trains every weight."""
    lr: Positive | None = None
    """Peak learning rate of a separate critic; null takes optim.lr."""
    warmup_steps: Count = 0
    """Steps at the start in which a separate critic learns and the policy stands still."""
    coef: Positive = 0.1
    """Weight of the value loss of a shared critic beside the policy's; a separate one has its own
    optimizer."""
    clip: Positive | None = 0.2
    """Largest move of a value in one step that its loss believes, in units of the (scaled) return;
    null is off."""
    normalize: Bool = False
    """Let the critic's head predict returns divided by their running root mean square (PopArt)."""

    @model_validator(mode="after")
    def _options_apply(self) -> CriticConfig:
        raise_problems("critic", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        applies = {
            "path": "separate",
            "lora": "separate",
            "lr": "separate",
            "warmup_steps": "separate",
            "coef": "shared",
        }
        for key, kind in applies.items():
            if self.kind != kind and getattr(self, key) != type(self).model_fields[key].default:
                yield problem((key,), f"applies to kind: {kind} only; remove it")


class PPOConfig(MethodConfig):
    """Proximal policy optimization (Schulman et al. 2017) as in RLHF (Ziegler et al. 2019)."""

    NEEDS: ClassVar[Needs] = Needs(
        data="prompts", rollout=True, rewards="required", on_policy=True, dropout=False
    )

    type: Literal["ppo"]
    """The method."""
    steps: PositiveCount
    """Rollouts, each followed by its updates."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one rollout."""
    samples_per_prompt: PositiveCount = 1
    """Completions sampled for each prompt."""
    epochs_per_step: PositiveCount = 4
    """Passes over a rollout."""
    updates_per_step: PositiveCount = 1
    """Minibatches that a rollout is divided into, anew in every pass, an update each; divides
    `prompts_per_step`."""
    gamma: Annotated[Fraction, Field(gt=0.0)] = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda: 0 trusts the critic, 1 the observed rewards."""
    clip_low: NonNegative = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: NonNegative = 0.2
    """Ratios above 1 + clip_high are clipped."""
    whiten_advantages: Bool = True
    """Scale the advantages of a rollout to mean 0 and variance 1."""
    kl: KLConfig = KLConfig(coef=0.05, placement="reward")
    """Pull towards the reference policy."""
    critic: CriticConfig = CriticConfig()
    """The critic."""
    normalize_rewards: Bool = False
    """Scale scores by their running mean and deviation."""
    clip_rewards: Positive | None = None
    """Bound on the size of a score, after scaling; null is off."""
    missing_eos_score: Number | None = None
    """In place of the score of a completion that was cut off, such as -1; null is off."""
    missing_eos_penalty: Positive | None = None
    """Subtracted from the score of a completion that was cut off; null is off."""
    whiten_rewards: Bool = False
    """Scale the tokens' rewards of a rollout, KL penalty included, to variance 1; their mean stays
    where it was."""
    entropy_coef: Number = 0.0
    """Weight of the entropy bonus."""
    stop_kl: Positive | None = None
    """Leave out the rest of a step's updates once the policy is this far from the one that sampled
    (nats per token, Schulman's k3); null is off."""

    @model_validator(mode="after")
    def _options_apply(self) -> PPOConfig:
        raise_problems("algorithm", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.prompts_per_step % self.updates_per_step:
            yield problem(
                ("updates_per_step",),
                f"{self.updates_per_step} updates do not divide {self.prompts_per_step} prompts "
                "(prompts_per_step) evenly",
            )
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            yield problem(
                ("missing_eos_penalty",),
                "missing_eos_score replaces the score it would be subtracted from; remove one",
            )
        if self.critic.warmup_steps >= self.steps:
            yield problem(
                ("critic", "warmup_steps"),
                f"the run has {self.steps} steps, so the policy would never move; use fewer",
            )
        yield from self.kl.problems_with(self.completions_per_step)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def describe_counts(self) -> list[str]:
        samples = self.completions_per_step
        updates, passes = self.updates_per_step, self.epochs_per_step
        return [
            f"{many(self.prompts_per_step, 'prompt')} x {self.samples_per_prompt} completions = "
            f"{samples} samples a step; {passes} x "
            f"{many(updates, 'update')} of {samples // updates} = {passes * updates} updates; "
            f"{many(self.steps, 'step')} = {many(self.steps * samples, 'sample')}, "
            f"{many(self.steps * updates * passes, 'update')}"
        ]
