"""What a method's section says of the method: the parts that a run has to have ready for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alignment.config.fields import Section

DataForm = Literal["prompts", "samples", "pairs", "labelled", "steps"]


@dataclass(frozen=True, slots=True)
class Needs:
    """The parts that a method works with.

    data:      the form of the training rows: prompts to sample from, samples to imitate, preference
               pairs, labelled samples (KTO), or samples labelled step by step (process rewards).
    model:     `policy`, a language model; or `scalar`, a model with a scalar head.
    rollout:   whether it samples completions, so that the recipe needs a rollout section.
    rewards:   whether it needs rewards, may have them, or has no use for them.
    reference: whether it compares with a reference, by default, optionally or never.
    on_policy: whether it learns from its own samples by probability ratios, which asks for the
               full distribution (no top-k and the like) and for no dropout.
    makes:     `model`, where it changes the model; or `data`, rows for a later stage to train on.
    dropout:   whether dropout, where the model has it, stays on in updates.
    """

    data: DataForm = "prompts"
    model: Literal["policy", "scalar"] = "policy"
    rollout: bool = False
    rewards: Literal["required", "optional", "none"] = "none"
    reference: Literal["default", "optional", "never"] = "default"
    on_policy: bool = False
    makes: Literal["model", "data"] = "model"
    dropout: bool = True

    @property
    def trains(self) -> bool:
        """Whether it has an optimizer, and leaves a model."""
        return self.makes == "model"

    @property
    def makes_policy(self) -> bool:
        """Whether it leaves a language model."""
        return self.trains and self.model == "policy"


class MethodConfig(Section):
    """An `algorithm` section."""

    NEEDS: ClassVar[Needs]

    def describe_counts(self) -> list[str]:
        """How much the method samples and trains on, a line each, for people."""
        return []


def needs_of(algorithm: Any) -> Needs:
    """What a method needs; a plug-in's section that says nothing gets prompts and a policy."""
    needs: Needs = getattr(algorithm, "NEEDS", Needs(rewards="optional"))
    return needs


def many(count: int, what: str) -> str:
    """A count with its noun: 1 step, 2 steps."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def passes_or_steps(what: str, steps: int | None, epochs: float | None, per_step: int) -> list[str]:
    """The arithmetic of a method that makes one update a step from rows of data."""
    batch = f"{many(per_step, what)} a step, 1 update a step"
    if steps is None:
        return [f"{batch}; {epochs:g} passes over the data"]
    return [f"{batch}; {many(steps, 'step')} = {many(steps * per_step, what)}"]


def compares_with_reference(algorithm: Any) -> bool:
    """Whether a method's policy ranks completions by comparing with a reference; one that says
    nothing of it has no other way."""
    return bool(getattr(algorithm, "uses_reference", True))
