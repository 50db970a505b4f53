"""Mathematical answers, checked against a reference answer.

Where the reference is a plain number, which is most of the time, the comparison is exact and done
here. Everything else goes to math-verify in worker processes (`reward_models.pool`), since a
completion can make a computer algebra system compute forever. Nothing is ever evaluated as Python.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from alignment.rewards.protocol import Item
from alignment.types import Outcome, Prompt, Score, UserInputError
from reward_models.answers import Extraction, final_answer, last_boxed, thinking_opened
from reward_models.numbers import PlainNumber, plain_number
from reward_models.pool import Reply, WorkerPool
from reward_models.verifier import no_answer, verdict

MATH_PLACES: tuple[Extraction, ...] = ("boxed", "answer_tag", "hash", "answer_line", "last_number")

_MAX_ANSWER = 2000  # characters; longer answers are not answers
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}\\]*)\}")
_WORDS = re.compile(r"[a-zA-Z]{4,}|[A-Z]{2,3}|[a-zA-Z]{3,}(?:[ '-][a-zA-Z]{2,})+")
_DELIMITERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"))


class MathReward:
    """1 for an answer equal to the row's reference answer, 0 for another or for none.

    Outcomes: `correct`; `wrong`; `unparseable` (no answer found, or not mathematics); `timeout`
    and `crash` where the checker failed on this completion, which then has no score.

    The rules where mathematics leaves a choice:

    * The last box counts, and adjacent boxes count together: "3 or 4" is not 3.
    * Where the reference is a plain number, the answer must be one as well, and a fraction must
      be in lowest terms. So 2^{10}, 3+4, 6/2 or a sum do not pass for their value: an answer
      that restates the question is wrong. `allow_unevaluated` accepts expressions of equal value,
      except those with sums, products, integrals, limits and the like.
    * Numbers are compared exactly, decimals at their word: 0.333333 is not 1/3.
      `relative_tolerance` allows a difference relative to the reference.
    * 10% is 0.1, not 10. Units and currency signs are left out of the comparison.
    * References in words are compared as text, in any letter case.

    Args:
        answer_column: the row's column with the reference answer: a number, LaTeX, or a worked
            solution that ends in `#### x` or in a box.
        extraction: where to look for the answer in a completion, in order of preference.
        timeout_seconds: processor time for one check.
        workers: processes for the checks that need them.
        allow_unevaluated, relative_tolerance: see above.

    Raises (when called):
        UserInputError: a row lacks the column, or its reference cannot be read.
    """

    is_verifier = True

    def __init__(
        self,
        *,
        answer_column: str = "answer",
        extraction: tuple[Extraction, ...] = MATH_PLACES,
        timeout_seconds: float = 5.0,
        workers: int = 2,
        allow_unevaluated: bool = False,
        relative_tolerance: float = 0.0,
    ) -> None:
        if not 0.0 <= relative_tolerance < 1.0:
            raise UserInputError(
                f"relative_tolerance {relative_tolerance} is not within 0 (exact) to 1"
            )
        self._answer_column = answer_column
        self._extraction = extraction
        self._allow_unevaluated = allow_unevaluated
        self._tolerance = relative_tolerance
        self._pool = WorkerPool(
            "reward_models.math_worker:grade", workers=workers, timeout_seconds=timeout_seconds
        )

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        scores: dict[int, Score] = {}
        requests: dict[int, dict[str, Any]] = {}
        for index, (prompt, completion) in enumerate(items):
            gold = reference_answer(prompt, self._answer_column)
            opened = thinking_opened(prompt.text)
            answer = final_answer(completion.text, self._extraction, thinking_opened=opened)
            score = self._decide(gold, answer)
            if score is not None:
                scores[index] = score
            else:
                requests[index] = {
                    "gold": gold,
                    "answer": without_delimiters(answer or ""),
                    "tolerance": self._tolerance,
                }
        for index, reply in zip(requests, self._pool.run(list(requests.values())), strict=True):
            scores[index] = self._as_score(reply, requests[index], items[index][0])
        return [scores[index] for index in range(len(items))]

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _decide(self, gold: str, answer: str | None) -> Score | None:
        """The score where it takes no computer algebra, else None."""
        if answer is None:
            return no_answer(f"no answer found; looked for: {', '.join(self._extraction)}")
        if len(answer) > _MAX_ANSWER:
            return no_answer(f"an answer of {len(answer)} characters")
        if _comparable_text(gold) == _comparable_text(answer):
            return verdict(True)
        number = plain_number(gold)
        if number is not None:
            return self._compare_numbers(number, answer)
        if _is_words(gold):
            return verdict(False, f"{answer!r} is not {gold!r}")
        return None

    def _compare_numbers(self, gold: PlainNumber, answer: str) -> Score | None:
        number = plain_number(without_delimiters(answer))
        if number is None:
            if self._allow_unevaluated:
                return None
            return verdict(False, f"{answer!r} is not written as a number")
        if not (number.canonical or self._allow_unevaluated):
            return verdict(False, f"{answer!r} is not in lowest terms")
        difference = abs(number.value - gold.value)
        return verdict(difference <= self._tolerance * abs(gold.value))

    def _as_score(self, reply: Reply, request: dict[str, Any], prompt: Prompt) -> Score:
        if reply.failure is not None:
            return Score(None, reply.failure, f"{reply.detail}; answer {request['answer'][:100]!r}")
        if reply.value == "bad_gold":
            raise UserInputError(
                f"the reference answer {request['gold']!r} of {prompt.row_name} (column "
                f"{self._answer_column!r}) cannot be read as mathematics; correct or drop that "
                "row, or compare its text with the reward `exact`"
            )
        outcome = Outcome(reply.value)
        value = 1.0 if outcome is Outcome.CORRECT else 0.0
        return Score(value, outcome, f"{request['answer'][:100]!r}")


def reference_answer(prompt: Prompt, column: str) -> str:
    """The reference answer of a row, as text: what follows `####` or stands in the last box where
    the column has a worked solution, without mathematics delimiters.

    Raises:
        UserInputError: the column is missing, empty, or neither a number nor text.
    """
    value = prompt.row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
        problem = "lacks" if column not in prompt.row else f"has {value!r} in"
        known = ", ".join(sorted(prompt.row)) or "none"
        raise UserInputError(
            f"{prompt.row_name} {problem} the column {column!r}, where the "
            f"reference answer should be (columns: {known}); set `answer_column`, or drop the row"
        )
    text = str(value)
    if "####" in text:
        text = text.rpartition("####")[2]
    return without_delimiters(last_boxed(text) or text)


def without_delimiters(text: str) -> str:
    """Text without the mathematics delimiters, bold markers and full stop around it."""
    text = text.strip().strip("*").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for opening, closing in _DELIMITERS:
        longer = len(text) > len(opening) + len(closing)
        inner = text[len(opening) : -len(closing)]
        if longer and text.startswith(opening) and text.endswith(closing) and opening not in inner:
            return inner.strip()
    return text


def _comparable_text(text: str) -> str:
    text = _TEXT.sub(r"\1", without_delimiters(text))
    text = re.sub(r"\s+", " ", text).strip(" .:")
    if "\\" in text:  # \Delta is not \delta
        return text
    return text.strip("()").casefold() if re.fullmatch(r"\([a-zA-Z]\)", text) else text.casefold()


def _is_words(gold: str) -> bool:
    """Whether a reference is text rather than a product of one-letter variables."""
    return bool(_TEXT.fullmatch(gold) or _WORDS.fullmatch(gold))
