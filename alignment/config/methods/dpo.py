"""The `algorithm` section of direct preference optimization."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from alignment.config.fields import Positive, PositiveCount, problem, raise_problems
from alignment.config.methods.base import MethodConfig, Needs, passes_or_steps
from alignment.config.methods.preference import PreferenceLossConfig


class DPOConfig(MethodConfig):
    """Direct preference optimization (Rafailov et al. 2023) and its relatives: learning from pairs
    of completions of which one was preferred."""

    NEEDS: ClassVar[Needs] = Needs(data="pairs", dropout=False)

    type: Literal["dpo"]
    """The method."""
    steps: PositiveCount | None = None
    """Optimizer updates. Give this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the data. Give this or `steps`."""
    pairs_per_step: PositiveCount = 8
    """Pairs of one optimizer update."""
    loss: PreferenceLossConfig = PreferenceLossConfig()
    """The preference loss."""

    @model_validator(mode="after")
    def _one_length(self) -> DPOConfig:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise_problems("dpo", [problem((), f"give either steps or epochs; found {given}")])
        return self

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss.uses_reference

    def describe_counts(self) -> list[str]:
        return passes_or_steps("pair", self.steps, self.epochs, self.pairs_per_step)
