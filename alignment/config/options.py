"""Options of plug-ins, checked against the signature of whatever the plug-in registered.

A reward, a source or a task is a class or a function. Its keyword parameters *are* its options:
their names, annotations and defaults are checked as strictly as the recipe's own keys, with the
same messages, so a plug-in declares nothing twice.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic import create_model as create_pydantic_model
from pydantic_core import to_json

from alignment import registry
from alignment.config.errors import user_error
from alignment.config.fields import with_key_names
from alignment.config.yaml12 import Document

_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def resolve(kind: registry.Kind, name: str) -> Any:
    """The plug-in that a recipe's `type` names: a registered name, or "module:attribute".

    Raises:
        UserInputError: there is no such plug-in, or it cannot be imported.
    """
    if ":" in name:
        return registry.load_target(name, kind)
    return registry.get(kind, name)


def build(kind: registry.Kind, name: str, options: Mapping[str, Any]) -> Any:
    """Make the plug-in `name` with a recipe's options.

    Raises:
        UserInputError: as `resolve` and `validate_options`.
    """
    factory = resolve(kind, name)
    return factory(**validate_options(factory, options, where=f"{kind} {name!r}"))


def validate_options(
    factory: Callable[..., Any], options: Mapping[str, Any], *, where: str = "options"
) -> dict[str, Any]:
    """Keyword arguments for `factory` from a recipe's options: checked, and of the right types.

    Args:
        factory: a class or function; its keyword parameters are the options it takes.
        options: what the recipe says.
        where: what to call the options in messages.

    Returns:
        The options given, converted where YAML has no such type (a path, a tuple, an enum).

    Raises:
        UserInputError: an unknown or missing option, or a value of the wrong type.
    """
    try:
        return check_options(factory, options)
    except ValidationError as error:
        raise user_error(error, Document(dict(options), where)) from error


def check_options(
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    section_keys: Mapping[str, str] | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """As `validate_options`, for use inside pydantic validation.

    Args:
        section_keys: further keys of the section, to be listed among the valid ones.
        partial: a parameter without a default may still be left out; something else fills it.

    Raises:
        pydantic.ValidationError: located relative to the options.
    """
    model = _options_model(factory, partial)
    names = {str(field.alias): "" for field in model.model_fields.values()}
    try:
        # YAML values are JSON values: strict JSON rules take a list for a tuple and text for an
        # enum or a path, and still no text for a number.
        checked = model.model_validate_json(to_json(dict(options)), strict=True)
    except ValidationError as error:
        raise with_key_names(error, {**names, **(section_keys or {})}) from None
    given = {
        str(field.alias): getattr(checked, name)
        for name, field in model.model_fields.items()
        if name in checked.model_fields_set
    }
    return {**given, **(checked.model_extra or {})}


@cache
def _options_model(factory: Callable[..., Any], partial: bool) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    takes_any = False
    for parameter in inspect.signature(factory).parameters.values():
        takes_any |= parameter.kind is inspect.Parameter.VAR_KEYWORD
        if parameter.kind not in _KEYWORDS:
            continue
        required = parameter.default is inspect.Parameter.empty and not partial
        # Numbered names with aliases: a parameter may be called what a pydantic model reserves.
        fields[f"option_{len(fields)}"] = (
            _annotation(factory, parameter),
            Field(default=... if required else None, alias=parameter.name),
        )
    config = ConfigDict(extra="allow" if takes_any else "forbid", arbitrary_types_allowed=True)
    name = getattr(factory, "__name__", type(factory).__name__)
    return create_pydantic_model(f"{name}_options", __config__=config, **fields)


def _annotation(factory: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type of a parameter; `Any` where there is none that could be checked."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        if isinstance(annotation, str):
            annotation = eval(annotation, _namespace(factory))
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, NameError, AttributeError, TypeError, SyntaxError):
        return Any
    return annotation


def _namespace(factory: Callable[..., Any]) -> dict[str, Any]:
    """The names an annotation of `factory` was written among."""
    module = sys.modules.get(getattr(factory, "__module__", ""))
    return dict(vars(module)) if module is not None else {}
