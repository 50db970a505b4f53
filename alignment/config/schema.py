"""The recipe: every section, key, default and limit of one run.

The docstring under a key is its documentation, and is what messages about a missing key quote.
Rules between sections are in `alignment.config.checks`. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from alignment import registry
from alignment.config import checks
from alignment.config.algorithms import Algorithm
from alignment.config.fields import (
    Bool,
    Count,
    Fraction,
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Section,
    problem,
    raise_problems,
)
from alignment.config.plugins import PluginSection
from alignment.types import UserInputError

DType = Literal["float32", "bfloat16", "float16"]


def _folder_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is None:
        message = (
            f"{name!r} cannot name a folder; use letters, digits, '.', '_' and '-', at most 100, "
            "beginning with a letter or digit"
        )
        raise ValidationError.from_exception_data("name", [problem((), message, name)])
    return name


Name = Annotated[str, AfterValidator(_folder_name)]
"""A name that is safe as the name of a folder."""


class RunConfig(Section):
    """What the run is called and where it is kept."""

    name: Name
    """Name of the run and of its folder."""
    seed: Count = 0
    """Seed of everything random."""
    dir: str = "runs"
    """Folder that holds the run's folder."""


class LoraConfig(Section):
    """Train low-rank adapters in place of the full weights."""

    rank: PositiveCount
    """Rank of the adapters."""
    alpha: Positive = Field(default_factory=lambda data: 2.0 * data["rank"])
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
    """Number format of a copy; null is the model's."""
    device: str | None = None
    """Device of a copy, such as `cpu`; null is the model's."""
    every: PositiveCount = 1
    """Steps between updates of a synced reference."""
    mix: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the policy in an update of a synced reference: 1 copies, less averages (EMA)."""

    @model_validator(mode="after")
    def _options_apply(self) -> ReferenceConfig:
        applies = {
            "dtype": ("frozen_copy", "synced"),
            "device": ("frozen_copy", "synced"),
            "every": ("synced",),
            "mix": ("synced",),
        }
        raise_problems(
            "reference",
            [
                problem((key,), f"applies to mode {' and '.join(modes)} only; remove it")
                for key, modes in applies.items()
                if self.mode not in modes
                and getattr(self, key) != type(self).model_fields[key].default
            ],
        )
        return self


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
    the algorithm is sft."""
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


class DataConfig(PluginSection):
    """Where prompts and completions come from: a source and its options."""

    KIND = "source"

    held_out: Count = 0
    """Rows kept out of training, for evaluation."""
    shuffle: Bool = True
    """Draw the rows in a random order, new in each pass."""
    limit: PositiveCount | None = None
    """Use only so many rows; null uses all."""
    max_prompt_tokens: PositiveCount | None = None
    """Drop (and count) rows with longer prompts; null keeps all."""
    system: str | None = None
    """System message put before each conversation."""


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: str = "native"
    """A registered engine: native, hf, paged, or a plug-in."""
    max_new_tokens: PositiveCount
    """Longest completion, in tokens."""
    temperature: NonNegative = 1.0
    """1 samples the model's own distribution; 0 is greedy."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    """Sample within the likeliest tokens of this total probability; 1 is off."""
    min_p: Fraction = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the model's own end tokens."""
    max_rows: PositiveCount = 64
    """Completions generated side by side."""
    kv_tokens: PositiveCount | None = None
    """Most tokens held in the key-value cache; null takes what max_rows rows need."""

    @field_validator("engine")
    @classmethod
    def _engine_exists(cls, value: str) -> str:
        try:
            registry.find("engine", value)
        except UserInputError as error:
            raise ValidationError.from_exception_data(
                "engine", [problem((), str(error), value)]
            ) from None
        return value


class RewardConfig(PluginSection):
    """One reward: a registered name or "module:attribute", its weight, and its options."""

    KIND = "reward"

    weight: Number = 1.0
    """Factor in the sum of rewards; 0 measures without counting."""
    name: str | None = None
    """What metrics call it; null takes the type."""


