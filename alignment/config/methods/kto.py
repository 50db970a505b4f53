"""The `algorithm` section of Kahneman-Tversky optimization."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from alignment.config.fields import (
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Section,
    problem,
    raise_problems,
)
from alignment.config.methods.base import MethodConfig, Needs, passes_or_steps


class UnpairedLossConfig(Section):
    """How a completion's label becomes a loss: by its implied reward, beta log(policy / reference),
    against a point that tells good from bad."""

    kind: Literal["kto", "apo_zero_unpaired", "bco"] = "kto"
    """`kto`: the point is the policy's divergence from the reference, estimated at each step from
    completions behind other prompts. `apo_zero_unpaired`: it is 0 (D'Oosterlinck et al. 2024).
    `bco`: a classifier (Jung et al. 2024), whose point is a moving average of both classes'
    rewards."""
    beta: Positive = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: NonNegative = 1.0
    """Weight of desirable samples. Under kto both classes should weigh about the same in all,
    desirable ones up to a third more."""
    undesirable_weight: NonNegative = 1.0
    """Weight of undesirable samples."""
    bco_decay: Annotated[Number, Field(ge=0.0, lt=1.0)] | None = Field(
        default_factory=lambda data: 0.9 if data.get("kind") == "bco" else None
    )
    """Share that bco's moving average of rewards keeps in a step; its default is 0.9."""

    @model_validator(mode="after")
    def _options_apply(self) -> UnpairedLossConfig:
        if not self.desirable_weight + self.undesirable_weight:
            message = "both weights are 0, so there is nothing to learn from"
            raise_problems("loss", [problem(("desirable_weight",), message)])
        if self.bco_decay is not None and self.kind != "bco":
            message = "applies to kind: bco only; remove it"
            raise_problems("loss", [problem(("bco_decay",), message)])
        return self


class KTOConfig(MethodConfig):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024) and its relatives: learning from
    completions labelled desirable or not, each on its own. Preference pairs serve too: each gives
    one of both."""

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
    loss: UnpairedLossConfig = UnpairedLossConfig()
    """The loss of a labelled completion."""

    @model_validator(mode="after")
    def _one_length(self) -> KTOConfig:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise_problems("kto", [problem((), f"give either steps or epochs; found {given}")])
        return self

    @property
    def uses_reference(self) -> bool:
        """It always compares with a reference."""
        return True

    def describe_counts(self) -> list[str]:
        return passes_or_steps("sample", self.steps, self.epochs, self.samples_per_step)
