"""Recipes: one YAML file, every key checked, no torch imported."""

from alignment.config.checks import cautions
from alignment.config.counts import describe_counts
from alignment.config.load import (
    dump_recipe,
    load_recipe,
    load_stage,
    load_task,
    parse_recipe,
    shipped_recipes,
)
from alignment.config.pipeline import PipelineRecipe
from alignment.config.schema import Recipe

__all__ = [
    "PipelineRecipe",
    "Recipe",
    "cautions",
    "describe_counts",
    "dump_recipe",
    "load_recipe",
    "load_stage",
    "load_task",
    "parse_recipe",
    "shipped_recipes",
]
