"""What every section of a recipe is made of: the base model, checked scalars, and problems.

Scalars are strict, because YAML already says what is a number and what is text: the text "8" for
`group_size` is a mistake to report, not a value to convert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Strict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Path = tuple[str | int, ...]
"""Where in a recipe something stands: keys and list indices from the top."""

Bool = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Ge(0)]
PositiveCount = Annotated[int, Strict(), Ge(1)]
Number = Annotated[float, Strict()]
NonNegative = Annotated[float, Strict(), Ge(0.0)]
Positive = Annotated[float, Strict(), Gt(0.0)]
Fraction = Annotated[float, Strict(), Ge(0.0), Le(1.0)]

PROBLEM = "recipe_problem"
"""Error type of the problems that state their own message in full."""


class Section(BaseModel):
    """A section of a recipe: immutable, and no key but its own is accepted."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _errors_name_the_keys(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise with_key_names(error, key_descriptions(cls)) from None


def key_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The keys a section takes, each with what it is."""
    return {
        field.alias or name: field.description or "" for name, field in model.model_fields.items()
    }


def with_key_names(error: ValidationError, keys: Mapping[str, str]) -> ValidationError:
    """`error` of one section, where unknown, missing and misplaced keys carry the valid `keys`.

    pydantic says that a key is unknown but not which ones are known; this adds them, at the level
    where they are at hand, for `alignment.config.errors` to print.
    """
    return ValidationError.from_exception_data(
        error.title, [_detail(line, keys) for line in error.errors(include_url=False)]
    )


def _detail(line: Any, keys: Mapping[str, str]) -> InitErrorDetails:
    context = {name: _plain(value) for name, value in line.get("ctx", {}).items()}
    own = len(line["loc"]) == (0 if line["type"] == "model_type" else 1)
    if own and line["type"] in ("extra_forbidden", "model_type"):
        context.setdefault("keys", list(keys))
    if own and line["type"] == "missing":
        context.setdefault("about", keys.get(str(line["loc"][0]), ""))
    return InitErrorDetails(
        type=PydanticCustomError(line["type"], line["msg"], context),
        loc=line["loc"],
        # A problem says it all, and may be about a value that is nobody's business.
        input=None if line["type"] == PROBLEM else line["input"],
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Exception) else value


def problem(path: Path, message: str, found: Any = None) -> InitErrorDetails:
    """A problem at `path` of the section being validated; `message` says it all."""
    return InitErrorDetails(
        type=PydanticCustomError(PROBLEM, "{message}", {"message": message}),
        loc=path,
        input=found,
    )


def raise_problems(title: str, problems: Iterable[InitErrorDetails]) -> None:
    """Raise the problems found in a section, all at once, where there are any."""
    found: Sequence[InitErrorDetails] = list(problems)
    if found:
        raise ValidationError.from_exception_data(title, list(found))
