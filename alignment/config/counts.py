"""The arithmetic of a recipe in words, so that nobody has to work out a product."""

from __future__ import annotations

from alignment.config.load import load_stage
from alignment.config.methods.base import many
from alignment.config.pipeline import PipelineRecipe
from alignment.config.schema import Recipe


def describe_counts(recipe: Recipe | PipelineRecipe) -> list[str]:
    """How much a run samples and trains on, a line each.

    An `algorithm` section, a plug-in's too, takes part by having a method
    `describe_counts() -> list[str]`.
    """
    if isinstance(recipe, PipelineRecipe):
        return [
            f"{stage.name}: {line}"
            for stage in recipe.stages
            for line in describe_counts(load_stage(recipe, stage.name))
        ]
    describe = getattr(recipe.algorithm, "describe_counts", list)
    return [*(str(line) for line in describe()), *_sampled_tokens(recipe), *_saves(recipe)]


def _sampled_tokens(recipe: Recipe) -> list[str]:
    samples = getattr(recipe.algorithm, "completions_per_step", None)
    if recipe.rollout is None or samples is None:
        return []
    limit = recipe.rollout.max_new_tokens
    return [f"at most {samples} x {limit} = {samples * limit:,} completion tokens sampled a step"]


def _saves(recipe: Recipe) -> list[str]:
    steps = getattr(recipe.algorithm, "steps", None)
    every = recipe.checkpoint.every
    if not every or not isinstance(steps, int):
        return []
    saved = -(-steps // every)
    keep_best = recipe.checkpoint.keep_best
    best = f", and the one with the best {keep_best.metric}" if keep_best else ""
    return [
        f"a checkpoint every {many(every, 'step')} and at the end = {saved}, "
        f"of which the last {min(saved, recipe.checkpoint.keep)} are kept{best}"
    ]
