"""A source of rows."""

from __future__ import annotations

from typing import Any


def counting(size: int, start: int = 1) -> list[dict[str, Any]]:
    """`size` prompts that ask for the next number."""
    return [
        {"prompt": f"What comes after {number}?", "answer": str(number + 1)}
        for number in range(start, start + size)
    ]
