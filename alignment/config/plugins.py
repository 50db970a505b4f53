"""Sections whose `type` names a plug-in, and whose other keys are that plug-in's options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from alignment import registry
from alignment.config.fields import Section, key_descriptions, problem, raise_problems
from alignment.config.options import check_options, resolve
from alignment.types import UserInputError


class PluginSection(Section):
    """A section whose `type` names a plug-in, and whose other keys are the plug-in's options."""

    model_config = ConfigDict(extra="allow")
    KIND: ClassVar[registry.Kind]

    type: str
    """A registered name, or "module:attribute"."""

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's options, as given."""
        return dict(self.model_extra or {})

    @field_validator("type")
    @classmethod
    def _type_exists(cls, value: str) -> str:
        try:
            resolve(cls.KIND, value)
        except UserInputError as error:
            raise ValidationError.from_exception_data(
                "type", [problem((), str(error), value)]
            ) from None
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> PluginSection:
        factory = resolve(self.KIND, self.type)
        keys = key_descriptions(type(self))
        raise_problems("type", _clashes(factory, keys))
        check_options(
            factory,
            self.options,
            section_keys=keys,
            # A reward that is a function gets the columns of the data as arguments, too.
            partial=self.KIND == "reward" and not inspect.isclass(factory),
        )
        return self


def _clashes(factory: Any, keys: Mapping[str, str]) -> Iterator[InitErrorDetails]:
    """Options a plug-in cannot do without, but that mean something else in its section."""
    for name, parameter in inspect.signature(factory).parameters.items():
        if name in keys and parameter.default is inspect.Parameter.empty:
            yield problem(
                ("type",),
                f"the plug-in needs an option {name!r}, but here {name!r} means something else; "
                "its author has to rename it",
            )
