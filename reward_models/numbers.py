"""Plain numbers in the ways people write them, as exact fractions. Nothing is evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

_MAX_LENGTH = 200  # characters: no numeral is longer, and the patterns stay cheap
_MAX_EXPONENT = 400

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"(?P<whole>{_INTEGER})?(?P<part>\.\d*)?")
_SCIENTIFIC = re.compile(
    r"(?P<mantissa>\d(?:\.\d+)?)"
    r"(?:[eE]|\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\s*(?:\^|\*\*)\s*)\{?(?P<exponent>[-+]?\d{1,4})\}?"
)
_FRACTION = re.compile(
    r"(?:(?P<whole>\d+)\s*)?\\frac\s*"
    r"(?:\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}|(?P<top1>\d)\s*(?P<bottom1>\d))"
)
_SLASH = re.compile(r"(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)")

_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|boldsymbol|mbox)\s*\{([^{}]*)\}")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|[,!;:>])|\\(?= )|[$~\u20ac\u00a3]|\\\$")
_DEGREES = re.compile(r"\s*(?:\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree|\u00b0)$")
_TEXT_UNIT = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*(?P<words>[a-zA-Z][a-zA-Z ./-]*?)\s*\}(?:\^\{?[23]\}?)?\.?$"
)
_WORD_UNIT = re.compile(
    r"(?P<space>\s*)(?<![a-zA-Z\\])(?P<words>[a-zA-Z]{2,}(?:[ -][a-zA-Z]+){0,3})"
    r"(?:\^\{?[23]\}?)?\.?$"
)
_VOWEL = re.compile("[aeiou]")
_PERCENT = re.compile(r"\s*(?:\\?%|\bpercent|\bper cent)$")
_ASSIGNED = re.compile(r"[^<>!\u2264\u2265,;=]{1,60}=\s*(?P<value>[^=]*)")

_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SHORT_UNITS = frozenset(
    {"cm", "mm", "km", "nm", "kg", "mg", "lb", "lbs", "oz", "ml", "dl", "ft", "yd"}
    | {"hr", "hrs", "sec", "ms", "mph", "kph", "kmh", "kw", "hz"}
)
_NOT_UNITS = frozenset(
    {"or", "and", "to", "not", "than", "if", "but", "plus", "minus", "times", "over", "per"}
    | {"divided", "by", "mod", "factorial", "squared", "cubed", "dozen", "trillion"}
    | {"half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths"}
    | {"fifth", "fifths", "tenth", "tenths", "hundredth", "hundredths", "thousandths"}
    | {"pi", "sqrt", "root", "sin", "cos", "tan", "log", "ln", "exp"}
)


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number as it was written.

    value:     exactly what it is worth; a percent sign divides by 100, a unit is left out.
    canonical: False for a fraction that is not in lowest terms ("6/2", "2/4"), which states a
               division rather than its result.
    """

    value: Fraction
    canonical: bool = True


def plain_number(text: str) -> PlainNumber | None:
    """Read a plain number, or None where the text is anything else.

    Plain are integers and decimals (thousands separated or not), `a/b`, `\\frac{a}{b}`, mixed
    numbers, scientific notation, a percent or currency sign, degrees, a unit in words after the
    number, and `x = ...` before it. Sums, powers, roots and functions are not.
    """
    if len(text) > _MAX_LENGTH:
        return None
    wrapped = _WRAPPER.fullmatch(text.strip())
    text = _simplified(wrapped[1] if wrapped else text)
    assigned = _ASSIGNED.fullmatch(text)
    if assigned:
        text = assigned["value"].strip()
    text, factor = _without_percent_and_unit(text)
    text = _unwrapped(text)
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-").lstrip() if text[:1] in ("+", "-") else text
    if text[1:2] in ("+", "-"):
        return None
    number = _fraction(digits) or _scientific(digits) or _decimal(digits)
    if number is None:
        return None
    return PlainNumber(sign * factor * number.value, number.canonical)


def _simplified(text: str) -> str:
    text = text.strip().strip("*").replace("\u2212", "-").replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _DROPPED.sub("", text).strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    return text


def _unwrapped(text: str) -> str:
    """Without fonts and the brackets around everything."""
    text = _WRAPPER.sub(r"\1", text).strip()
    while len(text) > 1 and (text[0], text[-1]) in (("(", ")"), ("{", "}")):
        if any(character in text[1:-1] for character in "(){}"):
            break
        text = text[1:-1].strip()
    return text


def _without_percent_and_unit(text: str) -> tuple[str, Fraction]:
    percent = _PERCENT.search(text)
    if percent:
        return text[: percent.start()].rstrip(), Fraction(1, 100)
    degrees = _DEGREES.search(text)
    if degrees:
        return text[: degrees.start()].rstrip(), Fraction(1)
    unit = _TEXT_UNIT.search(text) or _WORD_UNIT.search(text)
    if unit is None or not text[: unit.start()].strip():
        return text, Fraction(1)
    words = re.split("[ -]+", unit["words"].lower())
    factor = Fraction(_MULTIPLIERS.get(words[0], 1))
    named = words[1:] if factor != 1 else words
    if _NOT_UNITS.intersection(named):
        return text, Fraction(1)
    if unit.re is _WORD_UNIT and named and not _is_unit(named[0], bool(unit["space"])):
        return text, Fraction(1)
    return text[: unit.start()].rstrip(), factor


def _is_unit(word: str, spaced: bool) -> bool:
    """Whether letters after a number are a unit rather than a product of variables ("3xy")."""
    return word in _SHORT_UNITS or (spaced and len(word) > 2 and bool(_VOWEL.search(word)))


def _fraction(text: str) -> PlainNumber | None:
    match = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    if match is None:
        return None
    groups = match.groupdict()
    whole = int(groups["whole"] or 0)
    top = int(groups["top"] or groups["top1"])
    bottom = int(groups["bottom"] or groups["bottom1"])
    if bottom == 0 or (groups["whole"] and top < 0):
        return None
    lowest = gcd(top, bottom) == 1 and bottom > 1
    proper = not groups["whole"] or top < bottom
    return PlainNumber(whole + Fraction(top, bottom), lowest and proper)


def _scientific(text: str) -> PlainNumber | None:
    match = _SCIENTIFIC.fullmatch(text)
    if match is None or abs(int(match["exponent"])) > _MAX_EXPONENT:
        return None
    return PlainNumber(Fraction(match["mantissa"]) * Fraction(10) ** int(match["exponent"]))


def _decimal(text: str) -> PlainNumber | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or not any(character.isdigit() for character in text):
        return None
    whole = (match["whole"] or "0").replace(",", "")
    return PlainNumber(Fraction(whole + (match["part"] or "").rstrip(".")))
