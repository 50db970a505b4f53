"""The mark of a reward that tells right from wrong.

A class that checks a completion against something objective (a reference answer, a task's own
checker) sets `is_verifier = True`; its outcomes are then `correct`, `wrong` or `unparseable`.
Training on verifiable rewards (`algorithm.type: rlvr`) asks for at least one. The core package
reads the attribute by name and never imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from alignment.types import Outcome, Score

T = TypeVar("T", bound=Callable[..., Any])


def verifier(target: T) -> T:
    """Decorator for a class or a function of the user's own: it tells right from wrong."""
    target.is_verifier = True  # type: ignore[attr-defined]
    return target


def is_verifier(reward: object) -> bool:
    """True where a reward, its class or its function carries the mark."""
    return bool(getattr(reward, "is_verifier", False))


def verdict(correct: bool, detail: str = "") -> Score:
    """The score of a plain verdict: 1 for correct, 0 for wrong."""
    return Score(1.0, Outcome.CORRECT, detail) if correct else Score(0.0, Outcome.WRONG, detail)


def no_answer(detail: str) -> Score:
    """The score of a completion that has no answer in the asked form: 0."""
    return Score(0.0, Outcome.UNPARSEABLE, detail)
