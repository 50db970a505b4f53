"""The `algorithm` sections of methods that sample a data set for a later stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import (
    Bool,
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    problem,
    raise_problems,
)
from alignment.config.methods.base import MethodConfig, Needs, many

_NEEDS = Needs(data="prompts", rollout=True, rewards="required", reference="never", makes="data")


class RejectionSamplingConfig(MethodConfig):
    """Sample several completions of each prompt and keep the good ones: demonstrations for SFT.

    With `keep: 1` and no minimum it is best-of-n.
    """

    NEEDS: ClassVar[Needs] = _NEEDS

    type: Literal["rejection_sampling"]
    """The method."""
    steps: PositiveCount | None = None
    """Rounds of sampling; null goes through the prompts once."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one round."""
    samples_per_prompt: Annotated[PositiveCount, Field(ge=2)]
    """Completions sampled for each prompt."""
    keep: PositiveCount = 1
    """At most so many completions of a prompt are kept, the best ones."""
    minimum: Number | None = None
    """Keep only completions of at least this reward; null keeps any."""
    keep_cut_off: Bool = False
    """Keep completions that were cut off, too. SFT would teach the model to end there."""

    @model_validator(mode="after")
    def _options_apply(self) -> RejectionSamplingConfig:
        raise_problems("algorithm", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.keep > self.samples_per_prompt:
            yield problem(
                ("keep",),
                f"{self.keep} of {self.samples_per_prompt} samples (samples_per_prompt) cannot be "
                "kept; use fewer",
            )

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def describe_counts(self) -> list[str]:
        kept = self.prompts_per_step * self.keep
        return [*_sampled(self), f"at most {many(kept, 'row')} a round"]


class PreferenceSamplingConfig(MethodConfig):
    """Sample completions in pairs and label which one is preferred: data for reward models and DPO.

    The label is that of the rewards, with noise where it is asked for.
    """

    NEEDS: ClassVar[Needs] = _NEEDS

    type: Literal["preference_sampling"]
    """The method."""
    steps: PositiveCount | None = None
    """Rounds of sampling; null goes through the prompts once."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one round."""
    samples_per_prompt: Annotated[PositiveCount, Field(ge=2)] = 2
    """Completions sampled for each prompt."""
    pairs: Literal["neighbours", "best_worst"] = "neighbours"
    """`neighbours`: the first with the second, the third with the fourth, ...; `best_worst`: one
    pair a prompt."""
    min_gap: NonNegative = 0.0
    """Pairs whose rewards differ by no more than this are left out."""
    flip: Annotated[Number, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of labels that are turned round at random."""
    temperature: Positive | None = None
    """Draw the label with probability sigmoid(difference of rewards / temperature) (Bradley and
    Terry 1952); null always prefers the higher reward."""
    keep_cut_off: Bool = False
    """Keep completions that were cut off, too."""

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def describe_counts(self) -> list[str]:
        per_prompt = 1 if self.pairs == "best_worst" else self.samples_per_prompt // 2
        pairs = self.prompts_per_step * per_prompt
        return [*_sampled(self), f"at most {many(pairs, 'pair')} a round"]


def _sampled(config: RejectionSamplingConfig | PreferenceSamplingConfig) -> list[str]:
    rounds = "one pass over the prompts" if config.steps is None else many(config.steps, "round")
    return [
        f"{many(config.prompts_per_step, 'prompt')} x {config.samples_per_prompt} completions = "
        f"{config.completions_per_step} samples a round; {rounds}"
    ]
