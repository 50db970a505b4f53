"""Worked arithmetic with and without mistakes, labelled step by step."""

from __future__ import annotations

import random

from alignment.data.arithmetic import Operation, Problem, draw_problems, problem_row, worked_lines
from alignment.data.formats import Row

_QUESTION = "What is {expression}?"
_LARGEST_SLIP = 9


def arithmetic_steps(
    operation: Operation = "add",
    operands: int = 3,
    low: int = 1,
    high: int = 20,
    size: int | None = None,
    seed: int = 0,
    question: str = _QUESTION,
    wrong: float = 0.5,
) -> list[Row]:
    """Worked solutions with a label for each line: good before the first mistake, bad from it on.

    The rows have `prompt`, `completions` (the lines), `labels` and `split_key`.

    Args:
        operation: the sign between operands: add, subtract, multiply or mixed.
        operands: how many, 2 or more; one less is the number of lines.
        low: smallest operand.
        high: largest operand.
        size: number of rows; all problems if left out.
        seed: of the choice and order of problems, and of the mistakes.
        question: the wording; `{expression}` is replaced.
        wrong: share of solutions with a mistake.

    Raises:
        UserInputError: as `arithmetic`.
    """
    rows = []
    problems = draw_problems(operation, operands, low, high, size, seed, question)
    for number, problem in enumerate(problems):
        draw = random.Random(f"{seed}:{number}")
        slip = _slip(problem, draw) if draw.random() < wrong else None
        lines = worked_lines(problem, slip)
        row = problem_row(problem, question)
        rows.append(
            {
                "prompt": row["question"],
                "completions": lines,
                "labels": [slip is None or line < slip[0] for line in range(len(lines))],
                "split_key": row["split_key"],
            }
        )
    return rows


def _slip(problem: Problem, draw: random.Random) -> tuple[int, int]:
    """(number of an operation, what its result is off by)."""
    size = draw.randint(1, _LARGEST_SLIP) * draw.choice((-1, 1))
    return draw.randrange(len(problem[1])), size
