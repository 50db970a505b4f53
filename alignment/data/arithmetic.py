"""Arithmetic problems: generated, verifiable, of a difficulty one can tune."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Literal

from alignment.data.formats import Row
from alignment.types import UserInputError

Operation = Literal["add", "subtract", "multiply", "mixed"]

_SIGNS: dict[str, tuple[str, ...]] = {
    "add": ("+",),
    "subtract": ("-",),
    "multiply": ("*",),
    "mixed": ("+", "-", "*"),
}


def arithmetic(
    operation: Operation = "add",
    operands: int = 2,
    low: int = 1,
    high: int = 20,
    size: int | None = None,
    seed: int = 0,
    question: str = "What is {expression}?",
) -> list[Row]:
    """Distinct problems such as "What is 7 + 12?", in an order given by `seed`.

    Each row has `question`, `answer` (the number), `completion` (a worked solution, one line per
    operation, that ends in the answer) and `expression`. The rows serve reinforcement learning
    (question and answer) and supervised fine-tuning (question and completion) alike.

    Difficulty grows with `high`, with `operands`, and from `add` over `subtract` and `multiply` to
    `mixed`, which draws each sign from +, - and *, with * binding closer.

    Problems that differ only in the order of a commutative operation have the same `split_key`, so
    that a held-out split never has a problem whose mirror image is trained on.

    Args:
        operation: the sign between operands.
        operands: how many, 2 or more.
        low: smallest operand.
        high: largest operand.
        size: number of rows; all problems if left out.
        seed: of the choice and order of problems.
        question: the wording; `{expression}` is replaced.

    Raises:
        UserInputError: an option out of range, or fewer distinct problems than `size`.
    """
    return [
        problem_row(problem, question)
        for problem in draw_problems(operation, operands, low, high, size, seed, question)
    ]


Problem = tuple[tuple[int, ...], tuple[str, ...]]
"""Operands, and the signs between them."""


def draw_problems(
    operation: Operation,
    operands: int,
    low: int,
    high: int,
    size: int | None,
    seed: int,
    question: str,
) -> list[Problem]:
    """The problems of `arithmetic`, in its order.

    Raises:
        UserInputError: as `arithmetic`.
    """
    _check(operands, low, high, size, question)
    signs = _SIGNS[operation]
    total = (high - low + 1) ** operands * len(signs) ** (operands - 1)
    if size is None and total > 1_000_000:
        raise UserInputError(f"arithmetic: there are {total} problems; set size")
    wanted = total if size is None else size
    if not 0 < wanted <= total:
        raise UserInputError(
            f"arithmetic: {total} distinct problems, {wanted} asked for; lower size, or widen "
            "low..high"
        )
    numbers = random.Random(seed).sample(range(total), wanted)
    return [_problem(number, operands, low, high, signs) for number in numbers]


def worked_lines(problem: Problem, slip: tuple[int, int] | None = None) -> list[str]:
    """A worked solution, one line per operation.

    Args:
        slip: (number of an operation, what its result is off by): a mistake that later lines carry
            on with.
    """
    return [f"{before} = {after}" for before, after in pairwise(_steps(problem, slip))]


def _problem(number: int, operands: int, low: int, high: int, signs: tuple[str, ...]) -> Problem:
    """The problem with this number, in a mixed-radix count of all of them."""
    values, chosen = [], []
    for _ in range(operands):
        number, digit = divmod(number, high - low + 1)
        values.append(low + digit)
    for _ in range(operands - 1):
        number, digit = divmod(number, len(signs))
        chosen.append(signs[digit])
    return tuple(values), tuple(chosen)


def _canonical(problem: Problem) -> object:
    """Equal for problems that commutativity makes the same: signed terms, each a sorted product."""
    values, signs = problem
    terms: list[tuple[str, list[int]]] = [("+", [values[0]])]
    for sign, value in zip(signs, values[1:], strict=True):
        if sign == "*":
            terms[-1][1].append(value)
        else:
            terms.append((sign, [value]))
    return sorted((sign, sorted(factors)) for sign, factors in terms)


def problem_row(problem: Problem, question: str) -> Row:
    """The row of `arithmetic` for one problem."""
    steps = _steps(problem)
    return {
        "question": question.replace("{expression}", steps[0]),
        "answer": steps[-1],
        "completion": "\n".join(worked_lines(problem)),
        "expression": steps[0],
        "split_key": repr(_canonical(problem)),
    }


def _steps(problem: Problem, slip: tuple[int, int] | None = None) -> list[str]:
    """The expression, reduced by one operation at a time: products first, then left to right."""
    values, signs = list(problem[0]), list(problem[1])
    steps = [_expression(values, signs)]
    while signs:
        at = signs.index("*") if "*" in signs else 0
        left, right = values[at], values[at + 1]
        result = {"+": left + right, "-": left - right, "*": left * right}[signs[at]]
        if slip is not None and slip[0] == len(steps) - 1:
            result += slip[1]
        values[at : at + 2] = [result]
        del signs[at]
        steps.append(_expression(values, signs))
    return steps


def _expression(values: list[int], signs: list[str]) -> str:
    first, *rest = values
    parts = [str(first)]
    for sign, value in zip(signs, rest, strict=True):
        parts += [sign, f"({value})" if value < 0 else str(value)]
    return " ".join(parts)


def _check(operands: int, low: int, high: int, size: int | None, question: str) -> None:
    if operands < 2:
        raise UserInputError(f"arithmetic: operands is {operands}; give 2 or more")
    if low > high:
        raise UserInputError(f"arithmetic: low ({low}) is above high ({high}); swap them")
    if size is not None and size < 1:
        raise UserInputError(f"arithmetic: size is {size}; give 1 or more")
    if "{expression}" not in question:
        raise UserInputError("arithmetic: question has no {expression} to put the problem in")
