"""Completions labelled desirable or undesirable, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.control import Tokenizer
from alignment.data.encode import RowEncoder
from alignment.data.formats import detect, has_content, is_blank_question, labelled_of
from alignment.data.pairs import Side, fitted, sides_of
from alignment.data.places import WHOLE_SOURCE, Places
from alignment.data.prompts import Style
from alignment.data.report import BLANK_PROMPT, NOTHING_TO_TRAIN_ON, DataReport, Tally, TooLong
from alignment.types import LabelledSample


def build_labelled(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system: str | None = None,
    style: Style = "auto",
    template_options: Mapping[str, Any] | None = None,
    places: Places = WHOLE_SOURCE,
) -> tuple[list[LabelledSample], DataReport]:
    """Tokenize completions that somebody found desirable or not (KTO).

    A labelled row gives one sample. A preference row gives two, its chosen side as desirable and
    its rejected side as undesirable; the report counts it twice, once for each side, and drops
    both where the two could not be compared (`alignment.data.pairs.sides_of`). Where only one of
    them is too long, the other is used alone.

    Args:
        rows: see `alignment.data.formats`.
        tokenizer: with its chat template.
        max_tokens: longest prompt and completion together.
        too_long: what to do with a longer one: `truncate` cuts the completion's end, and drops
            one of which nothing is left; `drop` drops it; `error` raises.
        system: a system message for conversations that do not begin with one.
        style: `chat`, `plain`, or `auto`: chat if the tokenizer has a template.
        template_options: keyword arguments of the chat template.
        places: where the rows stand in their source, for messages.

    Raises:
        UserInputError: a malformed row (named), a row over the limit under `error`, or no row
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
    samples = []
    for index, row in enumerate(rows):
        where = places.name(index)
        for side, desirable in _judged(encoder, row, where):
            if side.sample is None:
                tally.drop(index, side.reason)
                continue
            tally.keep(index, truncated=side.truncated)
            samples.append(LabelledSample(side.sample, desirable))
    return samples, tally.report()


def _judged(encoder: RowEncoder, row: Mapping[str, Any], where: str) -> list[tuple[Side, bool]]:
    """(answer, whether it is desirable) for each answer of a row."""
    if detect(row, where=where) == "preference":
        chosen, rejected = sides_of(encoder, row, where)
        return [(chosen, True), (rejected, False)]
    prompt, completion, desirable = labelled_of(row, chat=encoder.chat, where=where)
    if is_blank_question(prompt):
        return [(Side(None, BLANK_PROMPT), desirable)]
    if not has_content(completion):
        return [(Side(None, NOTHING_TO_TRAIN_ON), desirable)]
    whole = encoder.encode(prompt, completion, where=where)
    return [(fitted(encoder, whole, where), desirable)]
