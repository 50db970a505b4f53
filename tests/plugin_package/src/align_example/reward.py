"""A reward with options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from alignment.types import Completion, Outcome, Prompt, Score


class Vowels:
    """1 where at least the asked share of the letters are vowels, else 0."""

    is_verifier = True

    def __init__(self, share: float, case: Literal["any", "lower"] = "any") -> None:
        self.share = share
        self.vowels = "aeiou" if case == "lower" else "aeiouAEIOU"

    def __call__(self, items: Sequence[tuple[Prompt, Completion]], /) -> list[Score]:
        return [self._score(completion.text) for _, completion in items]

    def _score(self, text: str) -> Score:
        letters = [letter for letter in text if letter.isalpha()]
        vowels = sum(letter in self.vowels for letter in letters)
        enough = bool(letters) and vowels / len(letters) >= self.share
        return Score(float(enough), Outcome.CORRECT if enough else Outcome.WRONG)
