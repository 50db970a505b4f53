"""Equality of two mathematical answers, by math-verify and sympy. Runs in worker processes only.

math-verify 0.9 says "equal" in cases where it should not; each rule below refuses one of them.

* A constant is compared by its value to 40 significant digits, not by an absolute difference:
  1/2004! is not 1/2006!, and 2^-99 is not 2^-98.
* Decimals are taken at their word: 0.333333 is not 1/3 unless a tolerance allows it.
* A percent sign divides by 100: 10% is 1/10, not 10.
* Sets, tuples and intervals are equal where their elements are, under the same rules.
* Text with an ellipsis ("1, 2, ..., n") has no value: it must be the same text.
* A capital Greek letter is not the small one, which the parser takes it for.
* An answer may not use an operation that the reference answer does without and that states a
  problem rather than solving it: sums, products, integrals, limits, derivatives, binomials...
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import permutations
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

_CAPITALS = re.compile(
    r"\\(Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![a-zA-Z])"
)
_DIGITS = 60
_EQUAL_DIGITS = 40
_MAX_UNORDERED = 6  # elements up to which sets are compared in every order
_ELLIPSIS = re.compile(r"\\[lcd]?dots|\.\.\.|\u2026")
_OPERATION = re.compile(
    r"\\(?:sum|prod|i*nt|oint|lim|limsup|liminf|[dt]?binom|choose|gcd|lcm|max|min|sup|inf|det)"
    r"(?![a-zA-Z])|\\[dt]?frac\s*\{d[^{}]*\}\s*\{d[a-zA-Z](?=[\s^}])"
)
_TINY = sympy.Float(10, _DIGITS) ** -_EQUAL_DIGITS
_PROBES = (sympy.Rational(7, 5), sympy.Rational(19, 7), sympy.Rational(13, 11))


def grade(request: dict[str, Any]) -> str:
    """Say `correct`, `wrong`, `unparseable` (the answer) or `bad_gold` (the reference answer).

    `request` has `gold` and `answer`, LaTeX or plain text without delimiters, and `tolerance`,
    the relative difference up to which two constants are equal (0: exactly).
    """
    gold, answer = request["gold"], request["answer"]
    if _ELLIPSIS.search(gold) or _ELLIPSIS.search(answer):
        return _said(_squeezed(gold) == _squeezed(answer))
    gold_value = _parsed(gold)
    if gold_value is None:
        return "bad_gold"
    if set(_OPERATION.findall(answer)) - set(_OPERATION.findall(gold)):
        return "wrong"
    if set(_CAPITALS.findall(answer)) != set(_CAPITALS.findall(gold)):
        return "wrong"
    answer_value = _parsed(answer)
    if answer_value is None:
        return "unparseable"
    return _said(_equal(_exact(gold_value), _exact(answer_value), request["tolerance"]))


def _said(correct: bool) -> str:
    return "correct" if correct else "wrong"


def _squeezed(text: str) -> str:
    return re.sub(r"\s+|\\[ ,;!]", "", _ELLIPSIS.sub("...", text))


@lru_cache(maxsize=256)  # a group of completions shares its reference answer
def _parsed(text: str) -> Any:
    """The sympy value of an answer, or None. Time limits are the parent's business."""
    found = parse(
        f"\\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _exact(value: Any) -> Any:
    """Decimals as fractions, and percentages (an unevaluated factor 1/100) multiplied out."""
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(_exact)
    if not isinstance(value, sympy.Basic):
        return value
    swaps: dict[Any, Any] = {
        number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)
    }
    swaps.update({held: held.args[0] for held in value.atoms(sympy.UnevaluatedExpr)})
    return value.xreplace(swaps) if swaps else value


def _equal(gold: Any, answer: Any, tolerance: float) -> bool:
    gold, answer = _same_side(gold, answer)
    for kind, compare in _STRUCTURES:
        if isinstance(gold, kind) and isinstance(answer, kind):
            return compare(gold, answer, tolerance)
    if _is_constant(gold) and _is_constant(answer):
        return _constants_equal(gold, answer, tolerance)
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _expressions_equal(gold, answer)
    return bool(verify(gold, answer, timeout_seconds=None))


