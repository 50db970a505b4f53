"""The `algorithm` section of Kahneman-Tversky optimization."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.config.fields import NonNegative, Positive, PositiveCount, problem, raise_problems
from alignment.config.methods.base import MethodConfig, Needs, passes_or_steps


class KTOConfig(MethodConfig):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): learning from completions labelled
    desirable or not, each on its own. Preference pairs serve too: each gives one of both."""

    NEEDS: ClassVar[Needs] = Needs(data="labelled", dropout=False)

    type: Literal["kto"]
    """The method."""
    steps: PositiveCount | None = None
    """Optimizer updates. Give this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the data. Give this or `steps`."""
    samples_per_step: Annotated[PositiveCount, Field(ge=2)] = 16
    """Samples of one optimizer update. The reference point is estimated from them, so few make it
    noisy."""
    beta: Positive = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: NonNegative = 1.0
    """Weight of desirable samples. Both classes should weigh about the same in all, desirable ones
    up to a third more."""
    undesirable_weight: NonNegative = 1.0
    """Weight of undesirable samples."""

    @model_validator(mode="after")
    def _one_length(self) -> KTOConfig:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise_problems("kto", [problem((), f"give either steps or epochs; found {given}")])
        if not self.desirable_weight + self.undesirable_weight:
            message = "both weights are 0, so there is nothing to learn from"
            raise_problems("kto", [problem(("desirable_weight",), message)])
        return self

    @property
    def uses_reference(self) -> bool:
        """It always compares with a reference."""
        return True

    def describe_counts(self) -> list[str]:
        return passes_or_steps("sample", self.steps, self.epochs, self.samples_per_step)
