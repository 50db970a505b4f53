"""docs/preferences.md against the code: its recipes load, its tables name every kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from documented import documented_metrics
from ruamel.yaml import YAML

from alignment.config import Recipe, parse_recipe
from alignment.config.methods.kto import UnpairedLossConfig
from alignment.config.methods.preference import PreferenceLossConfig
from alignment.config.pipeline import PipelineRecipe
from alignment.losses.preference_kinds import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = PAGE.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.split("\n")[0])
def test_the_recipes_of_the_page_load(text: str) -> None:
    assert isinstance(parse_recipe(text), Recipe | PipelineRecipe)


def test_every_kind_of_preference_loss_has_its_row() -> None:
    rows = table("DPO and its relatives")
    assert [row[0].strip("`") for row in rows] == list(KINDS)
    assert {row[0].strip("`"): row[3] for row in rows} == {
        name: "yes" if kind.needs_reference else "no" for name, kind in KINDS.items()
    }
    for row in rows:
        settings = YAML(typ="safe").load(row[4].strip("`"))["loss"]
        assert PreferenceLossConfig.model_validate(settings).kind == row[0].strip("`")
    smoothing = PAGE.split("**Label smoothing** for ")[1].split(". A wrong")[0]
    assert set(re.findall(r"`(\w+)`", smoothing)) == {n for n, k in KINDS.items() if k.smooths}


def test_every_unpaired_kind_has_its_row() -> None:
    kinds = get_args(UnpairedLossConfig.model_fields["kind"].annotation)
    assert [row[0].strip("`") for row in table("KTO")] == list(kinds)


def test_the_metrics_of_the_page_exist() -> None:
    named = re.findall(r"`((?:dpo|kto|judge|made|pairs)/[\w/<>]+)`", PAGE)
    known = documented_metrics()
    assert len(named) > 5
    assert not [name for name in named if not any(one.fullmatch(name) for one in known)]
