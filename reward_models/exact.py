"""Answers that need no computer algebra: plain numbers, and texts that must match."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignment.rewards.protocol import Item
from alignment.types import Completion, Prompt, Score, UserInputError
from reward_models.answers import Extraction, final_answer, thinking_opened
from reward_models.math import MATH_PLACES, reference_answer
from reward_models.numbers import plain_number
from reward_models.verifier import no_answer, verdict

_TEXT_PLACES: tuple[Extraction, ...] = ("answer_tag", "boxed", "answer_line", "last_line")


class NumberReward:
    """1 where the answer is the row's number, 0 where it is another or none (`unparseable`).

    For arithmetic: exact, in this process, any way of writing the number. An answer that is not
    a plain number ("3+4") is `unparseable`, and a fraction that is not in lowest terms is wrong.

    Raises (when called):
        UserInputError: a row lacks the column, or what it has there is not a number.
    """

    is_verifier = True

    def __init__(
        self,
        *,
        answer_column: str = "answer",
        extraction: tuple[Extraction, ...] = MATH_PLACES,
    ) -> None:
        self._answer_column = answer_column
        self._extraction = extraction

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return [self._score(prompt, completion) for prompt, completion in items]

    def _score(self, prompt: Prompt, completion: Completion) -> Score:
        text = reference_answer(prompt, self._answer_column)
        gold = plain_number(text)
        if gold is None:
            raise UserInputError(
                f"the reference answer {text!r} of {prompt.row_name} (column "
                f"{self._answer_column!r}) is not a plain number; correct or drop that row, or "
                "use the reward `math`"
            )
        opened = thinking_opened(prompt.text)
        answer = final_answer(completion.text, self._extraction, thinking_opened=opened)
        if answer is None:
            return no_answer(f"no answer found; looked for: {', '.join(self._extraction)}")
        number = plain_number(answer)
        if number is None:
            return no_answer(f"{answer[:100]!r} is not a number")
        return verdict(number.canonical and number.value == gold.value, f"{answer!r}")


class ExactReward:
    """1 where the answer is the row's text, 0 where it is another or none (`unparseable`).

    Runs of white space count as one space, and those at the ends do not count.

    Args:
        answer_column: the row's column with the reference text.
        extraction: where to look for the answer in a completion, in order of preference.
        ignore_case: whether letter case does not count.

    Raises (when called):
        UserInputError: a row lacks the column.
    """

    is_verifier = True

    def __init__(
        self,
        *,
        answer_column: str = "answer",
        extraction: tuple[Extraction, ...] = _TEXT_PLACES,
        ignore_case: bool = False,
    ) -> None:
        self._answer_column = answer_column
        self._extraction = extraction
        self._ignore_case = ignore_case

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        return [self._score(prompt, completion) for prompt, completion in items]

    def _score(self, prompt: Prompt, completion: Completion) -> Score:
        gold = prompt.row.get(self._answer_column)
        if gold is None or str(gold).strip() == "":
            known = ", ".join(sorted(prompt.row)) or "none"
            raise UserInputError(
                f"{prompt.row_name} has no text in the column "
                f"{self._answer_column!r} (columns: {known}); set `answer_column`, or drop the row"
            )
        opened = thinking_opened(prompt.text)
        answer = final_answer(completion.text, self._extraction, thinking_opened=opened)
        if answer is None:
            return no_answer(f"no answer found; looked for: {', '.join(self._extraction)}")
        return verdict(self._canonical(answer) == self._canonical(str(gold)), f"{answer[:100]!r}")

    def _canonical(self, text: str) -> str:
        text = re.sub(r"\s+", " ", text).strip()
        return text.casefold() if self._ignore_case else text
