"""What both sides of a benchmark work on: the same rows, the same reward."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOPICS = (
    "the sea in winter", "a train that is late", "how bread is baked", "the first snow",
    "a quiet library", "learning to swim", "an old bicycle", "the city at night",
    "a letter from a friend", "planting a tree", "a broken clock", "the market on Sunday",
    "a long walk home", "the smell of rain", "a chess game", "the last day of school",
)  # fmt: skip

# Common English words, each one token with its space in the usual vocabularies.
_VOCABULARY = """
after again and answer bird black book bring carry child clear close cold could country day deep
door early earth eat eight end every eye face far field find first follow food four friend
garden give good green ground grow hand hard head hear high hold home house idea keep kind know
land large last learn leave letter light line little long look make many mark morning mountain
move music near never new night north old open over page paper part people place plant play
point quick rain read right river road run school sea second see seven ship short side small
snow song sound start stone story street strong sun table take tell thing think three time tree
turn two under voice walk wall want warm watch water white wind winter wood word work write
"""
WORDS = _VOCABULARY.split()


def prompts(n: int) -> list[str]:
    """`n` prompts of a few dozen tokens, all different."""
    return [
        f"Write one short sentence, number {i}, about {TOPICS[i % len(TOPICS)]}. Keep it simple, "
        "use plain words, and end it with a full stop."
        for i in range(n)
    ]


def demonstrations(n: int, shortest: int = 20, longest: int = 400) -> list[dict[str, str]]:
    """`n` prompts with completions, together log-uniform between two lengths in words.

    A quarter of each is prompt. Lengths are the middles of `n` equal parts of the distribution, in
    random order, so that few rows have its whole spread.
    """
    draw = random.Random(0)
    rows = []
    for length in _log_uniform(n, shortest, longest, draw):
        n_prompt = max(4, length // 4)
        rows.append(
            {"prompt": _text(n_prompt, draw), "completion": _text(length - n_prompt, draw, " ")}
        )
    return rows


def preferences(
    n: int, prompt: int = 200, shortest: int = 50, longest: int = 180
) -> list[dict[str, str]]:
    """`n` preference pairs: prompts of `prompt` words give or take a fifth, and two answers each,
    log-uniform between two lengths (half a prompt in the mean)."""
    draw = random.Random(0)
    chosen = _log_uniform(n, shortest, longest, draw)
    rejected = _log_uniform(n, shortest, longest, draw)
    return [
        {
            "prompt": _text(draw.randint(prompt * 4 // 5, prompt * 6 // 5), draw),
            "chosen": _text(chosen[i], draw, " "),
            "rejected": _text(rejected[i], draw, " "),
        }
        for i in range(n)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows as a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """Fewer words are better: a reward both sides call in the same convention."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [-len(text.split()) / 32 for text in texts]


def _log_uniform(n: int, shortest: int, longest: int, draw: random.Random) -> list[int]:
    spread = longest / shortest
    lengths = [round(shortest * spread ** ((i + 0.5) / n)) for i in range(n)]
    draw.shuffle(lengths)
    return lengths


def _text(n: int, draw: random.Random, before: str = "") -> str:
    return before + " ".join(draw.choices(WORDS, k=n))
