"""Critique and revision by a constitution: the supervised stage of Constitutional AI.

Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", section 3.1: the model answers,
is asked to criticise its answer by a principle drawn at random, and then to write it again; the
next round starts from the revision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.feedback.chat_model import ChatModel, Conversation, Failure, Message, derived_seed
from alignment.feedback.constitution import Constitution, Principle
from alignment.types import UserInputError

_CRITIQUE, _REVISION = 0, 1  # what a reply is for, as a counter of its random numbers


@dataclass(frozen=True, slots=True)
class RevisionStep:
    """One round: the principle's name, the critique, and the revision it led to."""

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True, slots=True)
class Revision:
    """What became of one response.

    response: as it came.
    steps:    the rounds that were completed.
    failure:  why the last round was not, for an item that failed.
    """

    response: str
    steps: tuple[RevisionStep, ...]
    failure: Failure = Failure.NONE
    detail: str = ""

    @property
    def final(self) -> str | None:
        """The last revision; None for an item that failed."""
        return None if self.failure else (self.steps[-1].revision if self.steps else self.response)


@dataclass(frozen=True, slots=True)
class Response:
    """What is to be criticised and revised.

    number:       draws its principles: a response has the same ones whatever is revised with it.
    conversation: what it answers.
    """

    number: int
    conversation: Conversation
    text: str


@dataclass(slots=True)
class _Item:
    """A response on its way. `critique` is that of the round in progress."""

    number: int
    conversation: Conversation
    response: str
    steps: list[RevisionStep] = field(default_factory=list)
    critique: str = ""
    failure: Failure = Failure.NONE
    detail: str = ""

    @property
    def current(self) -> str:
        return self.steps[-1].revision if self.steps else self.response

    def finished(self) -> Revision:
        return Revision(self.response, tuple(self.steps), self.failure, self.detail)


def critique_and_revise(
    chat_model: ChatModel,
    constitution: Constitution,
    responses: Sequence[Response],
    *,
    rounds: int,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[Revision]:
    """Criticise and revise each response for `rounds` rounds.

    An item whose reply failed goes no further; the others do. A critique that was cut off at the
    token limit is used as far as it goes, a revision that was cut off or is empty is a failure.

    Args:
        seed: the principle of a response in a round depends on the seed, the round and its number,
            so that data made in several calls is as if made in one.

    Raises:
        UserInputError: fewer than 0 rounds.
    """
    if rounds < 0:
        raise UserInputError(f"{rounds} rounds of critique and revision; give 0 or more")
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    items = [_Item(one.number, one.conversation, one.text) for one in responses]
    for round_ in range(rounds):
        going = [item for item in items if not item.failure]
        drawn = {item.number: constitution.draw(seed, item.number, round_) for item in going}
        _criticise(
            chat_model, constitution, going, drawn, derived_seed(seed, round_, _CRITIQUE), sampling
        )
        going = [item for item in going if not item.failure]
        _revise(
            chat_model, constitution, going, drawn, derived_seed(seed, round_, _REVISION), sampling
        )
    return [item.finished() for item in items]


def _criticise(
    chat_model: ChatModel,
    constitution: Constitution,
    items: Sequence[_Item],
    drawn: Mapping[int, Principle],
    seed: int,
    sampling: Mapping[str, Any],
) -> None:
    asked = [_critique_request(constitution, item, drawn[item.number]) for item in items]
    replies = chat_model.reply(asked, seed=seed, **sampling)
    for item, reply in zip(items, replies, strict=True):
        item.critique = (reply.text or "").strip()
        if item.critique:
            continue
        if reply.failure:
            item.failure, item.detail = reply.failure, f"critique: {reply.detail}"
        else:
            item.failure, item.detail = Failure.UNPARSEABLE, "the critique is empty"


def _revise(
    chat_model: ChatModel,
    constitution: Constitution,
    items: Sequence[_Item],
    drawn: Mapping[int, Principle],
    seed: int,
    sampling: Mapping[str, Any],
) -> None:
    asked = [_revision_request(constitution, item, drawn[item.number]) for item in items]
    replies = chat_model.reply(asked, seed=seed, **sampling)
    for item, reply in zip(items, replies, strict=True):
        text = (reply.text or "").strip()
        if reply.failure:
            item.failure, item.detail = reply.failure, f"revision: {reply.detail}"
        elif not text:
            item.failure, item.detail = Failure.UNPARSEABLE, "the revision is empty"
        else:
            item.steps.append(RevisionStep(drawn[item.number].name, item.critique, text))


def _critique_request(
    constitution: Constitution, item: _Item, principle: Principle
) -> list[Message]:
    """System messages, the examples as earlier turns, the conversation, and the request."""
    head = [message for message in item.conversation if message["role"] == "system"]
    rest = [message for message in item.conversation if message["role"] != "system"]
    return [
        *head,
        *_examples(constitution),
        *rest,
        _assistant(item.current),
        _user(principle.critique),
    ]


def _revision_request(
    constitution: Constitution, item: _Item, principle: Principle
) -> list[Message]:
    asked = _critique_request(constitution, item, principle)
    return [*asked, _assistant(item.critique), _user(principle.revision)]


def _examples(constitution: Constitution) -> list[Message]:
    turns: list[Message] = []
    for example in constitution.examples:
        principle = constitution.principle(example.principle)
        turns += [
            _user(example.question),
            _assistant(example.response),
            _user(principle.critique),
            _assistant(example.critique),
            _user(principle.revision),
            _assistant(example.revision),
        ]
    return turns


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
