"""`align check`: is a recipe right, and what would it do?"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import typer

from alignment.cli.common import lazy, table
from alignment.cli.train import Overrides, RecipeName

if TYPE_CHECKING:
    from alignment.config import PipelineRecipe, Recipe


def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe, and print what the run would do.

    Every key, value and combination is checked, the options of plug-ins included, and that the
    local files and folders it names exist.
    """
    config = lazy("alignment.config:load_recipe")(recipe, overrides or ())
    typer.echo(describe(config))


def describe(config: Recipe | PipelineRecipe) -> str:
    """The resolved recipe in a few lines: its parts, its arithmetic, and what looks odd."""
    pipeline_type: type[PipelineRecipe] = lazy("alignment.config:PipelineRecipe")
    if isinstance(config, pipeline_type):
        return _describe_pipeline(config)
    recipe = cast("Recipe", config)
    return _described(recipe, lazy("alignment.trainers.local_paths:check_local_paths")(recipe))


def _described(recipe: Recipe, missing: list[str]) -> str:
    counts = lazy("alignment.config:describe_counts")(recipe)
    cautions = [*lazy("alignment.config:cautions")(recipe), *missing]
    rows = [*_parts(recipe), *(("counts", line) for line in counts)]
    rows += [("caution", line) for line in cautions]
    return f"{recipe.run.name}: the recipe is valid\n{table(rows)}"


def _describe_pipeline(pipeline: PipelineRecipe) -> str:
    missing = lazy("alignment.trainers.local_paths:check_pipeline_paths")(pipeline)
    load_stage = lazy("alignment.config:load_stage")
    recipes = {stage.name: load_stage(pipeline, stage.name) for stage in pipeline.stages}
    title = f"{pipeline.run.name}: a valid pipeline of {len(recipes)} stages"
    parts = [title, *(_described(recipe, missing[name]) for name, recipe in recipes.items())]
    if pipeline.compare is not None:
        parts.append(_comparison(pipeline, recipes))
    return "\n\n".join(parts)


def _comparison(pipeline: PipelineRecipe, recipes: dict[str, Recipe]) -> str:
    """What the pipeline does in the end."""
    assert pipeline.compare is not None
    compared = lazy("alignment.config.pipeline:compared_models")(pipeline, recipes)
    rows = [("models", ", ".join(compared))]
    if pipeline.compare.reference is not None:
        rows.append(("reference", pipeline.compare.reference))
    rows += [("task", _plugin(task.type, task.options)) for task in pipeline.compare.tasks]
    rows += [("expect", expectation) for expectation in pipeline.expect]
    return f"the comparison\n{table(rows)}"


def _parts(recipe: Recipe) -> list[tuple[str, str]]:
    model, optim = recipe.model, recipe.optim
    weights = f"LoRA of rank {model.lora.rank}" if model.lora else "all weights"
    rows = [
        ("model", f"{model.path}: {weights} in {model.dtype}, masters in {model.master_dtype}"),
        ("reference", model.reference.mode),
        ("data", _plugin(recipe.data.type, recipe.data.options)),
        ("algorithm", getattr(recipe.algorithm, "type", type(recipe.algorithm).__name__)),
    ]
    if recipe.rollout is not None:
        rollout = recipe.rollout
        rows.append(
            (
                "rollout",
                f"{rollout.engine}: {rollout.max_new_tokens} tokens at temperature "
                f"{rollout.temperature:g}",
            )
        )
    rows += [
        ("reward", f"{reward.weight:g} x {_plugin(reward.type, reward.options)}")
        for reward in recipe.rewards
    ]
    if optim.lr is not None:
        rows.append(("optimizer", f"{optim.type}: lr {optim.lr:g}, {optim.schedule}"))
    rows += [("task", _plugin(task.type, task.options)) for task in recipe.eval.tasks]
    rows += [("expect", expectation) for expectation in recipe.expect]
    rows.append(("folder", f"{recipe.run.dir}/{recipe.run.name}"))
    return rows


def _plugin(name: str, options: dict[str, object]) -> str:
    given = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"{name} ({given})" if given else name
