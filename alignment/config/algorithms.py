"""The `algorithm` section: one frozen model per method, chosen by `type`.

A method that is not built in is a trainer plug-in: a class registered under kind "trainer" whose
attribute `Config` is the pydantic model of its section.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, SerializeAsAny, model_validator
from pydantic import ValidationError as PydanticValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignment import registry
from alignment.config.fields import (
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Section,
    key_descriptions,
    problem,
    raise_problems,
    with_key_names,
)
from alignment.types import UserInputError


class SFTConfig(Section):
    """Supervised fine-tuning: the mean negative log-probability of the completions."""

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
    """Samples over which the adaptive controller reacts."""

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


class OverlongConfig(Section):
    """Soft penalty for long completions (DAPO, eq. 13), added to the reward.

    0 up to max_new_tokens - buffer tokens, then falling linearly to -penalty at max_new_tokens.
    """

    buffer: PositiveCount
    """Tokens before the limit over which the penalty grows."""
    penalty: Positive = 1.0
    """Size of the penalty at the limit."""


class GRPOConfig(Section):
    """Group-relative policy optimization (DeepSeekMath 2024) and its relatives.

    `rlvr`, learning from verifiable rewards, is the same with a verifier among the rewards.
    """

    type: Literal["grpo", "rlvr"]
    """The method."""
    steps: PositiveCount
    """Rollouts, each followed by its updates."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one rollout."""
    group_size: Annotated[PositiveCount, Field(ge=2)]
    """Completions sampled for each prompt."""
    updates_per_step: PositiveCount = 1
    """Optimizer updates that a rollout is divided into; divides `prompts_per_step`."""
    epochs_per_step: PositiveCount = 1
    """Passes over a rollout."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The policy objective."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """Weights of tokens: all equal, equal per sequence, or all divided by a constant."""
    constant_divisor: Positive | None = None
    """Tokens that stand for one sequence's share of the divisor under reduction: constant; null
    takes rollout.max_new_tokens (Dr. GRPO)."""
    kl: KLConfig = KLConfig()
    """Pull towards the reference policy."""
    entropy_coef: Number = 0.0
    """Weight of the entropy bonus."""
    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions cut off at max_new_tokens: as any other, left out of the loss, or penalized."""
    truncation_penalty: Positive | None = None
    """Subtracted from the reward of a cut-off completion under truncated: penalize."""
    overlong: OverlongConfig | None = None
    """Soft penalty for completions near the limit; null is off."""
    dynamic_sampling: Literal["off", "skip", "refill"] = "off"
    """Groups without spread of reward teach nothing: keep them, drop them, or draw others."""
    max_refills: PositiveCount = 3
    """Further draws a step may make under dynamic_sampling: refill."""

    @model_validator(mode="after")
    def _options_apply(self) -> GRPOConfig:
        raise_problems("algorithm", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.prompts_per_step % self.updates_per_step:
            yield problem(
                ("updates_per_step",),
                f"{self.updates_per_step} updates do not divide {self.prompts_per_step} prompts "
                "(prompts_per_step) evenly",
            )
        if self.constant_divisor is not None and self.reduction != "constant":
            yield problem(("constant_divisor",), "applies to reduction: constant only; remove it")
        if (self.truncation_penalty is None) == (self.truncated == "penalize"):
            yield problem(
                ("truncation_penalty",),
                "required by truncated: penalize, but missing"
                if self.truncated == "penalize"
                else "applies to truncated: penalize only; remove it",
            )


BUILT_IN: dict[str, type[Section]] = {
    "sft": SFTConfig,
    "grpo": GRPOConfig,
    "rlvr": GRPOConfig,
}


def _validate(value: Any) -> BaseModel:
    """The section as the model its `type` names.

    Raises:
        pydantic.ValidationError: located relative to the section.
    """
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("model_type", "not a section", {"keys": ["type", "..."]})
    if "type" not in value:
        message = f"required, but missing; one of {', '.join(registry.names('trainer'))}"
        raise PydanticValidationError.from_exception_data(
            "algorithm", [problem(("type",), message)]
        )
    try:
        model = _model(value["type"])
    except UserInputError as error:
        raise PydanticValidationError.from_exception_data(
            "algorithm", [problem(("type",), str(error), value["type"])]
        ) from None
    return _checked(model, value)


def _model(name: Any) -> type[BaseModel]:
    if not isinstance(name, str):
        raise UserInputError(f"expected the name of a method, found {name!r}")
    registry.find("trainer", name)
    if name in BUILT_IN:
        return BUILT_IN[name]
    model = getattr(registry.get("trainer", name), "Config", None)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise UserInputError(
            f"the trainer plug-in {name!r} has no attribute Config that is a pydantic model; "
            "its author declares the keys of its section there"
        )
    if "type" not in model.model_fields:
        raise UserInputError(
            f"{model.__name__}, the Config of the trainer plug-in {name!r}, has no field `type`; "
            "its author adds one"
        )
    return model


def _checked(model: type[BaseModel], value: dict[str, Any]) -> BaseModel:
    keys = key_descriptions(model)
    if model.model_config.get("extra") in (None, "ignore"):
        # A Config that ignores unknown keys would let a mistyped one pass.
        unknown = [
            InitErrorDetails(
                type=PydanticCustomError("extra_forbidden", "unknown key", {"keys": list(keys)}),
                loc=(key,),
                input=value[key],
            )
            for key in value
            if key not in keys
        ]
        raise_problems("algorithm", unknown)
    try:
        return model.model_validate(value)
    except PydanticValidationError as error:
        raise with_key_names(error, keys) from None


Algorithm = Annotated[SerializeAsAny[BaseModel], PlainValidator(_validate)]
"""An algorithm section, validated by the model that its `type` names."""
