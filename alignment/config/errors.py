"""Validation errors as sentences: where, which key, what was found, and what would be right."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from alignment.config.fields import PROBLEM, Path
from alignment.config.yaml12 import Document
from alignment.types import UserInputError

# What each kind of pydantic error expected; the braces are filled from the error's context.
_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "iterable_type": "a list",
    "dict_type": "a section of keys and values",
    "mapping_type": "a section of keys and values",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "string_too_short": "text that is not empty",
    "model_type": "a section with the keys {keys}",
    "dataclass_type": "a section of keys and values",
}
_NOT_ERRORS = ("default_factory_not_called",)  # follows from another error, which is reported


def user_error(error: ValidationError, document: Document) -> UserInputError:
    """The `UserInputError` that says everything wrong with `document`, one line a problem."""
    by_path: dict[Path, list[Any]] = {}
    for line in error.errors(include_url=False):
        if line["type"] not in _NOT_ERRORS:
            by_path.setdefault(_path(line, document.data), []).append(line)
    lines = [
        f"{document.origin(path)}: {dotted(path)}{_say(path, errors, document.data)}"
        for path, errors in by_path.items()
    ]
    if len(lines) == 1:
        return UserInputError(lines[0])
    return UserInputError("\n".join([f"{document.source}: {len(lines)} problems", *lines]))


def dotted(path: Path) -> str:
    """`rewards.0.weight: `, the path as overrides write it; empty for the top."""
    return ".".join(map(str, path)) + ": " if path else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is near."""
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value as YAML would write it, cut to one readable line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(line: Any, data: Any) -> Path:
    """The path inside `data` of an error; the names pydantic gives to members of a union drop."""
    path: list[str | int] = []
    location = line["loc"]
    for place, key in enumerate(location):
        if _holds(data, key):
            data = data[key]
            path.append(key)
        elif line["type"] == PROBLEM or (line["type"] == "missing" and place == len(location) - 1):
            data = None
            path.append(key)
    return tuple(path)


def _holds(data: Any, key: str | int) -> bool:
    if isinstance(data, Mapping):
        return key in data
    return isinstance(data, list | tuple) and isinstance(key, int) and 0 <= key < len(data)


def _say(path: Path, errors: list[Any], data: Any) -> str:
    problems = [line for line in errors if line["type"] == PROBLEM]
    if problems:
        return "; ".join(line["ctx"]["message"] for line in problems)
    kind, context = errors[0]["type"], errors[0].get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), context.get("keys", []))
    if kind == "missing":
        about = context.get("about", "").split("\n\n")[0].replace("\n", " ")
        return "required, but missing" + (f" ({about.rstrip('.')})" if about else "")
    return _unexpected(errors)


def _unknown_key(key: str, known: Sequence[str]) -> str:
    hint = nearest(key, known)
    allowed = f"{'' if hint else '.'} Allowed: {', '.join(known)}" if known else ""
    return f"unknown key{hint}{allowed}"


def _unexpected(errors: list[Any]) -> str:
    found = errors[0]["input"]
    wanted = list(dict.fromkeys(_wanted(line) for line in errors))
    choices = [choice for line in errors for choice in _choices(line)]
    hint = nearest(found, choices) if isinstance(found, str) else ""
    return f"expected {' or '.join(wanted)}, found {shown(found)}{hint or _quotes(found, errors)}"


def _wanted(line: Any) -> str:
    context = {**line.get("ctx", {})}
    if "keys" in context:
        context["keys"] = ", ".join(context["keys"])
    template = _EXPECTED.get(line["type"])
    try:
        return template.format(**context) if template else f"valid input ({line['msg']})"
    except KeyError:
        return str(line["msg"])


def _choices(line: Any) -> list[str]:
    """The texts a Literal or an enum allows, from pydantic's `'a', 'b' or 'c'`."""
    if line["type"] not in ("literal_error", "enum"):
        return []
    return str(line.get("ctx", {}).get("expected", "")).split("'")[1::2]


def _quotes(found: Any, errors: list[Any]) -> str:
    kinds = {line["type"] for line in errors}
    if isinstance(found, str) and kinds & {"int_type", "float_type", "bool_type"}:
        return " (text)" if not _is_number(found) else " (text); remove the quotes"
    if "string_type" in kinds and isinstance(found, int | float):
        return "; put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
