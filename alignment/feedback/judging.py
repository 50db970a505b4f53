"""Which of two answers is better, as a language model sees it, whichever stands first.

Judges favour a position (Zheng et al. 2023, "Judging LLM-as-a-judge"), so every pair is shown
twice, the second time with the answers swapped. What both showings agree on is a preference; what
they disagree on says something about the judge and nothing about the answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from alignment.feedback.chat_model import (
    ChatModel,
    ContinuationScorer,
    Conversation,
    Failure,
    Message,
    transcript,
)
from alignment.types import UserInputError

Preference = Literal["first", "second"]
Verdict = Literal["first", "second", "tie"]
How = Literal["text", "logprobs"]

_SHOWN = """Two answers to the same conversation are compared.

[Principle]
{principle}

[Conversation]
{conversation}

[Answer A]
{a}

[Answer B]
{b}

By the principle, which answer is better? {form}"""

_FORMS: dict[How, str] = {
    "text": "Reply with one word and nothing else: A, B, or tie.",
    "logprobs": "Reply with one letter and nothing else: A or B.",
}
_LABELLED = re.compile(r"(?i:answer|verdict)(?:\s*:\s*|\s+)(.+)")
_AROUND = " \t\r\n*_`\"'()[]."
_SWAPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}


class Comparison(NamedTuple):
    """Two answers to the same conversation; any tuple of the three will do."""

    question: Sequence[Message]
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge made of one comparison.

    preferred:  the better answer. None where the judge failed, was indifferent, or, asked for
                text, gave different verdicts in the two orders.
    consistent: both orders gave the same verdict.
    failure:    why there is no judgement. One order that failed is enough.
    verdicts:   what the judge said, with `first` shown first and with `second` shown first; None
                where it said nothing.
    margin:     log p(first is better) - log p(second is better), the mean of both orders; None
                where the judge answered in text.
    """

    preferred: Preference | None
    consistent: bool
    failure: Failure = Failure.NONE
    verdicts: tuple[Verdict | None, Verdict | None] = (None, None)
    margin: float | None = None
    detail: str = ""

    @property
    def usable(self) -> bool:
        """True where the judge prefers the same answer in both orders."""
        return self.consistent and self.preferred is not None


class _Reading(NamedTuple):
    """One showing's outcome: a verdict on (shown first, shown second), or a failure.

    margin: log p("A") - log p("B").
    """

    verdict: Verdict | None
    failure: Failure = Failure.NONE
    detail: str = ""
    margin: float | None = None


def judge_pairs(
    chat_model: ChatModel,
    items: Sequence[Comparison | tuple[Sequence[Message], str, str]],
    *,
    principle: str | Sequence[str],
    seed: int,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    verdict: How = "text",
) -> list[Judgement]:
    """Judge each comparison in both orders.

    Args:
        principle: what makes an answer better: one for all, or one for each comparison.
        verdict: `text`: the judge answers "A", "B" or "tie", and anything else is unparseable.
            `logprobs`: the likelier of "A" and "B" as its next answer, for small models that do
            not keep to a form. Averaging the margin over both orders removes a constant leaning
            towards a letter or a position:
            margin = ((l_A - l_B) + (l'_B - l'_A)) / 2, with l' of the swapped order.
        seed, max_new_tokens, temperature: of the judge's answers in text.

    Raises:
        UserInputError: `logprobs` of a model that has none (an endpoint), or another number of
            principles than of comparisons.
    """
    principles = [principle] * len(items) if isinstance(principle, str) else list(principle)
    if len(principles) != len(items):
        raise UserInputError(
            f"{len(principles)} principles for {len(items)} comparisons; give one, or one for each"
        )
    showings = [
        _show(Comparison(*item), text, verdict, swapped=swapped)
        for item, text in zip(items, principles, strict=True)
        for swapped in (False, True)
    ]
    if verdict == "text":
        readings = _ask(chat_model, showings, max_new_tokens, temperature, seed)
    else:
        readings = _compare(chat_model, showings)
    pairs = zip(readings[::2], readings[1::2], strict=True)
    return [_COMBINE[verdict](in_order, swapped) for in_order, swapped in pairs]


