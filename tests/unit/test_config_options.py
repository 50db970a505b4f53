"""Options of plug-ins against the signature of what they registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from alignment import registry
from alignment.config.options import build, validate_options
from alignment.types import UserInputError

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Plugin:
    def __init__(
        self,
        number: float,
        count: int = 1,
        *,
        names: Sequence[str] = (),
        pair: tuple[int, int] = (0, 0),
        path: Path | None = None,
        colour: Colour = Colour.RED,
        mode: Literal["fast", "slow"] = "fast",
        table: Mapping[str, int] | None = None,
        either: int | str = 0,
        json: bool = False,
        odd: Unknown | None = None,  # a name that exists for type checkers only
    ) -> None:
        self.number = number
        self.colour = colour


@dataclass
class AsDataclass:
    size: int
    names: list[str] = field(default_factory=list)


def takes_anything(first: int, **others: Any) -> None: ...


def unannotated(first, second=2): ...  # type: ignore[no-untyped-def]


def refusal(factory: Any, **options: Any) -> str:
    with pytest.raises(UserInputError) as caught:
        validate_options(factory, options)
    return str(caught.value)


def test_options_come_back_as_given_and_only_those() -> None:
    assert validate_options(Plugin, {"number": 0.5}) == {"number": 0.5}
    assert validate_options(AsDataclass, {"size": 3, "names": ["a"]}) == {
        "size": 3,
        "names": ["a"],
    }
    assert validate_options(unannotated, {"first": [1]}) == {"first": [1]}


def test_what_yaml_has_no_type_for_is_converted() -> None:
    found = validate_options(
        Plugin, {"number": 1, "pair": [3, 4], "path": "a/b", "colour": "blue", "names": ["x"]}
    )
    assert found == {
        "number": 1.0,
        "pair": (3, 4),
        "path": Path("a/b"),
        "colour": Colour.BLUE,
        "names": ["x"],
    }
    assert type(found["number"]) is float
    assert found["colour"] is Colour.BLUE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "options: number: required, but missing"),
        ({"number": "1"}, 'options: number: expected a number, found "1" (text); remove'),
        ({"number": True}, "options: number: expected a number, found true"),
        ({"number": 1, "count": 1.5}, "options: count: expected a whole number, found 1.5"),
        ({"number": 1, "names": "x"}, 'options: names: expected a list, found "x"'),
        ({"number": 1, "names": [1]}, "options: names.0: expected text, found 1"),
        ({"number": 1, "pair": [1]}, "options: pair.1: required, but missing"),
        ({"number": 1, "colour": "bleu"}, "expected 'red' or 'blue', found \"bleu\"; did you mean"),
        ({"number": 1, "mode": "fats"}, "expected 'fast' or 'slow', found \"fats\"; did you mean"),
        ({"number": 1, "table": {"a": "b"}}, "options: table.a: expected a whole number"),
        ({"number": 1, "either": []}, "options: either: expected a whole number or text, found []"),
        ({"number": 1, "json": 1}, "options: json: expected true or false, found 1"),
        (
            {"number": 1, "cuont": 1},
            "options: cuont: unknown key; did you mean 'count'? Allowed: nu",
        ),
    ],
)
def test_a_wrong_option_is_explained(options: dict[str, Any], message: str) -> None:
    assert message in refusal(Plugin, **options)


def test_an_annotation_that_cannot_be_resolved_takes_anything() -> None:
    assert validate_options(Plugin, {"number": 1, "odd": [1]})["odd"] == [1]


def test_a_plug_in_with_keywords_of_any_name_takes_them() -> None:
    assert validate_options(takes_anything, {"first": 1, "else": "x"}) == {"first": 1, "else": "x"}
    assert "first: expected a whole number" in refusal(takes_anything, first="x", other=1)


def test_build_makes_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "reward", {"thing": Plugin})
    made = build("reward", "thing", {"number": 2, "colour": "blue"})
    assert isinstance(made, Plugin)
    assert made.colour is Colour.BLUE
    with pytest.raises(UserInputError, match="reward 'thing': numbr: unknown key"):
        build("reward", "thing", {"numbr": 2})
    with pytest.raises(UserInputError, match="did you mean 'thing'"):
        build("reward", "thin", {})
