"""Prompts for sampling, from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from alignment.data.chat import ChatEncoder
from alignment.data.control import Tokenizer
from alignment.data.formats import Turns, is_blank_question, prompt_of, wants_chat
from alignment.data.order import DataOrder
from alignment.data.places import WHOLE_SOURCE, Places
from alignment.data.report import BLANK_PROMPT, PROMPT_TOO_LONG, DataReport, Tally
from alignment.types import Prompt, UserInputError

Style = Literal["auto", "chat", "plain"]


def build_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    max_prompt_tokens: int | None = None,
    too_long: Literal["drop", "error"] = "drop",
    style: Style = "auto",
    template_options: Mapping[str, Any] | None = None,
    places: Places = WHOLE_SOURCE,
) -> tuple[list[Prompt], DataReport]:
    """Tokenize the prompt of every row, once and for all.

    A prompt is never truncated: half a question has no right answer. `Prompt.index` is the row's
    index; `draw_prompts` replaces it by the draw's.

    Args:
        rows: see `alignment.data.formats`.
        tokenizer: with its chat template.
        system: a system message for conversations that do not begin with one.
        max_prompt_tokens: longest prompt.
        too_long: what to do with a longer one: drop and count it, or raise.
        style: `chat` renders strings with the chat template, `plain` never does, `auto` does if
            there is a template.
        template_options: keyword arguments of the chat template.
        places: where the rows stand in their source, for messages.

    Raises:
        UserInputError: a malformed row (named), a prompt over the limit under `error`, or no row
            left.
    """
    encoder = ChatEncoder(tokenizer, template_options=template_options)
    chat = wants_chat(style, has_template=encoder.has_template)
    tally = Tally(places)
    prompts = []
    for index, row in enumerate(rows):
        where = places.name(index)
        turns = with_system(prompt_of(row, chat=chat, where=where), system, where)
        if is_blank_question(turns):
            tally.drop(index, BLANK_PROMPT)
            continue
        ids, text = encoder.prompt(turns, where=where)
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            if too_long == "error":
                raise UserInputError(
                    f"{where}: the prompt has {len(ids)} tokens, more than the limit of "
                    f"{max_prompt_tokens}; raise max_prompt_tokens, or drop such rows"
                )
            tally.drop(index, PROMPT_TOO_LONG)
            continue
        tally.keep(index)
        prompts.append(Prompt(token_ids=ids, text=text, index=index, row=row, place=where))
    return prompts, tally.report()


def prompt_column(row: Mapping[str, Any]) -> Any:
    """What a row asks, as it stands in the data: the `prompt` column of a row made from this one.

    Raises:
        UserInputError: the row has no prompt.
    """
    for column in ("prompt", "question"):
        if column in row:
            return row[column]
    return prompt_of(row, chat=True)


def draw_prompts(prompts: Sequence[Prompt], order: DataOrder, k: int) -> list[Prompt]:
    """The next `k` prompts of `order`, with `index` set to the draw's: unique within a run."""
    return [replace(prompts[row], index=draw) for draw, row in order.take(k)]


def with_system(turns: Turns, system: str | None, where: str) -> Turns:
    """`turns` with a system message in front, unless there is one.

    Raises:
        UserInputError: a system message for plain text.
    """
    if system is None:
        return turns
    if isinstance(turns, str):
        raise UserInputError(
            f"{where}: a system message needs a chat template, and the prompt is plain text; "
            "remove the system message, or set model.chat_template"
        )
    if turns and turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]
