"""Preference pairs, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.control import Tokenizer
from alignment.data.encode import RowEncoder
from alignment.data.formats import (
    Turns,
    has_content,
    is_blank_question,
    margin_of,
    preference_of,
)
from alignment.data.places import WHOLE_SOURCE, Places
from alignment.data.prompts import Style
from alignment.data.report import BLANK_PROMPT, DataReport, Tally, TooLong
from alignment.types import PairBatch, Sample, UserInputError

BLANK_RESPONSE = "a side has a blank response"
NO_COMMON_PROMPT = "there is no 'prompt' column, and the sides do not begin with the same messages"
NOT_THE_PROMPT = "the prompt is not what both sides begin with"
SAME_SIDES = "chosen and rejected are the same"
SAME_ONCE_CUT = "both sides are the same once truncated"


def build_pairs(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system: str | None = None,
    style: Style = "auto",
    template_options: Mapping[str, Any] | None = None,
    places: Places = WHOLE_SOURCE,
) -> tuple[PairBatch, DataReport]:
    """Tokenize preference pairs; both sides of a pair have the same prompt ids.

    A pair that teaches nothing, or something else than it says, is dropped and counted: equal
    sides, a blank side, sides that do not answer the same prompt. Margins are those of the column
    `margin`; the rows have it all or none.

    Args:
        rows: see `alignment.data.formats`.
        tokenizer: with its chat template.
        max_tokens: longest prompt and response together, of either side.
        too_long: what to do with a pair that has a longer side: `truncate` keeps the start of
            both responses, and drops a pair of which nothing, or no difference, is left; `drop`
            drops it; `error` raises.
        system: a system message for conversations that do not begin with one.
        style: `chat`, `plain`, or `auto`: chat if the tokenizer has a template.
        template_options: keyword arguments of the chat template.
        places: where the rows stand in their source, for messages.

    Raises:
        UserInputError: a malformed row (named), a pair over the limit under `error`, or no pair
            left.
    """
    encoder = RowEncoder(
        tokenizer,
        max_tokens=max_tokens,
        too_long=too_long,
        system=system,
        style=style,
        template_options=template_options,
    )
    tally = Tally(places)
    chosen, rejected = [], []
    margins: list[float | None] = []
    for index, row in enumerate(rows):
        where = places.name(index)
        margins.append(margin_of(row, where=where))
        better, worse = sides_of(encoder, row, where)
        if better.sample is None or worse.sample is None:
            tally.drop(index, better.reason or worse.reason)
            continue
        tally.keep(index, truncated=better.truncated or worse.truncated)
        chosen.append(better.sample)
        rejected.append(worse.sample)
    report = tally.report()
    kept_margins = _all_or_none(margins, report)
    return PairBatch(tuple(chosen), tuple(rejected), kept_margins), report


@dataclass(frozen=True, slots=True)
class Side:
    """An answer to a prompt, brought within the token limit.

    sample:    None where it cannot be used.
    reason:    why it cannot.
    truncated: whether it was cut.
    """

    sample: Sample | None
    reason: str = ""
    truncated: bool = False


def fitted(encoder: RowEncoder, whole: Sample, where: str) -> Side:
    """A sample of whatever length within the encoder's limit.

    Raises:
        UserInputError: it is over the limit, under `error`.
    """
    sample, reason = encoder.fit(whole, where)
    return Side(sample, reason, sample is not None and sample is not whole)


def sides_of(encoder: RowEncoder, row: Mapping[str, Any], where: str) -> tuple[Side, Side]:
    """(chosen, rejected) of a preference row, each within the limit.

    Where the two cannot be compared, as text, as tokens or once they are cut, neither can be used,
    for one reason. One alone may be unusable for the limit's sake.

    Raises:
        UserInputError: the row is malformed, or a side is over the limit, under `error`.
    """
    prompt, *answers = preference_of(row, chat=encoder.chat, where=where)
    reason = _unusable(prompt, *answers)
    if reason:
        return _neither(reason)
    better, worse = (encoder.encode(prompt, answer, where=where) for answer in answers)
    if better.prompt_ids != worse.prompt_ids:
        return _neither(NOT_THE_PROMPT)
    if better.completion_ids == worse.completion_ids:
        return _neither(SAME_SIDES)  # what told them apart is nothing that the template renders
    sides = fitted(encoder, better, where), fitted(encoder, worse, where)
    left = [side.sample.completion_ids for side in sides if side.sample is not None]
    return _neither(SAME_ONCE_CUT) if len(left) == 2 and left[0] == left[1] else sides


def _neither(reason: str) -> tuple[Side, Side]:
    return Side(None, reason), Side(None, reason)


def _unusable(prompt: Turns, chosen: Turns, rejected: Turns) -> str:
    """Why two answers to a prompt cannot be compared, or "" if they can."""
    if prompt == []:
        return NO_COMMON_PROMPT
    if is_blank_question(prompt, chosen, rejected):
        return BLANK_PROMPT
    if not (has_content(chosen) and has_content(rejected)):
        return BLANK_RESPONSE
    if chosen == rejected:
        return SAME_SIDES
    if _begins_anew(prompt, chosen) or _begins_anew(prompt, rejected):
        return NOT_THE_PROMPT
    return ""


def _begins_anew(prompt: Turns, side: Turns) -> bool:
    """Whether a side is a conversation of its own rather than the prompt's continuation."""
    if isinstance(prompt, str) or isinstance(side, str):
        return False
    first, last = side[0]["role"], prompt[-1]["role"]
    return bool(first == "system" or (first == "user" and last == "user"))


def _all_or_none(margins: Sequence[float | None], report: DataReport) -> tuple[float, ...]:
    kept = report.kept
    given = [margin for index in kept if (margin := margins[index]) is not None]
    if given and len(given) < len(kept):
        missing = next(index for index in kept if margins[index] is None)
        raise UserInputError(
            f"{report.places.name(missing)} has no margin, and other rows have one; give every "
            "row a number in column 'margin', or remove the column"
        )
    return tuple(given)