def parse_verdict(text: str) -> Verdict | None:
    """The verdict in a judge's answer, or None.

    That is "A", "B" or "tie" as the whole answer, or in a last line "Verdict: ...". "first" is
    what was shown as A.
    """
    lines = [line.strip(_AROUND) for line in text.splitlines() if line.strip(_AROUND)]
    if not lines:
        return None
    labelled = _LABELLED.fullmatch(lines[-1])
    if len(lines) > 1 and labelled is None:
        return None
    word = (labelled[1] if labelled else lines[-1]).strip(_AROUND)
    if word.lower() == "tie":
        return "tie"
    words: dict[str, Verdict] = {"A": "first", "B": "second"}
    return words.get(word)


def _show(item: Comparison, principle: str, verdict: How, *, swapped: bool) -> Conversation:
    a, b = (item.second, item.first) if swapped else (item.first, item.second)
    shown = _SHOWN.format(
        principle=principle.strip(),
        conversation=transcript(item.question),
        a=a.strip(),
        b=b.strip(),
        form=_FORMS[verdict],
    )
    return [{"role": "user", "content": shown}]


def _ask(
    chat_model: ChatModel,
    showings: Sequence[Conversation],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[_Reading]:
    replies = chat_model.reply(
        showings, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    readings = []
    for reply in replies:
        if reply.failure or reply.text is None:
            readings.append(_Reading(None, reply.failure, reply.detail))
            continue
        verdict = parse_verdict(reply.text)
        if verdict is None:
            detail = f"no verdict in {reply.text[:200]!r}"
            readings.append(_Reading(None, Failure.UNPARSEABLE, detail))
        else:
            readings.append(_Reading(verdict))
    return readings


def _compare(chat_model: ChatModel, showings: Sequence[Conversation]) -> list[_Reading]:
    if not isinstance(chat_model, ContinuationScorer):
        raise UserInputError(
            f"{chat_model.name} gives no log-probabilities of given answers; let it answer in "
            "text (verdict='text'), or judge with a local model"
        )
    readings = []
    for scores in chat_model.score(showings, ("A", "B")):
        if scores.failure:
            readings.append(_Reading(None, scores.failure, scores.detail))
        else:
            readings.append(_read_margin(*scores.logprobs))
    return readings


def _read_margin(a: float, b: float) -> _Reading:
    margin = a - b
    if not math.isfinite(margin):
        detail = f"log p is {a} of the answer A and {b} of B"
        return _Reading(None, Failure.NOT_FINITE, detail)
    return _Reading(_sign(margin), margin=margin)


def _sign(margin: float) -> Verdict:
    if margin == 0.0:
        return "tie"
    return "first" if margin > 0.0 else "second"


def _combine_verdicts(in_order: _Reading, swapped: _Reading) -> Judgement:
    verdicts = (in_order.verdict, _unswapped(swapped.verdict))
    failed = next((reading for reading in (in_order, swapped) if reading.failure), None)
    if failed is not None:
        return Judgement(None, False, failed.failure, verdicts, detail=failed.detail)
    consistent = verdicts[0] == verdicts[1]
    return Judgement(_preferred(verdicts[0]) if consistent else None, consistent, verdicts=verdicts)


def _combine_margins(in_order: _Reading, swapped: _Reading) -> Judgement:
    if in_order.margin is None or swapped.margin is None:
        return _combine_verdicts(in_order, swapped)
    margin = (in_order.margin - swapped.margin) / 2
    verdicts = (in_order.verdict, _unswapped(swapped.verdict))
    return Judgement(
        preferred=_preferred(_sign(margin)),
        consistent=verdicts[0] == verdicts[1],
        verdicts=verdicts,
        margin=margin,
    )


_COMBINE: dict[How, Callable[[_Reading, _Reading], Judgement]] = {
    "text": _combine_verdicts,
    "logprobs": _combine_margins,
}


def _preferred(verdict: Verdict | None) -> Preference | None:
    return None if verdict == "tie" else verdict


def _unswapped(verdict: Verdict | None) -> Verdict | None:
    return None if verdict is None else _SWAPPED[verdict]
