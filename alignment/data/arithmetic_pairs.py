"""Preference pairs over arithmetic problems: the worked solution is better than a wrong one."""

from __future__ import annotations

import random

from alignment.data.arithmetic import Operation, arithmetic
from alignment.data.formats import Row
from alignment.types import UserInputError


def arithmetic_pairs(
    operation: Operation = "add",
    operands: int = 2,
    low: int = 1,
    high: int = 20,
    size: int | None = None,
    seed: int = 0,
    question: str = "What is {expression}?",
    error: int = 10,
) -> list[Row]:
    """Problems such as "What is 7 + 12?" with a right solution (`chosen`) and a wrong one
    (`rejected`): small preference data that needs no download.

    The two differ in the number they end in. Each row has `prompt`, `chosen` and `rejected`, with
    the `answer`, `expression` and `split_key` of `arithmetic`.

    Args:
        operation: the sign between operands: add, subtract, multiply or mixed.
        operands: how many, 2 or more.
        low: smallest operand.
        high: largest operand.
        size: number of rows; all problems if left out.
        seed: of the choice and order of problems, and of the errors.
        question: the wording; `{expression}` is replaced.
        error: how far a wrong answer is from the right one, at most; 1 or more.

    Raises:
        UserInputError: an option out of range, or fewer distinct problems than `size`.
    """
    if error < 1:
        raise UserInputError(f"arithmetic_pairs: error is {error}; give 1 or more")
    rows = arithmetic(operation, operands, low, high, size, seed, question)
    return [_pair(row, seed, error) for row in rows]


def _pair(row: Row, seed: int, error: int) -> Row:
    # From the problem and the seed alone, whatever the other rows are.
    draw = random.Random(f"{seed}:{row['expression']}")
    wrong = int(row["answer"]) + draw.choice([-1, 1]) * draw.randint(1, error)
    right_solution = row["completion"]
    return {
        "prompt": row["question"],
        "chosen": right_solution,
        "rejected": right_solution.removesuffix(row["answer"]) + str(wrong),
        "answer": row["answer"],
        "expression": row["expression"],
        "split_key": row["split_key"],
    }
