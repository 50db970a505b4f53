"""Overrides of single values: `key.path=value`, from a command line or a pipeline's stage."""

from __future__ import annotations

from typing import Any

from alignment.config.errors import shown
from alignment.config.fields import Path
from alignment.config.yaml12 import Document, parse_value
from alignment.types import UserInputError


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` as the dotted key and the value, which is read as YAML 1.2.

    Raises:
        UserInputError: no `=`, no key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserInputError(
            f"override {text!r}: write key.path=value, such as optim.lr=1e-5 or rewards.0.weight=2"
        )
    return key, parse_value(value, f"override {text!r}")


def set_value(document: Document, key: str, value: Any, origin: str) -> None:
    """Set the value at a dotted key, making the sections on the way that do not exist yet.

    An item of a list is named by its index, or by its `name` where it has one. In a pipeline, what
    follows `stages.NAME.set` is one key: that of the stage's recipe.

    Args:
        origin: what messages about this value name as its source.

    Raises:
        UserInputError: the key leads through something that is not a section.
    """
    parts = key.split(".")
    if "" in parts:
        raise UserInputError(f"{origin}: the key {key!r} has an empty part")
    if parts[0] == "stages" and parts[2:3] == ["set"] and len(parts) > 4:
        parts = [*parts[:3], ".".join(parts[3:])]
    path: list[str | int] = []
    holder = document.data
    for part in parts[:-1]:
        step = _step(holder, part, path, origin)
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
            document.origins[(*path, step)] = origin
        holder = holder[step]
        path.append(step)
    step = _step(holder, parts[-1], path, origin)
    holder[step] = value
    _forget_origins(document, (*path, step))
    document.origins[(*path, step)] = origin


def _step(holder: Any, part: str, path: list[str | int], origin: str) -> str | int:
    where = ".".join(map(str, path))
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        raise UserInputError(
            f"{origin}: {where} is {shown(holder)}, which has no key {part!r} inside; set {where} "
            "as a whole"
        )
    names = [item.get("name") if isinstance(item, dict) else None for item in holder]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(holder):
        return int(part)
    named = f", or a name ({', '.join(filter(None, names))})" if any(names) else ""
    indices = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
    raise UserInputError(f"{origin}: {where} has no item {part!r}; use an index ({indices}){named}")


def _forget_origins(document: Document, path: Path) -> None:
    for known in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[known]
