"""Rewards for the form of a completion, whatever it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from alignment.rewards.protocol import Item
from alignment.types import Score
from reward_models.answers import answer_tag, has_boxed, split_thinking, thinking_opened

Style = Literal["think", "think_answer", "answer", "boxed"]


class FormatReward:
    """1 where the completion has the asked form, else 0.

    Args:
        style: `think`: one `<think>...</think>` at the start, both parts non-empty;
            `think_answer`: that, and what follows is one `<answer>...</answer>` and nothing else;
            `answer`: a non-empty `<answer>...</answer>`; `boxed`: a closed, non-empty `\\boxed{}`
            (after the thinking, if there is any).

    A prompt that itself ends in `<think>` counts as the opening tag.
    """

    def __init__(self, *, style: Style = "think") -> None:
        self._has_form = _STYLES[style]

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return [
            Score(float(self._has_form(completion.text, thinking_opened(prompt.text))))
            for prompt, completion in items
        ]


def _think(text: str, opened: bool) -> bool:
    parts = split_thinking(text, opened=opened)
    return parts.well_formed and bool(parts.thought.strip()) and bool((parts.answer or "").strip())


def _think_answer(text: str, opened: bool) -> bool:
    rest = (split_thinking(text, opened=opened).answer or "").strip()
    whole = rest.startswith("<answer>") and rest.endswith("</answer>")
    return _think(text, opened) and whole and rest.count("<answer>") == 1 and _answer(rest, False)


def _answer(text: str, opened: bool) -> bool:
    content = answer_tag(split_thinking(text, opened=opened).answer or "")
    return content is not None and content.strip() != ""


def _boxed(text: str, opened: bool) -> bool:
    return has_boxed(split_thinking(text, opened=opened).answer or "")


_STYLES: dict[Style, Callable[[str, bool], bool]] = {
    "think": _think,
    "think_answer": _think_answer,
    "answer": _answer,
    "boxed": _boxed,
}
