"""The `model` section: the policy, its adapters and its reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import InitErrorDetails

from alignment.config.fields import (
    Bool,
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Section,
    problem,
    raise_problems,
)

DType = Literal["float32", "bfloat16", "float16"]


class LoraConfig(Section):
    """Train low-rank adapters in place of the full weights."""

    rank: PositiveCount
    """Rank of the adapters."""
    alpha: Positive = Field(default_factory=lambda data: 2.0 * data.get("rank", 1))
    """The update is scaled by alpha / rank; twice the rank unless given."""
    dropout: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapters' input, in updates only."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter."""


class ReferenceConfig(Section):
    """The policy that the KL divergence is measured from: the model as handed over.

    `reference: frozen_copy` is short for `reference: {mode: frozen_copy}`.
    """

    mode: Literal["adapter_off", "frozen_copy", "synced", "precomputed", "none"]
    """`adapter_off` (LoRA: the same weights without the adapter), `frozen_copy`, `synced` (follows
    the policy), `precomputed` (offline methods), `none`."""
    dtype: DType | None = None
    """Number format of a frozen copy; null is the model's."""
    device: str | None = None
    """Device of a frozen copy, such as `cpu`; null is the model's."""
    every: PositiveCount = 1
    """Steps between updates of a synced reference; above 1, unless `mix` is less than 1."""
    mix: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the policy in an update of a synced reference: 1 copies, less averages (EMA)."""

    @model_validator(mode="after")
    def _options_apply(self) -> ReferenceConfig:
        raise_problems("reference", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        applies = {
            "dtype": "frozen_copy",
            "device": "frozen_copy",
            "every": "synced",
            "mix": "synced",
        }
        for key, mode in applies.items():
            if self.mode != mode and getattr(self, key) != type(self).model_fields[key].default:
                yield problem((key,), f"applies to mode {mode} only; remove it")
        if self.mode == "synced" and self.every == 1 and self.mix == 1.0:
            yield problem(
                ("every",),
                "a reference that is a copy of the policy after every step pulls nowhere: each "
                "step begins with a divergence of 0. Copy it every so many steps (every: 50), or "
                "average (mix: 0.1)",
            )


def _default_reference(data: dict[str, Any]) -> ReferenceConfig:
    return ReferenceConfig(mode="frozen_copy" if data.get("lora") is None else "adapter_off")


class ModelConfig(Section):
    """The policy, and its reference."""

    path: str = Field(min_length=1)
    """A folder in Hugging Face format, a catalogue name (`align models list`), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: DType = "bfloat16"
    """Number format that the model computes in."""
    master_dtype: Literal["float32", "none"] = "float32"
    """`float32`: the optimizer keeps full-precision weights behind low-precision compute. `none`:
    it updates the model's own numbers, which loses small updates in bfloat16."""
    lora: LoraConfig | None = None
    """Adapters; null trains every weight."""
    reference: Annotated[
        ReferenceConfig,
        BeforeValidator(lambda value: {"mode": value} if isinstance(value, str) else value),
    ] = Field(default_factory=_default_reference)
    """The reference policy: by default adapter_off with LoRA, frozen_copy without, and none where
    the algorithm has no use for one."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation."""
    gradient_checkpointing: Bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    router_aux_coef: NonNegative = 0.0
    """Weight of the load-balancing loss of a mixture of experts."""
    chat_template: str | None = None
    """File with a Jinja chat template to use in place of the tokenizer's."""
    trust_remote_code: Bool = False
    """Run Python code that comes with the model."""

    @model_validator(mode="after")
    def _reference_fits(self) -> ModelConfig:
        if self.reference.mode == "adapter_off" and self.lora is None:
            message = (
                "adapter_off needs an adapter to switch off; add model.lora (such as "
                "lora: {rank: 16}), or use reference: frozen_copy"
            )
            raise_problems("model", [problem(("reference",), message)])
        return self
