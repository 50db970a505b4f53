"""Prompts with completions to samples, under one set of options: what all builders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.data.chat import ChatEncoder, LossOn
from alignment.data.control import Tokenizer
from alignment.data.formats import Message, Turns, wants_chat
from alignment.data.prompts import Style, with_system
from alignment.data.report import NOTHING_TO_TRAIN_ON, PROMPT_TOO_LONG, TOO_LONG, TooLong
from alignment.types import Sample, UserInputError


class RowEncoder:
    """Makes a sample of a prompt with a completion, and brings it within the token limit.

    Args: as of `alignment.data.samples.build_samples`.

    Attributes:
        chat: whether texts are rendered with the chat template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int | None,
        too_long: TooLong,
        system: str | None,
        style: Style,
        template_options: Mapping[str, Any] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options = dict(template_options or {})
        self._encoder = ChatEncoder(tokenizer, template_options=template_options)
        self._max_tokens = max_tokens
        self._too_long = too_long
        self._system = system
        self.chat = wants_chat(style, has_template=self._encoder.has_template)

    def encode(
        self, prompt: Turns, completion: Turns, *, loss_on: LossOn = "assistant", where: str
    ) -> Sample:
        """The sample, of whatever length. With an empty prompt, a whole conversation.

        Raises:
            UserInputError: they cannot be rendered, or have no prompt.
        """
        if isinstance(prompt, str) or isinstance(completion, str):
            plain = with_system(str(prompt), self._system, where)
            return self._encoder.plain(str(plain), str(completion), where=where)
        context = self._with_system(prompt, where) if prompt else []
        messages = [*context, *completion] if context else self._with_system(completion, where)
        return self._encoder.conversation(
            messages, loss_on=loss_on, n_context=len(context), where=where
        )

    def texts(self, prompt: Turns, completion: Turns, where: str) -> tuple[str, str]:
        """What `encode` tokenizes, as text: the rendered prompt, and what comes behind it."""
        if isinstance(prompt, str) or isinstance(completion, str):
            return str(prompt), str(completion)
        context = self._with_system(prompt, where) if prompt else []
        before = self._encoder.prompt(context, where=where)[1]
        whole = self._tokenizer.apply_chat_template(
            [*context, *completion], tokenize=False, **self._options
        )
        return before, str(whole)[len(before) :]

    def fit(self, sample: Sample, where: str) -> tuple[Sample | None, str]:
        """The sample within the limit, or None and why not. At least one token stays scored.

        Raises:
            UserInputError: it is over the limit, under `error`.
        """
        length = len(sample.prompt_ids) + len(sample.completion_ids)
        limit = self._max_tokens
        if limit is None or length <= limit:
            return (sample, "") if sample.n_loss_tokens else (None, NOTHING_TO_TRAIN_ON)
        if self._too_long == "error":
            raise UserInputError(
                f"{where} has {length} tokens ({len(sample.prompt_ids)} of them prompt), more than "
                f"the limit of {limit}; raise max_tokens, or truncate or drop such rows"
            )
        if self._too_long == "drop":
            return None, TOO_LONG
        room = max(0, limit - len(sample.prompt_ids))
        cut = Sample(sample.prompt_ids, sample.completion_ids[:room], sample.loss_mask[:room])
        return (cut, "") if cut.n_loss_tokens else (None, PROMPT_TOO_LONG)

    def _with_system(self, messages: list[Message], where: str) -> list[Message]:
        begun = with_system(messages, self._system, where)
        return begun if isinstance(begun, list) else messages
