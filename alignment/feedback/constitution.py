"""A constitution: the principles that critiques, revisions and preferences follow, in a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, model_validator

import alignment
from alignment.config.errors import user_error
from alignment.config.fields import Section, problem, raise_problems
from alignment.config.yaml12 import parse_document
from alignment.registry import unknown_name
from alignment.rollout.sampling import row_key
from alignment.types import UserInputError

Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]

_SHIPPED = Path(alignment.__file__).parent.parent / "recipes" / "constitutions"


class Principle(Section):
    """One rule, in the three forms in which a model is asked about it."""

    name: Text
    """What records call it."""
    critique: Text
    """Asks for what is wrong with an answer."""
    revision: Text
    """Asks for the answer to be written again."""
    preference: Text
    """Says what makes one answer better than another."""


class Example(Section):
    """A critique and a revision to imitate, shown before the conversation at hand."""

    question: Text
    response: Text
    principle: Text
    """Name of the principle that it is an example of."""
    critique: Text
    revision: Text


class Constitution(Section):
    """Principles, and examples of how they are followed."""

    principles: tuple[Principle, ...] = Field(min_length=1)
    examples: tuple[Example, ...] = ()

    @model_validator(mode="after")
    def _names_are_right(self) -> Constitution:
        names = Counter(principle.name for principle in self.principles)
        problems = [
            problem(("principles", i, "name"), f"{principle.name!r} is the name of two principles")
            for i, principle in enumerate(self.principles)
            if names[principle.name] > 1
        ]
        problems += [
            problem(
                ("examples", i, "principle"), unknown_name("principle", text.principle, list(names))
            )
            for i, text in enumerate(self.examples)
            if text.principle not in names
        ]
        raise_problems("constitution", problems)
        return self

    def principle(self, name: str) -> Principle:
        """The principle called `name`, which exists."""
        return next(principle for principle in self.principles if principle.name == name)

    def draw(self, seed: int, item: int, round_: int = 0) -> Principle:
        """The principle of one item in one round: drawn at random, by these counters alone."""
        key = row_key(seed, round_, item, 0)
        return self.principles[key % len(self.principles)]


def load_constitution(path_or_name: str | Path) -> Constitution:
    """Load and check a constitution: a YAML file, or the name of a shipped one.

    Raises:
        UserInputError: everything that is wrong with it, with file, line and dotted path.
    """
    path = Path(path_or_name)
    if not path.is_file():
        path = _shipped(str(path_or_name))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserInputError(f"{path}: cannot be read: {error.strerror}") from error
    document = parse_document(text, str(path))
    try:
        return Constitution.model_validate(document.data)
    except ValidationError as error:
        raise user_error(error, document) from error


def shipped_constitutions() -> dict[str, Path]:
    """The constitutions that come with the toolkit: name -> file."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def _shipped(name: str) -> Path:
    shipped = shipped_constitutions()
    if name not in shipped:
        hint = unknown_name("constitution", name, list(shipped))
        raise UserInputError(f"there is no constitution file {name!r}; {hint}")
    return shipped[name]
