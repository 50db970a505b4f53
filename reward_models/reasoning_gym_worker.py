"""Scores answers by reasoning-gym's checkers. Runs in worker processes only.

Several checkers hand the completion's text to Python's `eval` or to sympy's `parse_expr`, which
is `eval` as well. Before the first answer is scored, both are replaced here, in all of
reasoning-gym's modules: `eval` reads nothing but literals and arithmetic on them, and
`parse_expr` refuses whatever is not an expression of numbers, one-letter variables and the usual
functions.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import reasoning_gym
import sympy

_LITERALS = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Load),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_EXPRESSION = re.compile(r"[0-9a-zA-Z\s+\-*/^()=,|.]*")
_ATTRIBUTE = re.compile(r"\.\s*[a-zA-Z]|[a-zA-Z)]\s*\.")
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9]*")
_FUNCTIONS = frozenset(
    {"sqrt", "cbrt", "exp", "log", "ln", "pi", "Abs", "Rational", "Integer", "Float"}
    | {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"}
    | {"sinh", "cosh", "tanh", "asinh", "acosh", "atanh"}
)


def grade(request: dict[str, Any]) -> dict[str, Any]:
    """`{"score": float}`, or `{"bad_row": why}` where the row does not fit the installed tasks."""
    options = json.dumps(request["options"], sort_keys=True, default=str)
    try:
        score_answer = _checker(request["task"], options)
    except Exception as error:
        return {"bad_row": f"{type(error).__name__}: {error}"}
    return {"score": float(score_answer(request["answer"], request["entry"]))}


@cache
def _checker(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    dataset = reasoning_gym.create_dataset(task, **json.loads(options))
    _close_openings()
    checker: Callable[[str, dict[str, Any]], float] = dataset.score_answer
    return checker


def _close_openings() -> None:
    sympy.parse_expr = safe_parse_expr
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            module.eval = safe_eval  # type: ignore[attr-defined]
            if getattr(module, "parse_expr", None) is _parse_expr:
                module.parse_expr = safe_parse_expr  # type: ignore[attr-defined]


_parse_expr = sympy.parse_expr


def safe_eval(text: str, *_: Any) -> Any:
    """The value of literals, containers of them, and operators between them.

    Raises:
        ValueError: anything else: names, calls, attributes, subscripts, comprehensions.
    """
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _LITERALS):
            raise ValueError(f"{type(node).__name__} is not allowed in an answer")
    return builtins.eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def safe_parse_expr(text: str, *arguments: Any, **options: Any) -> Any:
    """sympy's `parse_expr` for expressions that cannot run anything.

    Raises:
        ValueError: a character or a name outside of the allowed ones.
    """
    local: dict[str, Any] = options.get("local_dict") or {}
    names = {name for name in _NAME.findall(text) if len(name) > 1}
    harmless = _EXPRESSION.fullmatch(text) and not _ATTRIBUTE.search(text)
    if not harmless or not names <= _FUNCTIONS | set(local):
        raise ValueError("an answer may use numbers, one-letter variables and known functions")
    return _parse_expr(text, *arguments, **options)
