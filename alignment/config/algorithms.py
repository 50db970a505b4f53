"""The `algorithm` section: one frozen model per method, chosen by `type`.

The models of the built-in methods are in `alignment.config.methods`. A method that is not built in
is a trainer plug-in: a class registered under kind "trainer" whose attribute `Config` is the
pydantic model of its section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, PlainValidator, SerializeAsAny
from pydantic import ValidationError as PydanticValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignment import registry
from alignment.config.fields import key_descriptions, problem, raise_problems, with_key_names
from alignment.config.methods.base import needs_of
from alignment.registry import load_target
from alignment.types import UserInputError

_METHODS = "alignment.config.methods"
BUILT_IN: dict[str, str] = {
    "sft": f"{_METHODS}.sft:SFTConfig",
    "reward_model": f"{_METHODS}.reward_model:RewardModelConfig",
    "process_reward_model": f"{_METHODS}.reward_model:ProcessRewardModelConfig",
    "grpo": f"{_METHODS}.grpo:GRPOConfig",
    "rlvr": f"{_METHODS}.grpo:GRPOConfig",
    "ppo": f"{_METHODS}.ppo:PPOConfig",
    "dpo": f"{_METHODS}.dpo:DPOConfig",
    "kto": f"{_METHODS}.kto:KTOConfig",
    "online_dpo": f"{_METHODS}.online_dpo:OnlineDPOConfig",
    "rejection_sampling": f"{_METHODS}.make_data:RejectionSamplingConfig",
    "preference_sampling": f"{_METHODS}.make_data:PreferenceSamplingConfig",
    "raft": f"{_METHODS}.raft:RAFTConfig",
    "constitutional": f"{_METHODS}.feedback:ConstitutionalConfig",
    "ai_feedback": f"{_METHODS}.feedback:AIFeedbackConfig",
}
"""The section of each built-in method, imported when a recipe names it."""


def default_reference(algorithm: Mapping[str, Any]) -> str | None:
    """The reference mode of a method that does without by default ("none"); None where the model
    decides. A section may say so of itself, by an attribute `uses_reference` that is False."""
    try:
        model = _model(algorithm.get("type"))
        if needs_of(model).reference == "never":
            return "none"
        section = _checked(model, dict(algorithm))
    except (UserInputError, PydanticValidationError):
        return None
    return None if getattr(section, "uses_reference", True) else "none"


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
        section: type[BaseModel] = load_target(BUILT_IN[name], f"the section of {name!r}:")
        return section
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
