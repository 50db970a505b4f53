"""The `algorithm` section of group-relative policy optimization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import Number, Positive, PositiveCount, problem, raise_problems
from alignment.config.methods.base import MethodConfig, Needs, many
from alignment.config.methods.sections import (
    AdvantageConfig,
    KLConfig,
    OverlongConfig,
    PolicyLossConfig,
)


class GRPOConfig(MethodConfig):
    """Group-relative policy optimization (DeepSeekMath 2024) and its relatives.

    `rlvr`, learning from verifiable rewards, is the same with a verifier among the rewards.
    """

    NEEDS: ClassVar[Needs] = Needs(
        data="prompts", rollout=True, rewards="required", on_policy=True, dropout=False
    )

    type: Literal["grpo", "rlvr"]
    """The method."""
    steps: PositiveCount
    """Rollouts, each followed by its updates."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one rollout."""
    group_size: Annotated[PositiveCount, Field(ge=2)]
    """Completions sampled for each prompt."""
    updates_per_step: PositiveCount = 1
    """Optimizer updates that a rollout is divided into; divides `prompts_per_step`."""
    epochs_per_step: PositiveCount = 1
    """Passes over a rollout."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The policy objective."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """Weights of tokens: all equal, equal per sequence, or all divided by a constant."""
    constant_divisor: Positive | None = None
    """Tokens that stand for one sequence's share of the divisor under reduction: constant; null
    takes rollout.max_new_tokens (Dr. GRPO)."""
    kl: KLConfig = KLConfig()
    """Pull towards the reference policy."""
    entropy_coef: Number = 0.0
    """Weight of the entropy bonus."""
    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions cut off at max_new_tokens: as any other, left out of the loss, or penalized."""
    truncation_penalty: Positive | None = None
    """Subtracted from the reward of a cut-off completion under truncated: penalize."""
    overlong: OverlongConfig | None = None
    """Soft penalty for completions near the limit; null is off."""
    dynamic_sampling: Literal["off", "skip", "refill"] = "off"
    """Groups without spread of reward teach nothing: keep them, drop them, or draw others."""
    max_refills: PositiveCount = 3
    """Further draws a step may make under dynamic_sampling: refill."""

    @model_validator(mode="after")
    def _options_apply(self) -> GRPOConfig:
        raise_problems("algorithm", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.prompts_per_step % self.updates_per_step:
            yield problem(
                ("updates_per_step",),
                f"{self.updates_per_step} updates do not divide {self.prompts_per_step} prompts "
                "(prompts_per_step) evenly",
            )
        if self.constant_divisor is not None and self.reduction != "constant":
            yield problem(("constant_divisor",), "applies to reduction: constant only; remove it")
        if (self.truncation_penalty is None) == (self.truncated == "penalize"):
            yield problem(
                ("truncation_penalty",),
                "required by truncated: penalize, but missing"
                if self.truncated == "penalize"
                else "applies to truncated: penalize only; remove it",
            )
        yield from self.kl.problems_with(self.completions_per_step)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    def describe_counts(self) -> list[str]:
        samples = self.completions_per_step
        updates, passes = self.updates_per_step, self.epochs_per_step
        of = f"{many(updates, 'update')} of {samples // updates}"
        if passes > 1:
            of = f"{passes} passes x {of} = {passes * updates} updates"
        lines = [
            f"{many(self.prompts_per_step, 'prompt')} x {self.group_size} completions = "
            f"{samples} samples a step, {of}; {many(self.steps, 'step')} = "
            f"{many(self.steps * samples, 'sample')}, "
            f"{many(self.steps * updates * passes, 'update')}"
        ]
        if self.dynamic_sampling == "refill":
            extra = self.max_refills * samples
            lines.append(
                f"up to {many(self.max_refills, 'refill')} a step, {many(extra, 'more sample')}"
            )
        return lines
