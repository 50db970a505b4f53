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
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from alignment import registry
from alignment.config import checks
from alignment.config.algorithms import Algorithm, default_reference
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
from alignment.config.model import ModelConfig
from alignment.config.plugins import PluginSection
from alignment.types import UserInputError


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

_IN_PROCESS = ("native", "hf", "paged")


class RunConfig(Section):
    """What the run is called and where it is kept."""

    name: Name
    """Name of the run and of its folder."""
    seed: Count = 0
    """Seed of everything random."""
    dir: str = "runs"
    """Folder that holds the run's folder."""


class DataConfig(PluginSection):
    """Where prompts and completions come from: a source and its options."""

    KIND = "source"

    held_out: Count = 0
    """Rows kept out of training, for evaluation."""
    shuffle: Bool = True
    """Draw the rows in a random order, new in each pass."""
    limit: PositiveCount | None = None
    """Use only so many rows; null uses all."""
    style: Literal["auto", "chat", "plain"] = "auto"
    """How text becomes tokens: rendered by the chat template, plainly, or `auto`: by the chat
    template if there is one."""
    max_tokens: PositiveCount | None = None
    """Longest prompt and completion together; null is the model's context."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a row over max_tokens: its completions are cut (a row with nothing left is
    dropped), it is dropped, or the run is refused. Both are counted."""
    max_prompt_tokens: PositiveCount | None = None
    """Drop (and count) rows with longer prompts; null keeps all."""
    system: str | None = None
    """System message put before each conversation."""


class ServerConfig(Section):
    """A server that samples in place of the training processes."""

    url: str | None = None
    """Its address, such as http://localhost:8000; null is what the variable ALIGN_ROLLOUT_SERVER of
    the environment says, by which a run may go on with a server at another address."""
    weights_dir: str | None = None
    """Folder by which the server is given the policy's weights: it sees them there under the same
    path; null is the machine's folder for temporary files (for a server beside rank 0)."""
    timeout_seconds: Positive = 600.0
    """Longest wait for one completion, and for the weights to be loaded."""


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: str = "native"
    """A registered engine: native, hf, paged, vllm, or a plug-in."""
    server: ServerConfig | None = None
    """The server that engine vllm samples on."""
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

    @model_validator(mode="after")
    def _server_fits(self) -> RolloutConfig:
        found = []
        if self.engine == "vllm" and self.server is None:
            found.append(
                problem(("server",), "required by engine vllm: {url: 'http://localhost:8000'}")
            )
        if self.engine in _IN_PROCESS and self.server is not None:
            found.append(
                problem(("server",), f"engine {self.engine} uses no server; remove it, or use vllm")
            )
        if self.engine == "vllm" and self.kv_tokens is not None:
            found.append(
                problem(("kv_tokens",), "the server's own setting with engine vllm; remove it")
            )
        if self.engine == "vllm" and self.min_p > 0 and (self.top_k or self.top_p < 1):
            found.append(
                problem(
                    ("min_p",),
                    "engine vllm cuts by min_p before top_k and top_p, the others after; use min_p "
                    "alone there, or not at all",
                )
            )
        raise_problems("rollout", found)
        return self

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
    lr: Positive | None = None
    """Peak learning rate; required by every method that trains."""
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


class BestConfig(Section):
    """Which checkpoint is the best one."""

    metric: str
    """A name in metrics.jsonl, such as eval/held_out_loss/loss."""
    mode: Literal["max", "min"]
    """Whether the largest or the smallest value is the best."""


class CheckpointConfig(Section):
    """When to save what a killed run goes on from."""

    every: Count = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: PositiveCount = 2
    """Latest checkpoints to keep."""
    keep_best: BestConfig | None = None
    """Keep the checkpoint with the best value of a metric, too; null keeps the latest alone. Only
    checkpoints of steps that measured the metric compete."""


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
    dropped_rows: Fraction = 0.5
    """Share of the training rows, and of the held-out rows, that may be unusable (too long, empty,
    both sides the same)."""
    logprob_gap: Positive = 0.5
    """Mean absolute difference, in nats, between the engine's and the trainer's log-probability."""
    idle_steps: PositiveCount = 5
    """Steps in a row in which nothing could be learned (no spread of reward, zero gradient)."""
    hang_minutes: NonNegative = 30.0
    """How long nothing may move (no token sampled, no forward pass, no phase begun or ended) on a
    rank and those it waits for, before the run is ended with the rank, phase and samples named; 0
    never ends it. More than the slowest call of a reward, which cannot be interrupted. While a
    model or data is loaded, bytes read and written are movement, too."""


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
    optim: OptimConfig = OptimConfig()
    """The optimizer; required where the algorithm trains."""
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
    def _some_methods_need_no_reference(cls, data: Any) -> Any:
        model, algorithm = (
            (data.get("model"), data.get("algorithm")) if isinstance(data, dict) else (None, None)
        )
        if not (isinstance(model, dict) and isinstance(algorithm, dict)):
            return data
        if "reference" in model or default_reference(algorithm) != "none":
            return data
        return {**data, "model": {**model, "reference": "none"}}

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        raise_problems("recipe", checks.cross_checks(self))
        return self