class OptimConfig(Section):
    """The optimizer and its schedule."""

    type: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Positive
    """Peak learning rate."""
    betas: tuple[
        Annotated[Number, Field(ge=0.0, lt=1.0)], Annotated[Number, Field(ge=0.0, lt=1.0)]
    ] = (0.9, 0.999)
    """Decay rates of the running mean of gradients and of their squares."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate after warm-up."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from zero."""
    min_lr_ratio: Fraction = 0.0
    """Share of the learning rate left at the end of the decay."""
    max_grad_norm: Positive = 1.0
    """Gradients of a larger norm are scaled down to it."""
    micro_batch_tokens: PositiveCount = 4096
    """Most tokens that go through the model at once; sets memory, never the result."""


class CheckpointConfig(Section):
    """When to save what a killed run goes on from."""

    every: Count = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: PositiveCount = 2
    """Latest checkpoints to keep."""


class TaskConfig(PluginSection):
    """One evaluation task and its options."""

    KIND = "task"

    name: str | None = None
    """What metrics call it; null takes the type."""


class EvalConfig(Section):
    """Evaluation during training."""

    every: Count = 0
    """Steps between evaluations; 0 evaluates at the start and at the end only."""
    at_start: Bool = True
    """Evaluate the model as handed over, too."""
    tasks: tuple[TaskConfig, ...] = ()
    """What to evaluate."""


class LimitsConfig(Section):
    """How wrong things may go before the run stops."""

    unscorable: Fraction = 0.2
    """Share of completions of a step that rewards may fail to score."""
    nonfinite_steps: PositiveCount = 3
    """Updates in a row that may be skipped for a loss or gradient that is not finite."""
    logprob_gap: Positive = 0.5
    """Mean absolute difference, in nats, between the engine's and the trainer's log-probability."""
    idle_steps: PositiveCount = 5
    """Steps in a row in which nothing could be learned (no spread of reward, zero gradient)."""


def parsed_expectation(text: str) -> str:
    """`text`, if it is an expectation that can be checked after the run.

    Raises:
        pydantic.ValidationError: it is not.
    """
    # By name: alignment.runs stands above this layer, and most recipes expect nothing.
    parse = importlib.import_module("alignment.runs.expect").parse_expectation
    try:
        parse(text)
    except UserInputError as error:
        raise ValidationError.from_exception_data("expect", [problem((), str(error))]) from None
    return text


Expectation = Annotated[str, AfterValidator(parsed_expectation)]


class Recipe(Section):
    """One run."""

    run: RunConfig
    """What the run is called."""
    model: ModelConfig
    """The policy and its reference."""
    data: DataConfig
    """Where prompts and completions come from."""
    algorithm: Algorithm
    """The method."""
    rollout: RolloutConfig | None = None
    """How completions are sampled; required where the algorithm samples."""
    rewards: tuple[RewardConfig, ...] = ()
    """What is rewarded; required where the algorithm learns from rewards."""
    optim: OptimConfig
    """The optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save."""
    eval: EvalConfig = EvalConfig()
    """When and what to evaluate."""
    limits: LimitsConfig = LimitsConfig()
    """When to stop."""
    expect: tuple[Expectation, ...] = ()
    """What must hold of the metrics after the run, such as
    "reward/mean[-5:] > reward/mean[:5] + 0.2"."""

    @model_validator(mode="before")
    @classmethod
    def _sft_needs_no_reference(cls, data: Any) -> Any:
        model, algorithm = (
            (data.get("model"), data.get("algorithm")) if isinstance(data, dict) else (None, None)
        )
        if not (isinstance(model, dict) and isinstance(algorithm, dict)):
            return data
        if algorithm.get("type") != "sft" or "reference" in model:
            return data
        return {**data, "model": {**model, "reference": "none"}}

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        raise_problems("recipe", checks.cross_checks(self))
        return self
