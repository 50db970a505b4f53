"""The `algorithm` section of online direct preference optimization."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.config.fields import Positive, PositiveCount, problem, raise_problems
from alignment.config.methods.base import MethodConfig, Needs, many
from alignment.config.methods.preference import PreferenceLossConfig


class OnlineDPOConfig(MethodConfig):
    """Direct preference optimization on the policy's own completions, paired by their rewards
    (Guo et al. 2024). With a reference that is synced every so many steps it is iterative DPO."""

    NEEDS: ClassVar[Needs] = Needs(data="prompts", rollout=True, rewards="required", dropout=False)

    type: Literal["online_dpo"]
    """The method."""
    steps: PositiveCount
    """Rollouts, each followed by its updates."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one rollout."""
    group_size: Annotated[PositiveCount, Field(ge=2)] = 2
    """Completions sampled for each prompt."""
    pairs: Literal["best_worst", "random_pair", "all_pairs"] = "best_worst"
    """Which completions of a prompt are compared: the best with the worst, two drawn at random, or
    all with all. The one with the higher reward is chosen; ties make no pair."""
    updates_per_step: PositiveCount = 1
    """Optimizer updates that a rollout's prompts are divided into; divides `prompts_per_step`."""
    truncation_penalty: Positive | None = None
    """Subtracted from the reward of a completion cut off at max_new_tokens; null is off."""
    loss: PreferenceLossConfig = PreferenceLossConfig()
    """The preference loss."""

    @model_validator(mode="after")
    def _updates_divide(self) -> OnlineDPOConfig:
        if self.prompts_per_step % self.updates_per_step:
            message = (
                f"{self.updates_per_step} updates do not divide {self.prompts_per_step} prompts "
                "(prompts_per_step) evenly"
            )
            raise_problems("online_dpo", [problem(("updates_per_step",), message)])
        return self

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss.uses_reference

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def most_pairs_per_step(self) -> int:
        """Pairs of a step without a tie."""
        size = self.group_size
        return self.prompts_per_step * (size * (size - 1) // 2 if self.pairs == "all_pairs" else 1)

    def describe_counts(self) -> list[str]:
        return [
            f"{many(self.prompts_per_step, 'prompt')} x {self.group_size} completions = "
            f"{many(self.completions_per_step, 'sample')} a step, paired into at most "
            f"{many(self.most_pairs_per_step, 'pair')}, {many(self.updates_per_step, 'update')}; "
            f"{many(self.steps, 'step')} = {many(self.steps * self.completions_per_step, 'sample')}"
            f", {many(self.steps * self.updates_per_step, 'update')}"
        ]
