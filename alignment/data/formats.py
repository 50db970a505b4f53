"""The row formats that the toolkit understands, and their normal forms.

| format       | columns                                                              |
|--------------|----------------------------------------------------------------------|
| conversation | `messages`: `[{"role", "content"}, ...]`                             |
| demonstration| `prompt` or `question`, and `completion` (or `answer`)               |
| prompt       | `prompt` or `question`, or `messages`; with `answer` for verifiers   |
| preference   | `chosen` and `rejected`, with `prompt` or as two whole conversations;|
|              | `margin`, a number, may say by how much                              |
| labelled     | a demonstration or a conversation, and `label`: true, false, 1 or 0  |
| stepped      | `prompt`, `completions`: the steps of one answer, each a string, and |
|              | `labels`: for each step true, false or a number from 0 to 1          |

A prompt, a completion, `chosen` and `rejected` are a string or a list of messages. With `chat`,
strings become messages: a prompt the user's, a completion the assistant's. Without, all must be
strings, and no template is applied.

Every function takes `where`, the name of the row (see `alignment.data.places`), and begins its
errors with it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from alignment.types import UserInputError

Row = dict[str, Any]
Message = dict[str, Any]
Turns = list[Message] | str
Format = Literal["conversation", "demonstration", "prompt", "preference", "labelled", "stepped"]

_ROLE = re.compile(r"[a-z][a-z_]*")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PROMPT_COLUMNS = ("prompt", "question")
_COMPLETION_COLUMNS = ("completion", "answer")
_A_NUMBER = "give a finite number (the cells of a CSV file are strings: use JSON lines or Parquet)"


def detect(row: Mapping[str, Any], *, where: str = "the row") -> Format:
    """The richest format that the row has the columns of.

    Raises:
        UserInputError: it has the columns of none.
    """
    if "chosen" in row and "rejected" in row:
        return "preference"
    if "completions" in row and "labels" in row:
        return "stepped"
    if "messages" in row:
        return "labelled" if "label" in row else "conversation"
    if any(column in row for column in _PROMPT_COLUMNS):
        if "label" in row and any(column in row for column in _COMPLETION_COLUMNS):
            return "labelled"
        return "demonstration" if "completion" in row else "prompt"
    raise UserInputError(
        f"{where}: none of the known formats; it has the columns {_listed(row)}. Known: "
        "'messages'; 'prompt' or 'question' with 'completion' or 'answer'; either with 'label'; "
        "'chosen' and 'rejected'; 'prompt' with 'completions' and 'labels'. Rename columns with "
        "the source's `columns` option"
    )


def prompt_of(row: Mapping[str, Any], *, chat: bool, where: str = "the row") -> Turns:
    """What the policy answers: the prompt, or a conversation up to its last non-assistant message.

    Raises:
        UserInputError: the column is missing, of the wrong type, or empty.
    """
    column = next((c for c in _PROMPT_COLUMNS if c in row), None)
    if column is not None:
        return _turns(row[column], "user", chat, f"{where}: column {column!r}")
    if "messages" in row:
        _need_chat(chat, where)
        messages = _messages(row["messages"], f"{where}: column 'messages'")
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            return messages
        raise UserInputError(f"{where}: column 'messages' holds nothing but assistant messages")
    raise UserInputError(_missing(row, "'prompt', 'question' or 'messages'", where))


def demonstration_of(
    row: Mapping[str, Any], *, chat: bool, where: str = "the row"
) -> tuple[Turns, Turns]:
    """Context and what to learn from it: (prompt, completion), or ([], whole conversation).

    Raises:
        UserInputError: a column is missing or of the wrong type.
    """
    if "messages" in row:
        _need_chat(chat, where)
        return [], _messages(row["messages"], f"{where}: column 'messages'")
    column = next((c for c in _COMPLETION_COLUMNS if c in row), None)
    if column is None:
        raise UserInputError(_missing(row, "'messages', or 'prompt' with 'completion'", where))
    prompt = prompt_of(row, chat=chat, where=where)
    return prompt, _turns(row[column], "assistant", chat, f"{where}: column {column!r}")


def preference_of(
    row: Mapping[str, Any], *, chat: bool, where: str = "the row"
) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected). Without a `prompt` column, `chosen` and `rejected` are whole
    conversations, and the prompt is the messages they begin with in common: [] if there are none.

    Whether the two can be compared is for `alignment.data.pairs` to say.

    Raises:
        UserInputError: a column is missing or of the wrong type.
    """
    for column in ("chosen", "rejected"):
        if column not in row:
            raise UserInputError(_missing(row, "'chosen' and 'rejected'", where))
    chosen = _turns(row["chosen"], "assistant", chat, f"{where}: column 'chosen'")
    rejected = _turns(row["rejected"], "assistant", chat, f"{where}: column 'rejected'")
    if any(column in row for column in _PROMPT_COLUMNS):
        prompt = prompt_of(row, chat=chat, where=where)
        if isinstance(prompt, list):
            return prompt, _without(prompt, chosen), _without(prompt, rejected)
        return prompt, chosen, rejected
    common = _common_beginning(chosen, rejected)
    return common, chosen[len(common) :], rejected[len(common) :]


def margin_of(row: Mapping[str, Any], *, where: str = "the row") -> float | None:
    """By how much `chosen` was preferred: the column `margin`, or None without one.

    Raises:
        UserInputError: it is not a finite number.
    """
    value = row.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserInputError(f"{where}: column 'margin' is {_shown(value)}; {_A_NUMBER}")
    return float(value)


