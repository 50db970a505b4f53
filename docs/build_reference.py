"""Write docs/recipes.md from the recipe schema and the signatures of the built-in plug-ins.

python docs/build_reference.py           write the file
python docs/build_reference.py --check   fail if the committed file is not what would be written
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from alignment import registry
from alignment.config.algorithms import BUILT_IN
from alignment.config.fields import Section
from alignment.config.pipeline import STAGE_OUTPUTS, PipelineRecipe
from alignment.config.schema import Recipe
from alignment.runs import expect

TARGET = Path(__file__).with_name("recipes.md")
OURS = ("alignment.", "reward_models.", "evals.")
PLUG_INS: tuple[registry.Kind, ...] = ("source", "reward", "task")

INTRODUCTION = """\
# Recipe reference

<!-- Written by docs/build_reference.py from the code; `make docs` writes it again. -->

One YAML file describes one run. `align check RECIPE` says whether it is right and what it would
do; `align train RECIPE --dry-run` prints it with every default written out.

- YAML is read as YAML 1.2: `1e-5` is a number, `on` is text.
- A key that is not listed here is an error, which names the nearest one that is.
- Any value can be set from the command line: `optim.lr=1e-5`, `rewards.0.weight=2`,
  `model.lora=null`, `data={type: file, path: rows.jsonl}`. An item of a list is named by its
  index, or by its `name`.
- Combinations that cannot work are refused, with the remedy. The rules are in
  `alignment/config/checks.py`.
"""

PLUG_IN_INTRODUCTION = {
    "source": "What `data.type` may be. The source's options are further keys of `data`.",
    "reward": (
        "What `rewards[].type` may be, besides `module:attribute` for a function or class of your "
        "own. The reward's options are further keys of its item."
    ),
    "task": "What `eval.tasks[].type` may be. The task's options are further keys of its item.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One key: its name, the values it takes, its default, and what it is."""

    key: str
    values: str
    default: str
    text: str


def main(arguments: list[str]) -> int:
    text = reference()
    if "--check" not in arguments:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{TARGET} is not current; run: make docs\n")
    return 1


def reference() -> str:
    """The whole page."""
    seen: set[type[BaseModel]] = set()
    parts = [INTRODUCTION, "## The sections\n", *_model_parts(Recipe, "", 2, seen)]
    for names, model in _methods().items():
        parts.append(f"## `algorithm` with type {names}\n")
        parts += _model_parts(model, "algorithm", 3, seen)
    for kind in PLUG_INS:
        parts += [f"## {kind.capitalize()}s\n", PLUG_IN_INTRODUCTION[kind] + "\n"]
        for name in _built_in(kind):
            parts += _plug_in_parts(name, registry.get(kind, name))
    parts += ["## Pipelines\n", _outputs_text(), *_model_parts(PipelineRecipe, "", 3, seen)]
    parts += ["## Expectations\n", inspect.cleandoc(expect.__doc__ or "") + "\n"]
    return "\n".join(parts)


def _methods() -> dict[str, type[Section]]:
    """Names that share a model, joined -> the model."""
    names: dict[type[Section], list[str]] = {}
    for name, target in BUILT_IN.items():
        model = registry.load_target(target, name)
        names.setdefault(model, []).append(name)
    return {" or ".join(f"`{one}`" for one in shared): model for model, shared in names.items()}


def _built_in(kind: registry.Kind) -> Iterator[str]:
    """Names that this distribution registers; what else is installed here does not count."""
    for name in registry.names(kind):
        target = registry.find(kind, name)
        if target is not None and target.startswith(OURS):
            yield name


# -- sections of the schema ---------------------------------------------------------------------


def _model_parts(
    model: type[BaseModel], path: str, level: int, seen: set[type[BaseModel]]
) -> Iterator[str]:
    """The section's text and table, then those of the sections inside it, each model once."""
    seen.add(model)
    yield _paragraphs(model.__doc__ or "")
    yield _table([_field_row(name, field) for name, field in model.model_fields.items()])
    for name, field in model.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is None or inner in seen:
            continue
        many = "[]" if get_origin(field.annotation) is tuple else ""
        inner_path = f"{path}.{name}{many}".lstrip(".")
        yield f"{'#' * level} `{inner_path}`\n"
        yield from _model_parts(inner, inner_path, level + 1, seen)


def _field_row(name: str, field: FieldInfo) -> Row:
    values = _words(field.annotation, field.metadata)
    return Row(name, values, _default(field), _paragraphs(field.description or ""))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if field.default_factory is not None:
        try:
            made = typing.cast(Callable[[], Any], field.default_factory)()
        except (TypeError, KeyError):
            return "depends"
        return _shown(made)
    return _shown(field.default)


