"""A method: its class has a `Config`, the model of the recipe's `algorithm` section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class BestOfNConfig(BaseModel):
    """Sample n completions of each prompt and fine-tune on the best."""

    type: Literal["best_of_n"]
    """The method."""
    steps: int = Field(ge=1)
    """Rounds of sampling and training."""
    n: int = Field(ge=2, default=4)
    """Completions per prompt."""

    def describe_counts(self) -> list[str]:
        """For `align check`."""
        return [f"{self.steps} steps, the best of {self.n}"]


class BestOfNTrainer:
    """Does nothing; the tests only load its recipe."""

    Config = BestOfNConfig

    def __init__(self, context: Any) -> None:
        self.config: BestOfNConfig = context.recipe.algorithm
