"""Samples for supervised fine-tuning and preference pairs, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.chat import ChatEncoder, LossOn
from alignment.data.control import Tokenizer
from alignment.data.formats import (
    Turns,
    demonstration_of,
    name_row,
    preference_of,
    wants_chat,
)
from alignment.data.prompts import Style, with_system
from alignment.data.report import (
    NOTHING_TO_TRAIN_ON,
    PROMPT_TOO_LONG,
    TOO_LONG,
    DataReport,
    Tally,
    TooLong,
)
from alignment.types import PairBatch, Sample, UserInputError


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

    Raises:
        UserInputError: a malformed row (named), a row over the limit under `error`, or no row
            left.
    """
    encoder = ChatEncoder(tokenizer, template_options=template_options)
    chat = wants_chat(style, has_template=encoder.has_template)
    tally = Tally()
    samples = []
    for index, row in enumerate(rows):
        where = name_row(index)
        prompt, completion = demonstration_of(row, chat=chat, where=where)
        if not _has_content(completion):
            tally.drop(index, NOTHING_TO_TRAIN_ON)
            continue
        whole = _encode(encoder, prompt, completion, system, loss_on, where)
        sample, reason = fit(whole, max_tokens, too_long, where)
        if sample is None:
            tally.drop(index, reason)
            continue
        tally.keep(index, truncated=sample is not whole)
        samples.append(sample)
    return samples, tally.report()


def build_pairs(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "truncate",
    system: str | None = None,
    style: Style = "auto",
    template_options: Mapping[str, Any] | None = None,
) -> tuple[PairBatch, DataReport]:
    """Tokenize preference pairs; both sides of a pair have the same prompt ids.

    Arguments and errors are those of `build_samples`. A pair is dropped when either side is, or
    when truncation leaves both sides the same.
    """
    encoder = ChatEncoder(tokenizer, template_options=template_options)
    chat = wants_chat(style, has_template=encoder.has_template)
    tally = Tally()
    chosen, rejected = [], []
    for index, row in enumerate(rows):
        where = name_row(index)
        prompt, *answers = preference_of(row, chat=chat, where=where)
        wholes = [_encode(encoder, prompt, a, system, "assistant", where) for a in answers]
        if wholes[0].prompt_ids != wholes[1].prompt_ids:
            raise UserInputError(
                f"{where}: 'chosen' and 'rejected' do not answer the same prompt once rendered; "
                "let both begin with an assistant message"
            )
        fitted = [fit(whole, max_tokens, too_long, where) for whole in wholes]
        better, worse = fitted[0][0], fitted[1][0]
        if better is None or worse is None:
            tally.drop(index, fitted[0][1] or fitted[1][1])
        elif better.completion_ids == worse.completion_ids:
            tally.drop(index, "both sides are the same once truncated")
        else:
            tally.keep(index, truncated=better is not wholes[0] or worse is not wholes[1])
            chosen.append(better)
            rejected.append(worse)
    return PairBatch(tuple(chosen), tuple(rejected)), tally.report()


def fit(
    sample: Sample, max_tokens: int | None, too_long: TooLong, where: str
) -> tuple[Sample | None, str]:
    """The sample within the limit, or None and why not. At least one token stays scored.

    Raises:
        UserInputError: it is over the limit, under `error`.
    """
    length = len(sample.prompt_ids) + len(sample.completion_ids)
    if max_tokens is None or length <= max_tokens:
        return (sample, "") if sample.n_loss_tokens else (None, NOTHING_TO_TRAIN_ON)
    if too_long == "error":
        raise UserInputError(
            f"{where} has {length} tokens ({len(sample.prompt_ids)} of them prompt), more than the "
            f"limit of {max_tokens}; raise max_tokens, or truncate or drop such rows"
        )
    if too_long == "drop":
        return None, TOO_LONG
    room = max(0, max_tokens - len(sample.prompt_ids))
    cut = Sample(sample.prompt_ids, sample.completion_ids[:room], sample.loss_mask[:room])
    return (cut, "") if cut.n_loss_tokens else (None, PROMPT_TOO_LONG)


def _encode(
    encoder: ChatEncoder,
    prompt: Turns,
    completion: Turns,
    system: str | None,
    loss_on: LossOn,
    where: str,
) -> Sample:
    if isinstance(prompt, str) or isinstance(completion, str):
        plain = with_system(str(prompt), system, where)
        return encoder.plain(str(plain), str(completion), where=where)
    context = with_system(prompt, system, where) if prompt else []
    messages = [*context, *completion]
    if not context:
        messages = list(with_system(completion, system, where))  # a whole conversation
    return encoder.conversation(messages, loss_on=loss_on, n_context=len(context), where=where)


def _has_content(completion: Turns) -> bool:
    """Whether an assistant says anything in it."""
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(
        message["role"] == "assistant"
        and (message.get("tool_calls") or str(message.get("content") or "").strip())
        for message in completion
    )