def _shown(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "`null`"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return "`{}`"
    if isinstance(value, str) and (not value or value != value.strip()):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds: itself, in an optional, in a list."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return None if annotation is BaseModel else annotation
    return next((found for one in get_args(annotation) if (found := _section_in(one))), None)


# -- types in words -----------------------------------------------------------------------------


def _words(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """An annotation as a recipe's author would say it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return _words(inner, [*extra, *metadata])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (UnionType, typing.Union):
        kept = [one for one in get_args(annotation) if one is not NoneType]
        words = [_words(one, metadata) for one in kept]
        return " or ".join([*words, "`null`"] if len(kept) < len(get_args(annotation)) else words)
    if origin is not None and issubclass(origin, Mapping):
        return "keys and values"
    if origin is tuple or (origin is not None and issubclass(origin, typing.Iterable)):
        inner = [one for one in get_args(annotation) if one is not Ellipsis]
        if origin is tuple and len(inner) > 1:
            return f"[{', '.join(_words(one) for one in inner)}]"
        return f"list of {_words(inner[0])}".replace("list of a section", "list of sections")
    return _scalar(annotation, metadata)


def _scalar(annotation: Any, metadata: typing.Sequence[Any]) -> str:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "a section"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` \\| `false`"}
    return " ".join([names.get(annotation, "anything"), *_bounds(metadata)])


def _bounds(metadata: typing.Sequence[Any]) -> list[str]:
    """Limits, from marks that stand alone or inside a `Field(...)`."""
    marks = [
        mark for one in metadata for mark in (one.metadata if hasattr(one, "metadata") else [one])
    ]
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    found = {
        sign: getattr(m, at)
        for m in marks
        for kind, (sign, at) in signs.items()
        if isinstance(m, kind)
    }
    return [", ".join(f"{sign} {value:g}" for sign, value in found.items())] if found else []


# -- plug-ins -----------------------------------------------------------------------------------


def _plug_in_parts(name: str, factory: Any) -> Iterator[str]:
    about, options = _docstring(inspect.getdoc(factory) or "")
    yield f"### `{name}`\n"
    yield about + "\n"
    hints = typing.get_type_hints(
        factory.__init__ if inspect.isclass(factory) else factory, include_extras=True
    )
    rows = [
        Row(
            parameter.name,
            _words(hints.get(parameter.name, Any)),
            "**required**"
            if parameter.default is inspect.Parameter.empty
            else _shown(parameter.default),
            options.get(parameter.name, ""),
        )
        for parameter in inspect.signature(factory).parameters.values()
    ]
    yield _table(rows) if rows else "It has no options.\n"


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the `Args:` of a docstring, and the text of each argument."""
    before, _, after = text.partition("\nArgs:\n")
    about = re.split(r"\n(?:Raises|Returns)[^\n]*:\n", before)[0].strip()
    options: dict[str, str] = {}
    names: list[str] = []
    indented = after.split("\n")
    for line in indented:
        start = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start.group(1).split(", ")
            options |= dict.fromkeys(names, start.group(2))
        elif line.startswith(" " * 8) and names:
            options |= {name: f"{options[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
        else:
            names = []
    # What follows the arguments without indentation, other than errors, belongs to the text.
    tail = re.split(r"\n(?=\S)", after, maxsplit=1)
    if len(tail) == 2 and not re.match(r"(?:Raises|Returns)[^\n]*:", tail[1]):
        rest = re.split(r"\n(?:Raises|Returns)[^\n]*:\n", tail[1])[0].strip()
        about = f"{about}\n\n{rest}"
    return about, options


# -- pages --------------------------------------------------------------------------------------


def _outputs_text() -> str:
    outputs = ", ".join(f"`${{stages.NAME.{key}}}` ({what})" for key, what in STAGE_OUTPUTS.items())
    return (
        "A recipe with `stages:` is a pipeline. Its stages run in order, and a finished one is not "
        "run again; that a data file under it was edited, or that the code or a package is another "
        "now, is not noticed ([0014](decisions/0014-lineage-by-hashes.md)): delete the stage's "
        "folder to run it again. A stage's `set` may refer to what an earlier stage made: "
        f"{outputs}. A stage's run is kept in `DIR/NAME/stages/STAGE/`.\n\n"
        "`compare`, `expect` and the `expect` of a stage may be changed when the pipeline has run, "
        "in part or to the end: give the command again, and the models are compared again if "
        "`compare` is another, and nothing is trained again. Any other change needs another "
        "`run.name`.\n"
    )


def _paragraphs(text: str) -> str:
    """Prose, with the lines of a paragraph joined."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(one.split()) for one in paragraphs) + "\n"


def _table(rows: list[Row]) -> str:
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for row in rows:
        text = " ".join(row.text.split()).replace("|", "\\|")
        text = text[:1].upper() + text[1:]
        lines.append(f"| `{row.key}` | {row.values} | {row.default} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
