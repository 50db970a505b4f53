"""Answers in labelled steps (process supervision), from rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alignment.data.control import Tokenizer
from alignment.data.encode import RowEncoder
from alignment.data.formats import Turns, is_blank_question, steps_of
from alignment.data.places import WHOLE_SOURCE, Places
from alignment.data.prompts import Style
from alignment.data.report import BLANK_PROMPT, PROMPT_TOO_LONG, DataReport, Tally, TooLong
from alignment.types import STEP_SEPARATOR, Sample, SteppedSample, UserInputError

BLANK_STEP = "a step is blank"
NO_WHOLE_STEP = "no step ends within the limit"
SEPARATOR_IN_STEP = "a step holds the separator; choose one that none holds"
SHARED_TOKEN = "two steps end in the same token"
UNKNOWN_ENDS = "the tokens that end its steps cannot be told"


def build_steps(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    separator: str = STEP_SEPARATOR,
    max_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system: str | None = None,
    style: Style = "auto",
    template_options: Mapping[str, Any] | None = None,
    places: Places = WHOLE_SOURCE,
) -> tuple[list[SteppedSample], DataReport]:
    """Tokenize answers in steps, and mark the last token of each step.

    The steps are joined with `separator` and tokenized as one text, as an answer is that a policy
    writes. A step's last token is the one that holds its last character that is not white space;
    it may hold the start of the separator as well. Whoever reads the answer finds its steps by the
    separator (`text_step_ends`), so that a row is dropped whose steps would be found elsewhere,
    because one of them holds the separator.

    Args:
        rows: see `alignment.data.formats`.
        tokenizer: the fast version (of the `tokenizers` package), with its chat template.
        separator: what stands between two steps.
        max_tokens: longest prompt and answer together.
        too_long: what to do with a longer row: `truncate` cuts the answer's end, and drops a row
            of which no step is left; `drop` drops it; `error` raises.
        system: a system message for conversations that do not begin with one.
        style: `chat`, `plain`, or `auto`: chat if the tokenizer has a template.
        template_options: keyword arguments of the chat template.
        places: where the rows stand in their source, for messages.

    Raises:
        UserInputError: an empty separator, a tokenizer that does not say where its tokens stand in
            the text, a malformed row (named), a row over the limit under `error`, or no row left.
    """
    if not separator:
        raise UserInputError("the separator is empty; give what stands between two steps")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserInputError(
            "steps can only be marked with the fast version of a tokenizer (tokenizer.json), "
            "which says where its tokens stand in the text; use that"
        )
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
        prompt, steps, labels = steps_of(row, chat=encoder.chat, where=where)
        whole = _marked(encoder, tokenizer, prompt, steps, separator, where)
        if isinstance(whole, str):
            tally.drop(index, whole)
            continue
        sample, reason = encoder.fit(whole, where)
        if sample is None:
            tally.drop(index, NO_WHOLE_STEP if reason == PROMPT_TOO_LONG else reason)
            continue
        tally.keep(index, truncated=sample is not whole)
        samples.append(SteppedSample(sample, tuple(labels[: sample.n_loss_tokens])))
    return samples, tally.report()


def text_step_ends(text: str, separator: str) -> list[int]:
    """For each step that a text is read as having, how many characters come up to its end.

    Steps are what stands between separators and is not blank, without white space at its end.
    """
    ends, start = [], 0
    for step in text.split(separator):
        if step.strip():
            ends.append(start + len(step.rstrip()))
        start += len(step) + len(separator)
    return ends


def _marked(
    encoder: RowEncoder,
    tokenizer: Any,
    prompt: Turns,
    steps: Sequence[str],
    separator: str,
    where: str,
) -> Sample | str:
    """The whole answer with its step ends marked, or why it cannot be used."""
    if not all(step.strip() for step in steps):
        return BLANK_STEP
    if is_blank_question(prompt):
        return BLANK_PROMPT
    text = separator.join(steps)
    last_characters = _last_characters(steps, separator)
    if text_step_ends(text, separator) != [at + 1 for at in last_characters]:
        return SEPARATOR_IN_STEP
    answer: Turns = [{"role": "assistant", "content": text}] if encoder.chat else text
    sample = encoder.encode(prompt, answer, where=where)
    starts = _token_starts(tokenizer, sample, text, encoder.texts(prompt, answer, where))
    ends = [bisect_right(starts, at) - 1 for at in last_characters]
    if min(ends) < 0:
        return UNKNOWN_ENDS
    if any(one == other for one, other in pairwise(ends)):
        return SHARED_TOKEN
    marks = set(ends)
    mask = tuple(position in marks for position in range(len(sample.completion_ids)))
    return Sample(sample.prompt_ids, sample.completion_ids, mask)


def _last_characters(steps: Sequence[str], separator: str) -> list[int]:
    """Where in the joined text the last character of each step stands."""
    found, start = [], 0
    for step in steps:
        found.append(start + len(step.rstrip()) - 1)
        start += len(step) + len(separator)
    return found


def _token_starts(
    tokenizer: Any, sample: Sample, text: str, rendered: tuple[str, str]
) -> list[int]:
    """Where in `text` each token of the completion starts, up to the end of `text`.

    Asked again together with offsets, the tokenizer must give the tokens that the sample has: for
    the answer alone, or, where what precedes it matters, for the rendered whole. Where it gives
    others (some tokenizers do when an answer spells out a control token, or a token would straddle
    the border to the prompt), the result is [].
    """
    completion = list(sample.completion_ids)
    before, after = rendered
    spoken = text.strip()  # some templates strip what is said
    once = after.count(spoken) == 1
    origin = after.find(spoken) - (len(text) - len(text.lstrip()))
    alone = [(text, 0)] + [(after[: after.find(spoken) + len(spoken)], origin)] * once
    for candidate, shift in alone:
        ids, starts = _encode(tokenizer, candidate, split_special_tokens=True)
        if ids and completion[: len(ids)] == ids:
            return [start - shift for start in starts]
    ids, starts = _encode(tokenizer, before + after)
    shift = len(before) + origin
    for n_bos in (0, 1) if once else ():  # a plain text's BOS is not part of the text
        first = len(sample.prompt_ids) - n_bos
        n_same = _n_same([*sample.prompt_ids, *completion][n_bos:], ids)
        behind = starts[n_same : n_same + 1]
        if n_same > first and (not behind or behind[0] >= shift + len(text.rstrip())):
            return [start - shift for start in starts[first:n_same]]
    return []


def _n_same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _encode(tokenizer: Any, text: str, **options: Any) -> tuple[list[int], list[int]]:
    """Ids of a text, and the offset at which each token starts."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
