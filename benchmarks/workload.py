"""What both sides of a benchmark work on: the same prompts, the same reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOPICS = (
    "the sea in winter", "a train that is late", "how bread is baked", "the first snow",
    "a quiet library", "learning to swim", "an old bicycle", "the city at night",
    "a letter from a friend", "planting a tree", "a broken clock", "the market on Sunday",
    "a long walk home", "the smell of rain", "a chess game", "the last day of school",
)  # fmt: skip


def prompts(n: int) -> list[str]:
    """`n` prompts of a few dozen tokens, all different."""
    return [
        f"Write one short sentence, number {i}, about {TOPICS[i % len(TOPICS)]}. Keep it simple, "
        "use plain words, and end it with a full stop."
        for i in range(n)
    ]


def write_rows(path: Path, n: int) -> Path:
    """The prompts as a jsonl file."""
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts(n)))
    return path


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """Fewer words are better: a reward both sides call in the same convention."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [-len(text.split()) / 32 for text in texts]
