"""A recipe's `expect` lines: what the metrics of a finished run must satisfy.

    reward/mean[-5:] > reward/mean[:5] + 0.2
    kl/mean < 0.5
    max(grad_norm) <= 10 * median(grad_norm[-20:])

Grammar, read by hand and never evaluated as code:

    expectation = sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
    sum         = product (("+" | "-") product)*
    product     = factor (("*" | "/") factor)*
    factor      = "-" factor | number | "(" sum ")" | metric | function "(" metric ")"
    metric      = name ["[" index "]" | "[" [index] ":" [index] "]"]
    function    = mean | min | max | last | first | median

A metric is the series of its values over the records that have it, in order; `[10]`, `[-5:]` and
`[:5]` pick from that series as Python does. A bare name is its last value, a bare slice its mean.

Names hold `/` and `-` inside (`eval/held-out/accuracy`), and names win: where `/` or `-` stands
between two word characters, without spaces, it belongs to the name. To divide by or to subtract
after a name, put spaces around the sign: `loss / 2`, `loss - 0.1`. A name with other characters
is quoted: `"my metric"`.

A side that is not a finite number (a NaN in the series, a division by zero) fails the expectation,
whatever the comparison.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from alignment.runs.files import readable_errors
from alignment.runs.metrics import read_metrics
from alignment.types import UserInputError

Series = Mapping[str, Sequence[float]]

_MAX_DEPTH = 50

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_FUNCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),  # fmean refuses infinities of both signs
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
    "first": lambda values: values[0],
    "median": statistics.median,
}

_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.@]*(?:[/-](?=\w)[\w.@]+)*)"
    r"|\"(?P<quoted>[^\"]+)\""
    r"|(?P<sign><=|>=|==|!=|[-+*/<>()\[\]:])",
    re.ASCII,
)


class _Unmet(Exception):
    """An expectation that cannot be compared, and so is not met. The text says why."""


@dataclass(frozen=True, slots=True)
class ExpectationResult:
    """Whether one expectation holds, with the numbers that say so."""

    text: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """One comparison of two sums over metrics."""

    text: str
    left: _Node
    comparison: str
    right: _Node

    def evaluate(self, metrics: Sequence[Mapping[str, Any]]) -> ExpectationResult:
        """Compare, given the records of a `metrics.jsonl`."""
        series = _series(metrics)
        try:
            left, right = self.left.value(series), self.right.value(series)
        except _Unmet as problem:
            return ExpectationResult(self.text, False, str(problem))
        comparable = math.isfinite(left) and math.isfinite(right)
        passed = comparable and _COMPARISONS[self.comparison](left, right)
        verdict = "holds" if passed else "does not hold" if comparable else "is not finite"
        return ExpectationResult(
            self.text, passed, f"{left:.6g} {self.comparison} {right:.6g} {verdict}"
        )


class _Node(Protocol):
    def value(self, series: Series) -> float: ...


@dataclass(frozen=True, slots=True)
class _Number:
    number: float

    def value(self, series: Series) -> float:
        return self.number


@dataclass(frozen=True, slots=True)
class _Negative:
    operand: _Node

    def value(self, series: Series) -> float:
        return -self.operand.value(series)


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    left: _Node
    sign: str
    right: _Node

    def value(self, series: Series) -> float:
        left, right = self.left.value(series), self.right.value(series)
        if self.sign == "/" and right == 0:
            raise _Unmet(f"{left:.6g} is divided by zero")
        return _ARITHMETIC[self.sign](left, right)


@dataclass(frozen=True, slots=True)
class _Metric:
    """A function of some of a metric's values."""

    name: str
    window: slice
    function: str

    def value(self, series: Series) -> float:
        if self.name not in series:
            raise _Unmet(_absent(self.name, series))
        values = series[self.name][self.window]
        if not values:
            raise _Unmet(
                f"{self.name!r} has {len(series[self.name])} values, none in the part asked for"
            )
        if any(math.isnan(value) for value in values):
            return math.nan
        return _FUNCTIONS[self.function](values)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    column: int


def parse_expectation(text: str) -> Expectation:
    """Read one expectation.

    Raises:
        UserInputError: it is not of the grammar above; the message gives the column.
    """
    parser = _Parser(text)
    left = parser.sum(0)
    sign = parser.next()
    if sign.text not in _COMPARISONS or sign.kind != "sign":
        raise parser.problem(sign, "expected a comparison (<, <=, >, >=, ==, !=)")
    right = parser.sum(0)
    end = parser.next()
    if end.kind == "sign" and end.text in _COMPARISONS:
        raise parser.problem(end, "a second comparison; write two expectations")
    if end.kind != "end":
        raise parser.problem(end, "expected the end")
    return Expectation(text, left, sign.text, right)


def verify_run(path: Path | str) -> list[ExpectationResult]:
    """Check a run directory's metrics against the `expect` of its recipe; [] if it has none.

    Raises:
        UserInputError: there is no run, its recipe cannot be read, or it has no metrics.
    """
    recipe = Path(path) / "recipe.yaml"
    if not recipe.is_file():
        raise UserInputError(f"{path} is no run: it has no recipe.yaml; give a run's folder")
    expectations = [parse_expectation(text) for text in _expect_of(recipe)]
    metrics = read_metrics(Path(path) / "metrics.jsonl")
    if expectations and not metrics:
        raise UserInputError(f"{path} has no metrics yet; verify it after its training")
    return [expectation.evaluate(metrics) for expectation in expectations]


