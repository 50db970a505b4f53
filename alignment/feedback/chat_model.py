"""What a language model that gives feedback is: conversations in, typed replies out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from alignment.types import AlignmentError

Message = Mapping[str, Any]
Conversation = Sequence[Message]


class Failure(StrEnum):
    """Why there is no usable reply. `NONE` is false, every other member true."""

    NONE = ""
    TIMEOUT = "timeout"  # no answer within the time limit
    UNREACHABLE = "unreachable"  # nobody there, or the connection broke
    UNAVAILABLE = "unavailable"  # the server was there, but overloaded or broken
    REFUSED = "refused"  # the request or the conversation was not accepted
    GARBAGE = "garbage"  # an answer that is not a chat completion
    CUT_OFF = "cut_off"  # the token limit came before the end; the text may be empty
    UNPARSEABLE = "unparseable"  # a text without what was asked for, such as a verdict
    NOT_FINITE = "not_finite"  # log-probabilities that are NaN or infinite


_REMEDIES = {
    Failure.TIMEOUT: "allow it more time, or fewer requests at once",
    Failure.UNREACHABLE: "check that the server runs and that the address is right",
    Failure.UNAVAILABLE: "send fewer requests at once, or allow more retries",
    Failure.REFUSED: "correct the model name, the key or the conversations",
    Failure.GARBAGE: "check that the address is that of an OpenAI-compatible API (often .../v1)",
    Failure.CUT_OFF: "allow more new tokens",
    Failure.UNPARSEABLE: "use a model that follows the asked form, or compare log-probabilities",
    Failure.NOT_FINITE: "compute in a wider number format (algorithm.judge.dtype: float32), or use "
    "a model whose weights are sound",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply to one conversation.

    text:    the reply; None where there is none. A reply that was cut off has a text as well.
    failure: why it is not usable; `Failure.NONE` where it is.
    detail:  for people: what happened.
    """

    text: str | None
    failure: Failure = Failure.NONE
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) != (self.failure not in (Failure.NONE, Failure.CUT_OFF)):
            raise AlignmentError(
                f"a Reply of failure {self.failure.value!r} came with text {self.text!r}: the text "
                "is None exactly where there was no reply"
            )


class ChatModel(Protocol):
    """A language model that answers conversations.

    `name` is what messages call it.
    """

    name: str

    def reply(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        """One reply for each conversation, in order.

        What goes wrong with one conversation is the `failure` of its reply and leaves the others
        alone. Conversations that occur several times get replies drawn separately.
        """
        ...


@dataclass(frozen=True, slots=True)
class ContinuationScores:
    """log p of each continuation of one conversation, in nats; none where it failed."""

    logprobs: tuple[float, ...]
    failure: Failure = Failure.NONE
    detail: str = ""


@runtime_checkable
class ContinuationScorer(Protocol):
    """A chat model that also says how likely given answers are."""

    def score(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[ContinuationScores]:
        """Of each conversation, log p(continuation) as the beginning of the next answer."""
        ...


class Failable(Protocol):
    """What can have failed in one of the ways of `Failure`: a reply, a judgement, a revision."""

    @property
    def failure(self) -> Failure: ...

    @property
    def detail(self) -> str: ...


def check_failures(results: Sequence[Failable], limit: float = 0.2, what: str = "") -> None:
    """Stop where more than a share `limit` of the results failed.

    Args:
        results: replies, judgements or revisions, the good ones included.
        limit: the share of failures allowed.
        what: what failed and who was asked, such as "replies of " with the model's `name`.

    Raises:
        AlignmentError: with the count of each class of failure, an example, and the remedy.
    """
    failed = [result for result in results if result.failure]
    if not results or len(failed) / len(results) <= limit:
        return
    counts = Counter(result.failure for result in failed).most_common()
    listed = ", ".join(f"{failure.value}: {count}" for failure, count in counts)
    example = next(result for result in failed if result.failure is counts[0][0])
    raise AlignmentError(
        f"{what or 'replies'}: {len(failed)} of {len(results)} failed, over the limit of "
        f"{limit:.0%} ({listed}). Example, {example.failure.value}: "
        f"{example.detail or 'no detail'}. To go on, {_REMEDIES[counts[0][0]]}; or raise the "
        "allowed share of failures"
    )


def occurrences(conversations: Sequence[Conversation]) -> Iterator[tuple[int, int]]:
    """For each conversation, a number of its content and how often it came before.

    With these as counters of random numbers, a reply depends on what was asked and not on what
    else was asked in the same call. The number is the first 62 bits of a SHA-256.
    """
    seen: Counter[int] = Counter()
    for conversation in conversations:
        text = json.dumps([dict(message) for message in conversation], sort_keys=True, default=repr)
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2
        yield number, seen[number]
        seen[number] += 1


def derived_seed(seed: int, *counters: int) -> int:
    """A seed in [0, 2**31) that depends on all of the arguments; most servers take no larger."""
    text = ",".join(map(str, (seed, *counters)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def transcript(messages: Conversation) -> str:
    """A conversation as text to quote to a model: a line "Role: content" for each message."""
    return "\n".join(f"{str(m['role']).capitalize()}: {m.get('content', '')}" for m in messages)
