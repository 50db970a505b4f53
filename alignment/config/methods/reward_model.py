"""The `algorithm` sections of reward modeling: of whole answers, and of their steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.config.fields import (
    Bool,
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    problem,
    raise_problems,
)
from alignment.config.methods.base import MethodConfig, Needs, passes_or_steps
from alignment.types import STEP_SEPARATOR


class RewardModelConfig(MethodConfig):
    """Reward modeling: a scalar head learns which of two answers people prefer."""

    NEEDS: ClassVar[Needs] = Needs(data="pairs", model="scalar", reference="never")

    type: Literal["reward_model"]
    """The method."""
    steps: PositiveCount | None = None
    """Optimizer updates. Give this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the data. Give this or `steps`."""
    pairs_per_step: PositiveCount = 8
    """Pairs of one optimizer update."""
    margin: Literal["none", "column"] = "none"
    """By how much the chosen answer's score must be higher: not at all, or the number in the data's
    column `margin` (Llama 2)."""
    center_coef: NonNegative = 0.0
    """Weight of the term that keeps scores near zero, such as 0.01; 0 is off."""
    label_smoothing: Annotated[Number, Field(ge=0.0, lt=0.5)] = 0.0
    """Probability that a label is wrong."""
    normalize: Bool = False
    """Save mean and standard deviation of the model's scores beside it, so that whoever rewards
    with it can take them out. They are measured at the last step, with the weights that are saved,
    on at most 256 pairs spread over the training data. The model itself stays as it is."""

    @model_validator(mode="after")
    def _one_length(self) -> RewardModelConfig:
        _check_length(self.type, self.steps, self.epochs)
        return self

    def describe_counts(self) -> list[str]:
        return passes_or_steps("pair", self.steps, self.epochs, self.pairs_per_step)


class ProcessRewardModelConfig(MethodConfig):
    """Process reward modeling: a scalar head learns which steps of an answer are good."""

    NEEDS: ClassVar[Needs] = Needs(data="steps", model="scalar", reference="never")

    type: Literal["process_reward_model"]
    """The method."""
    steps: PositiveCount | None = None
    """Optimizer updates. Give this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the data. Give this or `steps`."""
    samples_per_step: PositiveCount = 8
    """Answers of one optimizer update; every labelled step in them weighs the same."""
    separator: Annotated[str, Field(min_length=1)] = STEP_SEPARATOR
    """What stands between two steps of an answer: here, and where the model rewards, which is told
    by a note beside it. Rows with a step that holds it are dropped (and counted)."""

    @model_validator(mode="after")
    def _one_length(self) -> ProcessRewardModelConfig:
        _check_length(self.type, self.steps, self.epochs)
        return self

    def describe_counts(self) -> list[str]:
        return passes_or_steps("answer", self.steps, self.epochs, self.samples_per_step)


def _check_length(method: str, steps: int | None, epochs: float | None) -> None:
    if (steps is None) == (epochs is None):
        given = "neither" if steps is None else "both"
        raise_problems(method, [problem((), f"give either steps or epochs; found {given}")])