class _Parser:
    """Recursive descent; each method reads one rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokenize()
        self.place = 0

    def sum(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise self.problem(self.peek(), "nested too deep")
        node = self.product(depth)
        while self.peek_sign("+", "-"):
            node = _Arithmetic(node, self.next().text, self.product(depth))
        return node

    def product(self, depth: int) -> _Node:
        node = self.factor(depth)
        while self.peek_sign("*", "/"):
            node = _Arithmetic(node, self.next().text, self.factor(depth))
        return node

    def factor(self, depth: int) -> _Node:
        negative = False
        while self.peek_sign("-"):
            self.next()
            negative = not negative
        node = self.positive(depth)
        return _Negative(node) if negative else node

    def positive(self, depth: int) -> _Node:
        token = self.next()
        if token.kind == "number":
            return _Number(float(token.text))
        if token.kind == "name" and self.peek_sign("("):
            return self.call(token)
        if token.kind in ("name", "quoted"):
            return self.metric(token, None)
        if token.kind == "sign" and token.text == "(":
            node = self.sum(depth + 1)
            self.expect(")")
            return node
        raise self.problem(token, "expected a number, a metric or '('")

    def call(self, function: _Token) -> _Node:
        if function.text not in _FUNCTIONS:
            near = difflib.get_close_matches(function.text, _FUNCTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_FUNCTIONS)}"
            raise self.problem(function, f"unknown function; {hint}")
        self.expect("(")
        name = self.next()
        if name.kind not in ("name", "quoted"):
            raise self.problem(name, f"expected a metric in {function.text}(...)")
        node = self.metric(name, function.text)
        self.expect(")")
        return node

    def metric(self, name: _Token, function: str | None) -> _Node:
        if not self.peek_sign("["):
            return _Metric(name.text, slice(None), function or "last")
        self.next()
        start = self.index()
        if self.peek_sign(":"):
            self.next()
            window = slice(start, self.index())
            self.expect("]")
            return _Metric(name.text, window, function or "mean")
        if start is None:
            raise self.problem(self.peek(), "expected an index or ':'")
        self.expect("]")
        window = slice(start, None if start == -1 else start + 1)
        return _Metric(name.text, window, function or "last")

    def index(self) -> int | None:
        negative = self.peek_sign("-")
        if negative:
            self.next()
        if self.peek().kind != "number":
            if negative:
                raise self.problem(self.peek(), "expected a whole number")
            return None
        token = self.next()
        if not token.text.isdecimal() or len(token.text) > 9:
            raise self.problem(token, "expected a whole number")
        return -int(token.text) if negative else int(token.text)

    def peek(self) -> _Token:
        return self.tokens[self.place]

    def peek_sign(self, *signs: str) -> bool:
        return self.peek().kind == "sign" and self.peek().text in signs

    def next(self) -> _Token:
        token = self.tokens[self.place]
        self.place = min(self.place + 1, len(self.tokens) - 1)
        return token

    def expect(self, sign: str) -> None:
        token = self.next()
        if token.kind != "sign" or token.text != sign:
            raise self.problem(token, f"expected {sign!r}")

    def problem(self, token: _Token, what: str) -> UserInputError:
        found = f"{token.text!r}" if token.kind != "end" else "the end"
        return UserInputError(
            f"expectation {self.text!r}, column {token.column}, at {found}: {what}; an example "
            "is 'reward/mean[-5:] > reward/mean[:5] + 0.2'"
        )

    def _tokenize(self) -> list[_Token]:
        tokens: list[_Token] = []
        place = 0
        while place < len(self.text):
            match = _TOKEN.match(self.text, place)
            if match is None:
                stranger = _Token("stranger", self.text[place], place + 1)
                raise self.problem(stranger, "this character has no meaning here")
            kind = match.lastgroup or ""
            if kind != "space":
                tokens.append(_Token(kind, match[kind], place + 1))
            place = match.end()
        return [*tokens, _Token("end", "", len(self.text) + 1)]


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {}
    for record in metrics:
        for name, value in record.items():
            if isinstance(value, int | float):
                series.setdefault(name, []).append(float(value))
    return series


def _absent(name: str, series: Series) -> str:
    shorter = [known for known in series if name.startswith((f"{known}/", f"{known}-"))]
    if shorter:
        known = max(shorter, key=len)
        sign = name[len(known)]
        return (
            f"no metric {name!r}; {known!r} is one: for arithmetic with it, put spaces around "
            f"{sign!r}"
        )
    near = difflib.get_close_matches(name, list(series), n=3, cutoff=0.5)
    hint = f"near it are {', '.join(near)}" if near else f"there are {', '.join(sorted(series))}"
    return f"no metric {name!r} in this run; {hint}"


def _expect_of(recipe: Path) -> list[str]:
    with readable_errors("read", recipe):
        text = recipe.read_text(encoding="utf-8")
    try:
        document = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserInputError(f"{recipe} is not valid YAML: {error}") from error
    expect = document.get("expect") if isinstance(document, dict) else None
    if expect is None:
        return []
    if not isinstance(expect, list) or not all(isinstance(line, str) for line in expect):
        raise UserInputError(f"{recipe}: expect must be a list of text, not {expect!r}")
    return expect
