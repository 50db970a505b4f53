"""Every recipe in the wheel loads, says what it is for, and survives the round trip."""

from __future__ import annotations

import pytest

from alignment.config import describe_counts, dump_recipe, load_recipe, shipped_recipes
from alignment.config.load import parse_recipe

NAMES = list(shipped_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert describe_counts(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_says_what_it_is_for(name: str) -> None:
    assert shipped_recipes()[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_says_what_must_hold_of_its_run(name: str) -> None:
    assert load_recipe(name).expect


def test_launch_configurations_are_no_recipes() -> None:
    assert not [name for name in NAMES if name.startswith("accelerate")]
