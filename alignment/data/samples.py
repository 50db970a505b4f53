"""Samples for supervised fine-tuning, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.chat import LossOn
from alignment.data.control import Tokenizer
from alignment.data.encode import RowEncoder
from alignment.data.formats import demonstration_of, has_content, is_blank_question
from alignment.data.places import WHOLE_SOURCE, Places
from alignment.data.prompts import Style
from alignment.data.report import BLANK_PROMPT, NOTHING_TO_TRAIN_ON, DataReport, Tally, TooLong
from alignment.types import Sample


def build_samples(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    loss_on: LossOn = "assistant",
    max_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system: str | None = None,
    style: Style = "auto",
    template_options: Mapping[str, Any] | None = None,
    places: Places = WHOLE_SOURCE,
) -> tuple[list[Sample], DataReport]:
    """Tokenize demonstrations, with a mask of the tokens to learn.

    Args:
        rows: see `alignment.data.formats`.
        tokenizer: with its chat template.
        loss_on: every assistant turn, or the last one. Of a row with a prompt and a completion,
            the prompt is never in the loss.
        max_tokens: longest prompt and completion together.
        too_long: what to do with a longer row: `truncate` cuts the completion's end, and drops a
            row that keeps no scored token; `drop` drops it; `error` raises. Dropped rows are
            counted.
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
        prompt, completion = demonstration_of(row, chat=encoder.chat, where=where)
        if not has_content(completion):
            tally.drop(index, NOTHING_TO_TRAIN_ON)
            continue
        if is_blank_question(prompt, completion):
            tally.drop(index, BLANK_PROMPT)
            continue
        whole = encoder.encode(prompt, completion, loss_on=loss_on, where=where)
        sample, reason = encoder.fit(whole, where)
        if sample is None:
            tally.drop(index, reason)
            continue
        tally.keep(index, truncated=sample is not whole)
        samples.append(sample)
    return samples, tally.report()
