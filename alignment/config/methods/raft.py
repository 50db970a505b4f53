"""The `algorithm` section of iterated self-improvement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import Number, PositiveCount, problem, raise_problems
from alignment.config.methods.base import MethodConfig, Needs, many
from alignment.config.methods.sections import KLConfig


class RAFTConfig(MethodConfig):
    """Reward-ranked fine-tuning (Dong et al. 2023): sample, keep the best, imitate them, repeat.

    With `minimum` and no rank it is expert iteration: imitate whatever is good enough.
    """

    NEEDS: ClassVar[Needs] = Needs(
        data="prompts", rollout=True, rewards="required", on_policy=True, dropout=False
    )

    type: Literal["raft"]
    """The method."""
    steps: PositiveCount
    """Rounds of sampling, each followed by its updates."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one round."""
    group_size: Annotated[PositiveCount, Field(ge=2)]
    """Completions sampled for each prompt."""
    keep: PositiveCount = 1
    """At most so many completions of a prompt are imitated, the best ones."""
    minimum: Number | None = None
    """Imitate only completions of at least this reward; null imitates any."""
    epochs_per_step: PositiveCount = 1
    """Passes over the completions kept, an update each."""
    reduction: Literal["token", "sequence"] = "token"
    """Every token weighs the same, or every sequence does (mean over its tokens first)."""
    kl: KLConfig = KLConfig()
    """Pull towards the reference policy, in the loss."""

    @model_validator(mode="after")
    def _options_apply(self) -> RAFTConfig:
        raise_problems("algorithm", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.keep > self.group_size:
            yield problem(
                ("keep",),
                f"{self.keep} of {self.group_size} samples (group_size) cannot be kept; use fewer",
            )
        if self.kl.placement == "reward":
            yield problem(
                ("kl", "placement"),
                "raft ranks completions by their rewards alone; use placement: loss",
            )
        yield from self.kl.problems_with(self.completions_per_step)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    def describe_counts(self) -> list[str]:
        kept = self.prompts_per_step * self.keep
        return [
            f"{many(self.prompts_per_step, 'prompt')} x {self.group_size} completions = "
            f"{self.completions_per_step} samples a step, at most {kept} imitated, "
            f"{many(self.epochs_per_step, 'update')}; {many(self.steps, 'step')}"
        ]
