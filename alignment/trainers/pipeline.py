"""A pipeline: runs in order, each from what an earlier one made, then compared on one task."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment import registry
from alignment.config.load import dump_recipe, load_stage
from alignment.config.pipeline import CompareConfig, PipelineRecipe
from alignment.config.schema import Recipe
from alignment.runs.directory import RunDirectory
from alignment.runs.files import write_atomic
from alignment.runs.lineage import run_info
from alignment.runs.metrics import MetricsWriter
from alignment.trainers.evaluation import evaluate_model
from alignment.trainers.loop import Stopped
from alignment.trainers.run import (
    FINISHED,
    check_expectations,
    check_resumable,
    train,
    write_report,
)

COMPARISON = "comparison.txt"
"""The tables that a pipeline ends by printing, for people."""


def run_pipeline(
    pipeline: PipelineRecipe, *, resume: str = "auto", command: Sequence[str] = ()
) -> RunDirectory:
    """Run the stages that are not finished yet, compare the models, write the report.

    Raises:
        UserInputError: a stage's recipe, data or model is not usable.
        AlignmentError: a stage stopped, or expectations were not met.
    """
    directory = _open(pipeline, resume, command)
    outputs: dict[str, dict[str, str]] = {}
    recipes: dict[str, Recipe] = {}
    for stage in pipeline.stages:
        Console().rule(f"stage {stage.name}")
        recipe = load_stage(pipeline, stage.name, outputs)
        parents = [output["run"] for output in outputs.values()]
        try:
            run = train(recipe, resume="auto", command=command, parents=parents)
        except Stopped as stopped:
            progress = f"{stopped.progress} of stage {stage.name}"
            raise Stopped(progress, directory.recipe) from stopped
        outputs[stage.name] = {"model": str(run.model_dir), "run": str(run.path)}
        recipes[stage.name] = recipe
        gc.collect()
    if not (directory.path / FINISHED).is_file():
        if pipeline.compare is not None:
            _compare(directory, pipeline.compare, recipes, outputs)
        write_atomic(directory.path / FINISHED, "{}\n")
    table = directory.path / COMPARISON
    if table.is_file():
        text = table.read_text(encoding="utf-8")
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    write_report(directory)
    check_expectations(directory)
    return directory


def _open(pipeline: PipelineRecipe, resume: str, command: Sequence[str]) -> RunDirectory:
    path = Path(pipeline.run.dir) / pipeline.run.name
    recipe_yaml = dump_recipe(pipeline)
    if path.exists():
        check_resumable(path, recipe_yaml, resume)
        return RunDirectory.open(path)
    info = run_info(
        recipe=recipe_yaml,
        command=command,
        seed=pipeline.run.seed,
        model_hash=None,
        tokenizer_hash=None,
        template_hash=None,
        data_hash=None,
    )
    return RunDirectory.create(
        pipeline.run.dir, pipeline.run.name, recipe_yaml=recipe_yaml, info=info
    )


def _compare(
    directory: RunDirectory,
    config: CompareConfig,
    recipes: Mapping[str, Recipe],
    outputs: Mapping[str, Mapping[str, str]],
) -> None:
    """Evaluate the model the first stage started from and each stage's, with the same seeds.

    Held-out data, rewards and sampling are those of the last stage that has rewards, or of the
    last stage where none has.
    """
    latest_first = list(recipes.values())[::-1]
    recipe = next((recipe for recipe in latest_first if recipe.rewards), latest_first[0])
    models = {"base": next(iter(recipes.values())).model.path}
    models |= {name: output["model"] for name, output in outputs.items()}
    results: dict[str, Mapping[str, Any]] = {}
    for name, path in models.items():
        Console().print(f"evaluating {name}", highlight=False)
        results[name] = evaluate_model(recipe, path, config.tasks, seed=config.seed)
        gc.collect()
    for leftover in directory.path.glob("comparison*.json"):  # of a comparison that was cut short
        leftover.unlink()
    metrics: dict[str, float] = {}
    tables: list[str] = []
    for task in results["base"]:
        per_model = {name: result[task] for name, result in results.items()}
        tables.append(registry.get("report", "comparison")(per_model, directory.path, task))
        for name, result in per_model.items():
            metrics |= {f"{task}/{name}/{key}": v for key, v in result.metrics.items()}
    writer = MetricsWriter(directory.metrics)
    writer.truncate_after(0)
    if writer.last_step is None:
        writer.write(0, metrics)
    write_atomic(directory.path / COMPARISON, "\n\n".join(tables) + "\n")