def labelled_of(
    row: Mapping[str, Any], *, chat: bool, where: str = "the row"
) -> tuple[Turns, Turns, bool]:
    """(prompt, completion, desirable). Of a conversation, the completion is the last assistant
    message and the prompt what comes before it; without an assistant message it is [].

    Raises:
        UserInputError: a column is missing or of the wrong type.
    """
    value = row.get("label")
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise UserInputError(
            f"{where}: column 'label' is {_shown(value)}; give true or false, or 1 or 0 (the cells "
            "of a CSV file are strings: use JSON lines or Parquet)"
        )
    if "messages" in row:
        _need_chat(chat, where)
        messages = _messages(row["messages"], f"{where}: column 'messages'")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last = turns[-1] if turns else len(messages)
        return messages[:last], messages[last : last + 1], bool(value)
    prompt, completion = demonstration_of(row, chat=chat, where=where)
    return prompt, completion, bool(value)


def steps_of(
    row: Mapping[str, Any], *, chat: bool, where: str = "the row"
) -> tuple[Turns, list[str], list[float]]:
    """(prompt, the steps of the answer, a label from 0 to 1 for each of them).

    Raises:
        UserInputError: a column is missing or of the wrong type, or labels and steps differ in
            number.
    """
    for column in ("completions", "labels"):
        if column not in row:
            raise UserInputError(_missing(row, "'completions' and 'labels'", where))
        if not isinstance(row[column], (list, tuple)) or not row[column]:
            raise UserInputError(
                f"{where}: column {column!r} is {_shown(row[column])}; give a non-empty list"
            )
    steps, labels = list(row["completions"]), list(row["labels"])
    if len(steps) != len(labels):
        raise UserInputError(
            f"{where}: {len(labels)} labels for {len(steps)} completions; give each step its label"
        )
    for number, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str):
            raise UserInputError(
                f"{where}: column 'completions', step {number} is {_shown(step)}; give a string"
            )
        if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
            raise UserInputError(
                f"{where}: column 'labels', step {number} is {_shown(label)}; give true, false or "
                "a number from 0 to 1"
            )
    return prompt_of(row, chat=chat, where=where), steps, [float(label) for label in labels]


def has_content(completion: Turns) -> bool:
    """Whether an assistant says anything in it."""
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(
        message["role"] == "assistant"
        and (message.get("tool_calls") or str(message.get("content") or "").strip())
        for message in completion
    )


def is_blank_question(*turns: Turns) -> bool:
    """Whether a user says nothing in a message of theirs; plain text is for the caller to judge."""
    return any(
        message["role"] == "user" and not str(message.get("content") or "").strip()
        for part in turns
        if not isinstance(part, str)
        for message in part
    )


def wants_chat(style: Literal["auto", "chat", "plain"], *, has_template: bool) -> bool:
    """Whether strings are rendered with the chat template: under `auto`, if there is one.

    Raises:
        UserInputError: `chat` without a chat template.
    """
    if style == "chat" and not has_template:
        raise UserInputError(
            "the data is to be rendered as a chat, but the tokenizer has no chat template; set "
            "model.chat_template, or use the plain style"
        )
    return style == "chat" or (style == "auto" and has_template)


def _turns(value: Any, role: str, chat: bool, where: str) -> Turns:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if chat else value
    if isinstance(value, (list, tuple)):
        _need_chat(chat, where)
        return _messages(value, where)
    raise UserInputError(
        f"{where} is of type {type(value).__name__}; give a string or a list of messages"
    )


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, (list, tuple)) or not value:
        raise UserInputError(
            f"{where} is {_shown(value)}; give a non-empty list of "
            "{'role': ..., 'content': ...} messages"
        )
    return [_message(item, f"{where}, message {i}") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserInputError(f"{where} is {_shown(item)}; give {{'role': ..., 'content': ...}}")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise UserInputError(
            f"{where} has role {role!r}; give system, user, assistant, tool or another lower-case "
            "word"
        )
    meant = [] if role in _ROLES else difflib.get_close_matches(role, _ROLES, 1, cutoff=0.8)
    if meant:
        raise UserInputError(f"{where} has role {role!r}; did you mean {meant[0]!r}?")
    if content is None and not item.get("tool_calls"):
        raise UserInputError(f"{where} has no content; give a string")
    if content is not None and not isinstance(content, (str, list)):
        raise UserInputError(f"{where} has content of type {type(content).__name__}; give a string")
    # Columnar files fill the keys that only other messages have with None.
    return {key: part for key, part in item.items() if part is not None}


def _common_beginning(chosen: Turns, rejected: Turns) -> Turns:
    if isinstance(chosen, str) or isinstance(rejected, str):
        return []
    n_common = 0
    # Both answers keep at least one message of their own.
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        n_common += 1
    return chosen[:n_common]


def _without(prompt: list[Message], answer: Turns) -> Turns:
    """An answer that repeats the prompt's messages, without them."""
    repeats = isinstance(answer, list) and len(answer) > len(prompt)
    return answer[len(prompt) :] if repeats and answer[: len(prompt)] == prompt else answer


def _need_chat(chat: bool, where: str) -> None:
    if not chat:
        raise UserInputError(
            f"{where}: messages need a chat template; set model.chat_template, or give strings"
        )


def _missing(row: Mapping[str, Any], wanted: str, where: str) -> str:
    return (
        f"{where}: needs {wanted}, and has the columns {_listed(row)}; rename columns with the "
        "source's `columns` option"
    )


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
