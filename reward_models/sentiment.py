"""A sentiment score by word list: the "gold" reward of controlled-sentiment experiments."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from alignment.rewards.protocol import Item
from alignment.types import Score

_MAX_CHARACTERS = 20_000


class SentimentReward:
    """VADER's compound sentiment of the completion, in [-1, 1]; 0 is neutral.

    Hutto and Gilbert 2014; it knows English. An empty completion is neutral. Of a very long one
    only the first 20,000 characters are read.

    Args:
        sign: 1 rewards positive text, -1 negative text.
    """

    def __init__(self, *, sign: float = 1.0) -> None:
        self._sign = sign

    def __call__(self, items: Sequence[Item], /) -> list[Score]:
        analyzer = _analyzer()
        texts = (completion.text[:_MAX_CHARACTERS] for _, completion in items)
        return [Score(self._sign * analyzer.polarity_scores(text)["compound"]) for text in texts]


@cache
def _analyzer() -> Any:
    # Loaded when first used, so that checking a recipe does not read the word list.
    module = importlib.import_module("vaderSentiment.vaderSentiment")
    return module.SentimentIntensityAnalyzer()
