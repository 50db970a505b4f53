"""The `algorithm` section of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from alignment.config.fields import Positive, PositiveCount, problem, raise_problems
from alignment.config.methods.base import MethodConfig, Needs, passes_or_steps


class SFTConfig(MethodConfig):
    """Supervised fine-tuning: the mean negative log-probability of the completions."""

    NEEDS: ClassVar[Needs] = Needs(data="samples", reference="never")

    type: Literal["sft"]
    """The method."""
    steps: PositiveCount | None = None
    """Optimizer updates. Give this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the data. Give this or `steps`."""
    samples_per_step: PositiveCount = 8
    """Samples of one optimizer update."""
    loss_on: Literal["assistant", "completion"] = "assistant"
    """What is learned of a conversation: every assistant turn, or the last one."""
    reduction: Literal["token", "sequence"] = "token"
    """Every token weighs the same, or every sequence does (mean over its tokens first)."""

    @model_validator(mode="after")
    def _one_length(self) -> SFTConfig:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise_problems("sft", [problem((), f"give either steps or epochs; found {given}")])
        return self

    def describe_counts(self) -> list[str]:
        return passes_or_steps("sample", self.steps, self.epochs, self.samples_per_step)
