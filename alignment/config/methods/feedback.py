"""The `algorithm` sections of methods that make data from a language model's feedback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignment.config.fields import (
    PROBLEM,
    Bool,
    Count,
    NonNegative,
    Positive,
    PositiveCount,
    Section,
    problem,
    raise_problems,
)
from alignment.config.methods.base import MethodConfig, Needs, many
from alignment.config.model import DType

VARIABLE_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
NOT_A_VARIABLE = (
    "give the name of an environment variable (letters, digits and _), and the key in that "
    "variable; what stands here is not shown, as it may be a key"
)


def _checked_variable(name: str) -> str:
    if not VARIABLE_NAME.fullmatch(name):
        raise PydanticCustomError(PROBLEM, "{message}", {"message": NOT_A_VARIABLE})
    return name


EnvironmentVariable = Annotated[str, AfterValidator(_checked_variable)]

_KINDS_WITH: Mapping[str, tuple[str, ...]] = {
    "path": ("local",),
    "dtype": ("local",),
    "base_url": ("endpoint",),
    "model": ("endpoint",),
    "api_key_variable": ("endpoint",),
    "timeout_seconds": ("endpoint",),
    "retries": ("endpoint",),
    "max_in_flight": ("endpoint",),
    "token_limit_key": ("endpoint",),
    "cache": ("endpoint",),
}
"""The kinds of chat model that an option applies to; what is not listed applies to all."""

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "policy": (),
    "local": ("path",),
    "endpoint": ("base_url", "model"),
}


class ChatModelConfig(Section):
    """The language model that is asked for feedback."""

    kind: Literal["policy", "local", "endpoint"] = "policy"
    """`policy`: the model of the run itself; `local`: another model, loaded beside it; `endpoint`:
    an OpenAI-compatible server."""
    path: str | None = Field(default=None, min_length=1)
    """Of kind local: a folder in Hugging Face format, a catalogue name, or a hub id. Required."""
    dtype: DType | None = None
    """Of kind local: number format; null takes the policy's."""
    base_url: str | None = Field(default=None, pattern="^https?://.")
    """Of kind endpoint: the address that `/chat/completions` is added to. Required."""
    model: str | None = Field(default=None, min_length=1)
    """Of kind endpoint: the model's name there. Required."""
    api_key_variable: EnvironmentVariable = "OPENAI_API_KEY"
    """Of kind endpoint: the environment variable with the key; no key is sent where it is not set.
    The key itself is never part of a recipe."""
    timeout_seconds: Positive = 60.0
    """Of kind endpoint: time for one request."""
    retries: Count = 4
    """Of kind endpoint: further attempts after a time-out or from a server that is busy."""
    max_in_flight: PositiveCount = 8
    """Of kind endpoint: requests at the same time."""
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Of kind endpoint: what the server calls the limit of new tokens."""
    cache: str | None = None
    """Of kind endpoint: file that keeps the replies, so that nothing is paid for twice; null keeps
    them in the run's folder."""
    max_new_tokens: PositiveCount | None = None
    """Longest reply, in tokens; null is the rollout's limit for critiques and revisions, and 16 for
    a verdict."""
    temperature: NonNegative | None = None
    """Of its replies, 0 is greedy; null is the rollout's for critiques and revisions, and 0 for a
    verdict."""

    @model_validator(mode="after")
    def _options_apply(self) -> ChatModelConfig:
        raise_problems("judge", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        for key in _REQUIRED[self.kind]:
            if getattr(self, key) is None:
                yield problem((key,), f"required by kind: {self.kind}, but missing")
        for key, kinds in _KINDS_WITH.items():
            if self.kind not in kinds and getattr(self, key) != _default(key):
                yield problem((key,), f"applies to kind: {' or '.join(kinds)} only; remove it")


def _default(key: str) -> object:
    default: object = ChatModelConfig.model_fields[key].default
    return default


class ConstitutionalConfig(MethodConfig):
    """Answers criticised and revised by the principles of a constitution: the supervised stage of
    Constitutional AI (Bai et al. 2022).

    A row is a demonstration (`completion`, the revision) and a preference (`chosen`, the revision,
    over `rejected`, the first answer) at once.
    """

    NEEDS: ClassVar[Needs] = Needs(rollout=True, rewards="none", reference="never", makes="data")

    type: Literal["constitutional"]
    """The method."""
    steps: PositiveCount | None = None
    """Rounds of sampling; null goes through the prompts once."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one round of sampling."""
    samples_per_prompt: PositiveCount = 1
    """First answers sampled for each prompt, each revised by itself."""
    constitution: str = "plain"
    """A constitution file, or the name of a shipped one."""
    rounds: PositiveCount = 1
    """Critiques and revisions of an answer, each by a principle drawn at random, each from the
    revision before."""
    judge: ChatModelConfig = ChatModelConfig()
    """The model that criticises and revises."""
    keep_cut_off: Bool = False
    """Keep revisions of first answers that were cut off, too: `rejected` then ends in
    mid-sentence, which a preference method would take for what is wrong with it."""

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def describe_counts(self) -> list[str]:
        return [
            _sampled(self.prompts_per_step, self.samples_per_prompt, self.steps),
            f"each criticised and revised {many(self.rounds, 'time')}; at most "
            f"{many(self.completions_per_step, 'row')} a round",
        ]


class AIFeedbackConfig(MethodConfig):
    """Pairs of answers, labelled by a language model that compares them in both orders: preferences
    for DPO and reward models, without people (Bai et al. 2022, Lee et al. 2023).

    With rewards, the better answer of a pair by the rewards is the gold label that the judge is
    measured against; the rewards decide nothing.
    """

    NEEDS: ClassVar[Needs] = Needs(
        rollout=True, rewards="optional", reference="never", makes="data"
    )

    type: Literal["ai_feedback"]
    """The method."""
    steps: PositiveCount | None = None
    """Rounds of sampling; null goes through the prompts once."""
    prompts_per_step: PositiveCount
    """Distinct prompts of one round of sampling."""
    pairs_per_prompt: PositiveCount = 1
    """Pairs for each prompt, of two answers sampled for this pair."""
    constitution: str = "plain"
    """A constitution file, or the name of a shipped one; a principle is drawn for each pair."""
    judge: ChatModelConfig = ChatModelConfig()
    """The model that compares."""
    verdict: Literal["text", "logprobs"] = "text"
    """`text`: the judge says A, B or tie. `logprobs`: it is the likelier of A and B as its answer,
    for small models that do not keep to a form; not from an endpoint."""
    require_consistent: Bool = True
    """Keep a pair only if both orders give the same verdict. Without it, verdict logprobs goes by
    the mean of both orders."""
    min_margin: NonNegative = 0.0
    """With verdict logprobs: leave out pairs whose log-probabilities differ by no more than this,
    in nats, in the mean of both orders."""
    keep_cut_off: Bool = False
    """Compare answers that were cut off, too."""

    @model_validator(mode="after")
    def _options_apply(self) -> AIFeedbackConfig:
        raise_problems("algorithm", self._problems())
        return self

    def _problems(self) -> Iterator[InitErrorDetails]:
        if self.verdict == "text":
            if not self.require_consistent:
                yield problem(
                    ("require_consistent",),
                    "of two verdicts in text that differ neither counts for more; keep it true, or "
                    "use verdict: logprobs",
                )
            if self.min_margin > 0.0:
                yield problem(("min_margin",), "applies to verdict: logprobs only; remove it")
            return
        if self.judge.kind == "endpoint":
            yield problem(
                ("verdict",),
                "an endpoint gives no log-probabilities of given answers; use text, or a judge of "
                "kind policy or local",
            )
        for key in ("max_new_tokens", "temperature"):
            if getattr(self.judge, key) is not None:
                yield problem(
                    ("judge", key), "with verdict: logprobs nothing is sampled; remove it"
                )

    @property
    def completions_per_step(self) -> int:
        return 2 * self.prompts_per_step * self.pairs_per_prompt

    def describe_counts(self) -> list[str]:
        pairs = self.prompts_per_step * self.pairs_per_prompt
        return [
            _sampled(self.prompts_per_step, 2 * self.pairs_per_prompt, self.steps),
            f"{many(pairs, 'pair')} a round, each shown to the judge in both orders",
        ]


def _sampled(prompts: int, samples: int, steps: int | None) -> str:
    rounds = "one pass over the prompts" if steps is None else many(steps, "round")
    total = many(prompts * samples, "sample")
    return f"{many(prompts, 'prompt')} x {many(samples, 'answer')} = {total} a round; {rounds}"
