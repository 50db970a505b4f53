"""Preference pairs, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        sides = preference_of(row, chat=encoder.chat, where=where)
        pair = unusable(*sides) or _encode(encoder, *sides, where)
        if isinstance(pair, str):
            tally.drop(index, pair)
            continue
        better, worse, truncated = pair
        tally.keep(index, truncated=truncated)
        chosen.append(better)
        rejected.append(worse)
    report = tally.report()
    kept_margins = _all_or_none(margins, report)
    return PairBatch(tuple(chosen), tuple(rejected), kept_margins), report


def unusable(prompt: Turns, chosen: Turns, rejected: Turns) -> str:
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


def _encode(
    encoder: RowEncoder, prompt: Turns, chosen: Turns, rejected: Turns, where: str
) -> tuple[Sample, Sample, bool] | str:
    """Both sides within the limit, and whether one was cut; or why the pair is dropped."""
    wholes = [encoder.encode(prompt, side, where=where) for side in (chosen, rejected)]
    if wholes[0].prompt_ids != wholes[1].prompt_ids:
        return NOT_THE_PROMPT
    if wholes[0].completion_ids == wholes[1].completion_ids:
        return SAME_SIDES  # what told them apart is nothing that the template renders
    (better, reason), (worse, other_reason) = [encoder.fit(whole, where) for whole in wholes]
    if better is None or worse is None:
        return reason or other_reason
    if better.completion_ids == worse.completion_ids:
        return SAME_ONCE_CUT
    return better, worse, better is not wholes[0] or worse is not wholes[1]


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