def _same_side(gold: Any, answer: Any) -> tuple[Any, Any]:
    """`x = a` against `x = b` or against `b` is `a` against `b`."""
    gold_named = isinstance(gold, sympy.Eq) and isinstance(gold.lhs, sympy.Symbol)
    answer_named = isinstance(answer, sympy.Eq) and isinstance(answer.lhs, sympy.Symbol)
    if gold_named and answer_named:
        return (gold.rhs, answer.rhs) if gold.lhs == answer.lhs else (gold, answer)
    if gold_named and not isinstance(answer, sympy.Rel):
        return gold.rhs, answer
    if answer_named and not isinstance(gold, sympy.Rel):
        return gold, answer.rhs
    return gold, answer


def _tuples_equal(gold: Any, answer: Any, tolerance: float) -> bool:
    same_length = len(gold.args) == len(answer.args)
    pairs = zip(gold.args, answer.args, strict=False)
    return same_length and all(_equal(a, b, tolerance) for a, b in pairs)


def _sets_equal(gold: Any, answer: Any, tolerance: float) -> bool:
    if len(gold.args) != len(answer.args):
        return False
    if len(gold.args) > _MAX_UNORDERED:
        return gold == answer or bool(verify(gold, answer, timeout_seconds=None))
    return any(
        all(_equal(a, b, tolerance) for a, b in zip(gold.args, order, strict=True))
        for order in permutations(answer.args)
    )


def _intervals_equal(gold: Any, answer: Any, tolerance: float) -> bool:
    return (
        gold.left_open == answer.left_open
        and gold.right_open == answer.right_open
        and _equal(gold.start, answer.start, tolerance)
        and _equal(gold.end, answer.end, tolerance)
    )


def _matrices_equal(gold: Any, answer: Any, tolerance: float) -> bool:
    return gold.shape == answer.shape and all(
        _equal(a, b, tolerance) for a, b in zip(gold, answer, strict=True)
    )


_STRUCTURES = (
    (sympy.Interval, _intervals_equal),
    (sympy.FiniteSet, _sets_equal),
    (sympy.Tuple, _tuples_equal),
    (sympy.MatrixBase, _matrices_equal),
)


def _is_constant(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and not value.free_symbols


def _constants_equal(gold: Any, answer: Any, tolerance: float) -> bool:
    if gold == answer:
        return True
    a, b = sympy.N(gold, _DIGITS), sympy.N(answer, _DIGITS)
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) <= max(sympy.Float(tolerance), _TINY) * abs(a))


def _expressions_equal(gold: Any, answer: Any) -> bool:
    """Equality of expressions in variables: exactly where that is cheap, refuted where they differ
    at some point, and otherwise by math-verify."""
    difference = sympy.expand(gold - answer)
    if difference.is_number:
        return difference == 0 or bool(difference.equals(0))
    names = isinstance(gold, sympy.Symbol) or isinstance(answer, sympy.Symbol)  # "abc" or a*b*c
    if not names and _differ_somewhere(gold, answer):
        return False
    return bool(verify(gold, answer, timeout_seconds=None))


def _differ_somewhere(gold: Any, answer: Any) -> bool:
    symbols = sorted((gold - answer).free_symbols, key=str)
    for probe in _PROBES:
        point = {symbol: probe + place for place, symbol in enumerate(symbols)}
        a, b = sympy.N(gold.subs(point), _DIGITS), sympy.N(answer.subs(point), _DIGITS)
        known = a.is_number and b.is_number and a.is_finite and b.is_finite
        if known and abs(a - b) > max(abs(a), abs(b)) * _TINY:
            return True
    return False


# The first parse builds the parser's tables: part of starting up, not of the first check.
_parsed("\\frac{x}{2} + 1")
