"""The few frozen types that carry data between the parts of the toolkit.

Nothing here imports torch: a `Sample` is token ids in tuples, and becomes tensors only inside the
scorer. The words are those of the papers; `docs/architecture.md` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class AlignmentError(Exception):
    """Something the toolkit cannot go on with. The message names the thing and the remedy."""


class UserInputError(AlignmentError):
    """The user's recipe, data, model or arguments are wrong: exit code 2.

    The message names the thing (file, line, dotted path), what is wrong with it, and what to do.
    """


class Outcome(StrEnum):
    """What became of grading one completion.

    `TIMEOUT` and `CRASH` say that the *grader* failed: there is no score, and the sample is left
    out of the loss and counted. `UNPARSEABLE` says that the *completion* had no answer in the
    asked form, which is the policy's doing and is scored. `SCORED` is a reward without a notion
    of right and wrong, such as sentiment.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    CRASH = "crash"
    SCORED = "scored"

    @property
    def is_failure(self) -> bool:
        """True where the grader failed, so that no score exists."""
        return self in (Outcome.TIMEOUT, Outcome.CRASH)


class StopReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # an end token or a stop string, which is part of the completion
    LENGTH = "length"  # cut off at max_new_tokens or at the end of the context


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenized once and never again.

    token_ids: the rendered prompt's ids, as the policy is conditioned on them.
    text:      the rendered prompt, for people.
    index:     its place in the stream of prompts this run draws. Unique within a run; the sampling
               random numbers depend on it.
    row:       the data row it came from (answer, messages, ...): what rewards look at.
    place:     the words that name that row in messages, such as "train.jsonl:4"; "" if unknown.
    """

    token_ids: tuple[int, ...]
    text: str
    index: int
    row: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def row_name(self) -> str:
        """What messages call its row: by its place, which is the user's, and else by `index`."""
        return self.place or f"the row of prompt {self.index}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. `top_k=0`, `top_p=1.0` and `min_p=0.0` mean off; `temperature=0.0`
    means greedy. Transforms apply in the order temperature, top-k, top-p, min-p.

    `seed` and `step` are the first two counters of the random numbers: the number drawn for a
    token depends on (seed, step, prompt.index, sample index, token position) and on nothing else.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    step: int = 0

    @property
    def truncates_support(self) -> bool:
        """True where some tokens can get probability zero."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    prompt_index:      `Prompt.index` of its prompt.
    sample_index:      0 .. n-1 among the completions of that prompt.
    token_ids:         sampled ids, the stop token included.
    sampling_logprobs: log-probability of each token under the distribution *actually sampled*.
    stop_reason:       stop or length.
    policy_version:    the weights sampled from (number of optimizer updates behind them).
    text:              decoded without special tokens.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    stop_reason: StopReason
    policy_version: int
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One row to train on or to score: a prompt, a completion, and which completion tokens count.

    loss_mask has one flag per completion token. Samples with equal `prompt_ids` share the
    prompt's computation inside the scorer; nothing needs to be declared for that.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.loss_mask) != len(self.completion_ids):
            raise AlignmentError(
                f"a Sample's loss_mask has {len(self.loss_mask)} flags for "
                f"{len(self.completion_ids)} completion tokens; give one flag per token"
            )

    @property
    def n_loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Preference pairs: `chosen[i]` was preferred to `rejected[i]`; both answer the same prompt.

    `margins[i]` says by how much, where somebody rated it; empty where nobody did.
    """

    chosen: tuple[Sample, ...]
    rejected: tuple[Sample, ...]
    margins: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.chosen) != len(self.rejected):
            raise AlignmentError(
                f"{len(self.chosen)} chosen and {len(self.rejected)} rejected samples do not pair"
            )
        if self.margins and len(self.margins) != len(self.chosen):
            raise AlignmentError(
                f"{len(self.margins)} margins for {len(self.chosen)} pairs; give one a pair or none"
            )

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """A completion somebody found desirable or not, without a partner to compare with (KTO)."""

    sample: Sample
    desirable: bool


STEP_SEPARATOR = "\n"
"""What stands between two steps of an answer where nothing else is said."""

GOOD_STEP = 0.5
"""A step is good from this label, and judged good from this probability, upwards."""


@dataclass(frozen=True, slots=True)
class SteppedSample:
    """A completion in steps, each with a label (process supervision).

    `sample.loss_mask` is True at the last token of each labelled step; `labels` has one value for
    each of those tokens, in order: 1.0 for a good step, 0.0 for a bad one, or between.
    """

    sample: Sample
    labels: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != self.sample.n_loss_tokens:
            raise AlignmentError(
                f"a SteppedSample has {len(self.labels)} labels for {self.sample.n_loss_tokens} "
                "marked step ends; give one label per step"
            )


@dataclass(frozen=True, slots=True)
class Score:
    """One reward's verdict on one completion. `value` is None exactly where the grader failed."""

    value: float | None
    outcome: Outcome = Outcome.SCORED
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != self.outcome.is_failure:
            raise AlignmentError(
                f"a Score of outcome {self.outcome.value!r} came with value {self.value!r}: the "
                "value is None exactly where the grader failed (timeout, crash)"
            )


@dataclass(frozen=True, slots=True)
class RewardedCompletion:
    """A completion with what the rewards said: the weighted sum, and each part by name.

    `reward` is None where a part that counts failed: the sample is left out of the loss.
    """

    prompt: Prompt
    completion: Completion
    reward: float | None
    outcome: Outcome
    parts: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one step sampled: completions in prompt-major order, `group_size` per prompt.

    `dropped` are sampled and graded too, but not trained on (dynamic sampling left them out).
    """

    items: tuple[RewardedCompletion, ...]
    group_size: int
    step: int
    dropped: tuple[RewardedCompletion, ...] = ()
