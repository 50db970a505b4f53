"""Conversations and plain texts to token ids and loss masks.

Three rules hold for every template and tokenizer, and are checked on every row:

* the ids of a rendered conversation are those of its text, tokenized without added tokens;
* the ids of a prompt are a prefix of the ids of the prompt with its completion, so that what is
  trained on is what the policy sees when it samples;
* what a user wrote never becomes a control token (`alignment.data.control`).

Masks come from positions in the text, never from the values of ids: a padding token that is also
the end token changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from alignment.data.control import ControlTokens, Tokenizer
from alignment.data.formats import Message
from alignment.types import Sample, UserInputError

LossOn = Literal["assistant", "last_assistant"]


class ChatEncoder:
    """Tokenizes prompts and conversations with one tokenizer.

    Args:
        tokenizer: a `transformers` tokenizer.
        template_options: keyword arguments that the chat template understands, such as
            `enable_thinking`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._options = dict(template_options or {})
        self._control = ControlTokens(tokenizer)
        self._bos = _leading_bos(tokenizer)

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def prompt(
        self, turns: Sequence[Message] | str, *, where: str = "the prompt"
    ) -> tuple[tuple[int, ...], str]:
        """Ids and text of a prompt, ready to be continued by the policy.

        Messages are rendered with the chat template, up to where the assistant's turn begins. A
        string is plain text: no template, and a BOS token where the tokenizer puts one.

        Raises:
            UserInputError: no chat template, messages it rejects, or an empty prompt.
        """
        if isinstance(turns, str):
            text, nonce = self._control.protect_text(turns)
            ids = self._bos + self._control.encode(text, nonce)[0]
        else:
            if turns and turns[-1].get("role") == "assistant":
                raise UserInputError(
                    f"{where}: the last message is the assistant's, so there is nothing to "
                    "answer; end the prompt with a user or tool message"
                )
            protected = self._control.protect(turns)
            nonce = protected.nonce
            text = self._render(protected.messages, where, add_generation_prompt=True)
            ids = self._control.encode(text, nonce)[0]
        if not ids:
            raise UserInputError(f"{where}: the prompt is empty; give it at least one token")
        self._refuse_doubled_bos(ids, where)
        return tuple(ids), self._control.restore(text, nonce)

    def plain(self, prompt: str, completion: str, *, where: str = "the row") -> Sample:
        """A plain-text prompt and completion; EOS ends the completion and is in the loss.

        The prompt's ids are those of `prompt` alone; the completion's are tokenized after it.
        """
        prompt_ids, _ = self.prompt(prompt, where=where)
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserInputError(
                f"{where}: the tokenizer has no EOS token, so a completion could never end; set "
                "tokenizer.eos_token"
            )
        parts = [{"role": "user", "text": prompt}, {"role": "assistant", "text": completion}]
        protected = self._control.protect(parts)
        texts = [str(part["text"]) for part in protected.messages]
        head, tail = self._control.encode("".join(texts), protected.nonce, [len(texts[0])])
        if self._bos + head != list(prompt_ids):
            raise UserInputError(_not_a_prefix(where))
        ids = (*tail, int(eos))
        return Sample(prompt_ids, ids, (True,) * len(ids))

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        loss_on: LossOn = "assistant",
        n_context: int = 0,
        where: str = "the conversation",
    ) -> Sample:
        """A rendered conversation with the assistant's tokens in the loss.

        The prompt is everything before the first scored turn, generation prompt included. The
        completion runs to the end-of-turn token of the last scored turn. Of a scored turn, all
        tokens after the generation prompt count, the end-of-turn token included; what the
        template writes between turns does not.

        Args:
            messages: `{"role", "content"}` and whatever else the template reads.
            loss_on: every assistant turn, or the last one.
            n_context: the first `n_context` messages are context: never scored.

        Raises:
            UserInputError: no assistant turn to score; a template that does not render a
                conversation as an extension of its prompt.
        """
        turns = _scored_turns(messages, loss_on, n_context, where)
        protected = self._control.protect(messages[: turns[-1] + 1])
        text, spans = self._spans(protected.messages, turns, where)
        cuts = [cut for span in spans for cut in span]
        pieces = self._control.encode(text, protected.nonce, cuts)
        prompt_ids, _ = self.prompt(messages[: turns[0]], where=where)
        if tuple(pieces[0]) != prompt_ids:
            raise UserInputError(_not_a_prefix(where))
        ids: list[int] = []
        mask: list[bool] = []
        for number, piece in enumerate(pieces[1:-1]):
            ids += piece
            mask += [number % 2 == 0] * len(piece)
        return Sample(prompt_ids, tuple(ids), tuple(mask))

    def end_of_turn_id(self) -> int | None:
        """The control token that ends an assistant turn of the template; None without one."""
        if not self.has_template:
            return None
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        last = self.conversation(probe, where="a question and its answer").completion_ids[-1]
        return last if last in self._control.ids.values() else None

    def _spans(
        self, messages: Sequence[Message], turns: Sequence[int], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where in it the scored part of each of `turns` lies."""
        text = self._render(messages, where)
        spans = []
        for turn in turns:
            before = self._render(messages[:turn], where, add_generation_prompt=True)
            after = text if turn == turns[-1] else self._render(messages[: turn + 1], where)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserInputError(_not_an_extension(where, turn, is_last=turn == turns[-1]))
            spans.append((len(before), self._end_of_turn(after, len(before))))
        return text, spans

    def _end_of_turn(self, text: str, start: int) -> int:
        """Where the turn that begins at `start` ends: after its last special token, if it has one
        with nothing but white space behind it."""
        last = self._control.last_special(text[start:])
        if last is None or text[start + last.end() :].strip():
            return len(text)
        return start + last.end()

    def _render(
        self, messages: Sequence[Message], where: str, *, add_generation_prompt: bool = False
    ) -> str:
        if not self.has_template:
            raise UserInputError(
                f"{where}: the tokenizer has no chat template to render messages with; set "
                "model.chat_template, or give plain strings"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._options,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserInputError(
                f"{where}: the chat template rejects it: {error}; correct the messages, or give "
                "another template with model.chat_template"
            ) from error
        return str(rendered)

    def _refuse_doubled_bos(self, ids: Sequence[int], where: str) -> None:
        bos = self._tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise UserInputError(
                f"{where}: the prompt begins with two BOS tokens; remove one from the chat template"
            )


def encode_prompt(
    tokenizer: Tokenizer,
    turns: Sequence[Message] | str,
    *,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[tuple[int, ...], str]:
    """`ChatEncoder.prompt`, for one prompt."""
    return ChatEncoder(tokenizer, template_options=template_options).prompt(turns)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    loss_on: LossOn = "assistant",
    template_options: Mapping[str, Any] | None = None,
) -> Sample:
    """`ChatEncoder.conversation`, for one conversation."""
    encoder = ChatEncoder(tokenizer, template_options=template_options)
    return encoder.conversation(messages, loss_on=loss_on)


def encode_plain(tokenizer: Tokenizer, prompt: str, completion: str) -> Sample:
    """`ChatEncoder.plain`, for one pair of texts."""
    return ChatEncoder(tokenizer).plain(prompt, completion)


def stop_token_ids(tokenizer: Tokenizer, generation_config: Any = None) -> tuple[int, ...]:
    """Ids that end a completion: the generation config's EOS ids, the tokenizer's, and the chat
    template's end-of-turn token, each once.

    Raises:
        UserInputError: there is none.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found += [tokenizer.eos_token_id, ChatEncoder(tokenizer).end_of_turn_id()]
    ids = tuple(dict.fromkeys(int(token_id) for token_id in found if token_id is not None))
    if not ids:
        raise UserInputError(
            "neither the generation config nor the tokenizer nor the chat template names a token "
            "that ends a completion; set tokenizer.eos_token"
        )
    return ids


def check_stop_token_trained(
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    *,
    template_options: Mapping[str, Any] | None = None,
) -> None:
    """Check, before training, that a trained assistant turn ends in a token that stops generation.

    Otherwise the policy never learns to stop, or stops at a token that sampling does not honour.
    Without a chat template, plain completions end in EOS, which is checked instead.

    Raises:
        UserInputError: the turn's last scored token is not in `stop_ids`.
    """
    encoder = ChatEncoder(tokenizer, template_options=template_options)
    if encoder.has_template:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        sample = encoder.conversation(probe, where="a question and its answer")
    else:
        sample = encoder.plain("a", "b", where="the tokenizer")
    last = sample.completion_ids[-1]
    if sample.loss_mask[-1] and last in set(stop_ids):
        return
    raise UserInputError(
        f"an assistant turn ends in token {last}, which is not among the tokens that stop "
        f"generation ({sorted(stop_ids)}): the policy would never learn to stop. Give a chat "
        "template that ends the assistant's turn with the EOS token, or add the token that ends "
        "it to the generation config's eos_token_id"
    )


def _scored_turns(
    messages: Sequence[Message], loss_on: LossOn, n_context: int, where: str
) -> list[int]:
    turns = [i for i, m in enumerate(messages) if i >= n_context and m.get("role") == "assistant"]
    if not turns:
        raise UserInputError(f"{where}: no assistant message to train on; add one or drop the row")
    if loss_on == "last_assistant":
        turns = turns[-1:]
    if turns[0] == 0:
        raise UserInputError(
            f"{where}: it begins with the assistant's message, which has no prompt; begin with a "
            "system or user message"
        )
    return turns


def _leading_bos(tokenizer: Tokenizer) -> list[int]:
    """The BOS token, where the tokenizer itself puts one before plain text."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    with_added = tokenizer.encode("a", add_special_tokens=True)
    without = tokenizer.encode("a", add_special_tokens=False)
    added = with_added[:1] == [bos] and without[:1] != [bos]
    return [int(bos)] if added else []


def _not_a_prefix(where: str) -> str:
    return (
        f"{where}: the prompt's tokens are not the first tokens of the prompt with its completion, "
        "so training would see other tokens than sampling does; the tokenizer joins them across "
        "the border. Begin the completion, or end the prompt, with other white space"
    )


def _not_an_extension(where: str, turn: int, *, is_last: bool) -> str:
    remedy = (
        "give another chat template (model.chat_template), or template options under which the "
        "generation prompt is a prefix of the assistant's turn"
        if is_last
        else "train on the last assistant turn only (loss_on: last_assistant), or give a chat "
        "template that leaves earlier turns as they were"
    )
    return (
        f"{where}: the chat template does not render message {turn} as an extension of the prompt "
        f"before it, so training would see another prompt than sampling does; {remedy}"
    )
