"""Sections that several methods share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import (
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Section,
    problem,
    raise_problems,
)


class AdvantageConfig(Section):
    """How rewards become advantages: A = (r - baseline) / scale, per group of one prompt."""

    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """Subtracted from each reward: the group's mean, or the mean of the group's others (RLOO)."""
    scale: Literal["group", "batch", "none"] = Field(
        default_factory=lambda data: "none" if data.get("baseline") == "leave_one_out" else "group"
    )
    """Divided by: the group's standard deviation (GRPO), the batch's, or nothing (Dr. GRPO, RLOO).
    The default is group, and none with leave_one_out."""

    @model_validator(mode="after")
    def _scale_applies(self) -> AdvantageConfig:
        if self.baseline == "leave_one_out" and self.scale != "none":
            message = "leave_one_out (RLOO) is not scaled; use none, or baseline: group_mean"
            raise_problems("advantage", [problem(("scale",), message)])
        return self


class PolicyLossConfig(Section):
    """The policy objective."""

    type: Literal["clip", "cispo"] = "clip"
    """`clip`: PPO's clipped surrogate. `cispo`: clipped importance weights, every token learns."""
    clip_low: NonNegative | None = Field(
        default_factory=lambda data: None if data.get("type") == "cispo" else 0.2
    )
    """Ratios below 1 - clip_low are clipped. Null leaves that side open (the default of cispo)."""
    clip_high: NonNegative = 0.2
    """Ratios above 1 + clip_high are clipped."""
    ratio_level: Literal["token", "sequence"] = "token"
    """One ratio per token, or per sequence (GSPO: the geometric mean of its tokens' ratios)."""
    dual_clip: Annotated[Number, Field(gt=1.0)] | None = None
    """Bound on the loss where the advantage is negative (dual-clip PPO); null is off."""

    @model_validator(mode="after")
    def _options_apply(self) -> PolicyLossConfig:
        raise_problems("loss", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.type == "clip" and self.clip_low is None:
            yield problem(("clip_low",), "the clip loss needs a number, such as 0.2", None)
        if self.type == "cispo" and self.dual_clip is not None:
            yield problem(("dual_clip",), "applies to loss type clip only; remove it")
        if self.type == "cispo" and self.ratio_level == "sequence":
            yield problem(
                ("ratio_level",),
                "cispo weighs tokens one by one; use token, or loss type clip",
            )


# A step of n completions moves the KL coefficient by 1 + error n / horizon, and errors are clipped
# at -0.2 (`losses.kl.AdaptiveKLController`).
_MOST_PER_HORIZON = 5


class KLConfig(Section):
    """Pull towards the reference policy."""

    coef: NonNegative = 0.0
    """Weight of the KL divergence from the reference; 0 is off (it is still measured)."""
    placement: Literal["loss", "reward"] = "loss"
    """Where it acts: a term of the loss, or a penalty subtracted from the
    reward (the sum over its tokens)."""
    estimator: Literal["k1", "k2", "k3", "full"] = Field(
        default_factory=lambda data: "k1" if data.get("placement") == "reward" else "k3"
    )
    """Per-token estimate: k1, k2, k3 (Schulman), or `full`, exact over the vocabulary. The default
    is k3 in the loss and k1 in the reward."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """Keep `coef`, or steer it towards `target` (Ziegler et al. 2019)."""
    target: Positive | None = None
    """KL per sequence, in nats, that the adaptive controller steers to."""
    horizon: Positive | None = None
    """Completions over which the adaptive controller reacts: one step of n of them moves `coef` by
    at most its share 0.2 n / horizon. More than a fifth of a step's completions."""

    @model_validator(mode="after")
    def _options_apply(self) -> KLConfig:
        raise_problems("kl", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.estimator == "k1" and self.placement == "loss":
            yield problem(
                ("estimator",),
                "k1 in the loss has a gradient of zero in expectation, so it would do nothing; "
                "use k2, k3 or full, or placement: reward",
            )
        if self.estimator == "full" and self.placement == "reward":
            yield problem(
                ("estimator",),
                "full is differentiated through the vocabulary, which a reward is not; use k1, or "
                "placement: loss",
            )
        for name in ("target", "horizon"):
            given = getattr(self, name) is not None
            if self.controller == "adaptive" and not given:
                yield problem((name,), "required by controller: adaptive, but missing")
            if self.controller == "fixed" and given:
                yield problem((name,), "applies to controller: adaptive only; remove it")
        if self.controller == "adaptive" and self.coef == 0.0:
            yield problem(("coef",), "controller: adaptive scales coef; start it above 0")

    def problems_with(self, completions_per_step: int) -> Iterator[InitErrorDetails]:
        """What does not fit the method's steps, by its place in the method's section."""
        if self.horizon is not None and completions_per_step >= _MOST_PER_HORIZON * self.horizon:
            yield problem(
                ("kl", "horizon"),
                f"counts completions, and {self.horizon:g} of them are too few for steps of "
                f"{completions_per_step}: one step below the target would take coef to 0 or below, "
                f"where the penalty is a bonus. Give more than "
                f"{completions_per_step / _MOST_PER_HORIZON:g}; {20 * completions_per_step} moves "
                "coef by 1 % a step at most",
            )


class OverlongConfig(Section):
    """Soft penalty for long completions (DAPO, eq. 13), added to the reward.

    0 up to max_new_tokens - buffer tokens, then falling linearly to -penalty at max_new_tokens.
    """

    buffer: PositiveCount
    """Tokens before the limit over which the penalty grows."""
    penalty: Positive = 1.0
    """Size of the penalty at the limit."""
