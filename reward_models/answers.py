"""Where the final answer stands in a completion, and where its thinking ends.

All functions are pure, take text nobody can be trusted with, and run in time linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Extraction = Literal[
    "boxed", "answer_tag", "hash", "answer_line", "last_number", "last_line", "all"
]
"""A place to look for the final answer.

boxed:       the last `\\boxed{...}`; boxes joined by nothing but "and", "or" or commas are one
             answer ("3 or 4")
answer_tag:  the last `<answer>...</answer>`
hash:        what follows the last `####` on its line
answer_line: what follows the last "answer is" or "answer:" up to the end of the sentence
last_number: the last number
last_line:   the last line that is not empty
all:         the whole text
"""

_OPEN, _CLOSE = "<think>", "</think>"
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_JOINT = re.compile(r"[\s$.,;]*(?:\b(?:and|or)\b)?[\s$,;]*")
_MAX_JOINT = 20  # characters
_ANSWER_LINE = re.compile(r"\banswer(?: is\b| ?:)[ \t:*]*([^\n]*)", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"[.!?](?:\s|$)|,\s+(?!or\b|and\b)[a-z]{2,}|\s(?:because|since|so|which)\b", re.IGNORECASE
)
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/\d+)?(?:\s?\\?%)?"
)
_OR = re.compile(r"\s+or\s+")


@dataclass(frozen=True, slots=True)
class Thinking:
    """A completion, split at its thinking.

    thought: what stands between the tags; empty where there are none.
    answer:  what follows the last closing tag (all of the text where there are no tags); None
             where the thinking never ends.
    well_formed: exactly one opening tag, at the start, and one closing tag, after it.
    """

    thought: str
    answer: str | None
    well_formed: bool


def split_thinking(text: str, *, opened: bool = False) -> Thinking:
    """Split `<think>...</think>` from what follows.

    Args:
        opened: the prompt already ended in the opening tag, so the completion starts inside.

    A closing tag without an opening one ends the thinking all the same, but is well formed only
    if `opened`. Nested, repeated and unclosed tags are not well formed.
    """
    body = _OPEN + text if opened else text
    if _OPEN not in body and _CLOSE not in body:
        return Thinking("", text, well_formed=False)
    before, closed, after = body.rpartition(_CLOSE)
    if not closed or _OPEN in after:
        return Thinking(body.partition(_OPEN)[2], None, well_formed=False)
    once = body.count(_OPEN) == 1 and body.count(_CLOSE) == 1
    well_formed = once and body.lstrip().startswith(_OPEN)
    return Thinking(before.partition(_OPEN)[2] or before, after, well_formed)


def thinking_opened(prompt: str) -> bool:
    """True where a rendered prompt ends in the opening tag, so that completions start inside."""
    return prompt.rstrip().endswith(_OPEN)


def final_answer(
    text: str, places: Sequence[Extraction], *, thinking_opened: bool = False
) -> str | None:
    """The final answer: the first of `places` that has one, looking after the thinking only.

    None where there is no answer, or where the thinking never ends.
    """
    answer = split_thinking(text, opened=thinking_opened).answer
    if answer is None:
        return None
    found = (_EXTRACT[place](answer) for place in places)
    return next((stripped for text in found if text and (stripped := text.strip())), None)


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` (or `\\fbox{...}`), braces matched.

    Boxes that only "and", "or" or punctuation stands between are one answer, in their order, so
    that naming several candidates is not the same as naming the last. An unclosed last box is no
    answer.
    """
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while match := _BOX.search(text, position):
        end = _closing_brace(text, match.end())
        if end is None:
            return None
        boxes.append((match.start(), end + 1, text[match.end() : end]))
        position = end + 1
    if not boxes:
        return None
    contents = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if start - end > _MAX_JOINT or not _JOINT.fullmatch(text, end, start):
            break
        if content != contents[-1]:
            contents.append(content)
    return ", ".join(reversed(contents))


def has_boxed(text: str) -> bool:
    """True where the text has a closed, non-empty box."""
    content = last_boxed(text)
    return content is not None and content.strip() != ""


def answer_tag(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return content if closed and opened else None


def _closing_brace(text: str, position: int) -> int | None:
    depth = 1
    for index in range(position, len(text)):
        character = text[index]
        if character in "{}" and text[index - 1] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return index
    return None


def _hash(text: str) -> str | None:
    _, found, rest = text.rpartition("####")
    return rest.lstrip().partition("\n")[0] if found else None


def _answer_line(text: str) -> str | None:
    matches = _ANSWER_LINE.findall(text)
    if not matches:
        return None
    sentence: str = matches[-1]
    end = _SENTENCE_END.search(sentence)
    return (sentence[: end.start()] if end else sentence).strip(" *")


def _last_number(text: str) -> str | None:
    """The last number; the last two where they are alternatives ("3 or 4")."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last, start = numbers[-1], numbers[-1].start()
    if len(numbers) > 1 and _OR.fullmatch(text, numbers[-2].end(), start):
        start = numbers[-2].start()
    return text[start : last.end()]


def _last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1] if lines else None


_EXTRACT: dict[Extraction, Callable[[str], str | None]] = {
    "boxed": last_boxed,
    "answer_tag": answer_tag,
    "hash": _hash,
    "answer_line": _answer_line,
    "last_number": _last_number,
    "last_line": _last_line,
    "all": lambda text: text,
}
