"""A pipeline: runs in order, each from what an earlier one made, then compared on one task."""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from alignment import registry
from alignment.activity import doing
from alignment.config.load import dump_recipe, load_recipe, load_stage
from alignment.config.model import ModelConfig
from alignment.config.pipeline import (
    BASE,
    CompareConfig,
    PipelineRecipe,
    compared_models,
    resolve_references,
    task_recipe,
)
from alignment.config.schema import Recipe
from alignment.distributed import Distributed
from alignment.runs.directory import RunDirectory
from alignment.runs.events import EventLog
from alignment.runs.files import TEMPORARY_PREFIX, readable_errors, write_atomic
from alignment.runs.inputs import find_parents, refuse_changed_inputs
from alignment.runs.lineage import run_info
from alignment.runs.metrics import MetricsWriter, read_metrics
from alignment.runs.outputs import FINISHED, output_paths, read_finished, write_finished
from alignment.runs.watch import Watch
from alignment.trainers.compared import Role, rests_on, roles
from alignment.trainers.evaluation import evaluate_model, made_by
from alignment.trainers.going_on import names_checkpoint
from alignment.trainers.local_paths import check_pipeline_paths
from alignment.trainers.locked import locked
from alignment.trainers.loop import Stopped
from alignment.trainers.run import check_expectations, train, write_report
from alignment.trainers.same_recipe import check_resumable, take_up_recipe
from alignment.types import UserInputError

COMPARISON = "comparison.txt"
"""The tables that a pipeline ends by printing, for people."""

Outputs = dict[str, dict[str, str]]
"""stage -> output -> path, of what stages have made."""


@dataclass(frozen=True, slots=True)
class _Comparison:
    """model -> task -> result, and what each model is to the reference."""

    results: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, Role]


_NOTHING = _Comparison({}, {})


def run_pipeline(
    pipeline: PipelineRecipe, *, resume: str = "auto", command: Sequence[str] = ()
) -> RunDirectory:
    """Run the stages that are not finished yet, compare the models, write the report.

    A stage that is finished, or on its way, stands as long as what it started from is what the
    earlier stages hold now. The comparison is made again when one of its models has changed.

    Raises:
        UserInputError: a stage's recipe, data or model is not usable, a stage's inputs have
            changed since it started, or `resume` is a checkpoint.
        AlignmentError: a stage stopped, or expectations were not met.
    """
    check_pipeline_paths(pipeline)
    directory = _open(pipeline, resume, command)
    events = EventLog(directory.events)
    with locked(directory.path, Distributed(), events):
        return _run(pipeline, directory, events, command)


def _run(
    pipeline: PipelineRecipe, directory: RunDirectory, events: EventLog, command: Sequence[str]
) -> RunDirectory:
    distributed = Distributed()
    if distributed.is_main and take_up_recipe(directory, pipeline, command):
        Console().print("the recipe asks for another comparison or outcome than it did")
    outputs: Outputs = {}
    recipes: dict[str, Recipe] = {}
    for stage in pipeline.stages:
        Console().rule(f"stage {stage.name}")
        recipe = load_stage(pipeline, stage.name, outputs)
        try:
            run = _run_stage(recipe, command)
        except Stopped as stopped:
            progress = f"{stopped.progress} of stage {stage.name}"
            raise Stopped(progress, directory) from stopped
        outputs[stage.name] = stage_outputs(run.path)
        recipes[stage.name] = recipe
        gc.collect()
    # Ranks that wait for rank 0 see in its heartbeat that it moves.
    with Watch(
        directory.path,
        events,
        rank=distributed.rank,
        world_size=distributed.world_size,
        hang_minutes=recipe.limits.hang_minutes,
    ):
        if distributed.is_main:
            _compare_if_needed(directory, pipeline, recipes, outputs)
        distributed.barrier()
    table = directory.path / COMPARISON
    if table.is_file():
        text = table.read_text(encoding="utf-8")
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if distributed.is_main:
        write_report(directory)
    check_expectations(directory)
    return directory


def stage_outputs(run: Path) -> dict[str, str]:
    """Where the outputs of a finished stage are, of those that it made: output -> path."""
    made = {output: str(path) for output, path in output_paths(run).items() if path.exists()}
    return {"run": str(run), **made}


def _open(pipeline: PipelineRecipe, resume: str, command: Sequence[str]) -> RunDirectory:
    """Rank 0 creates the folder; the others use it."""
    path = Path(pipeline.run.dir) / pipeline.run.name
    if names_checkpoint(resume):
        raise UserInputError(
            f"--resume {resume}: a pipeline has no checkpoints of its own; take one stage back by "
            f"align train {path}/stages/NAME/recipe.yaml --resume {resume}, and then go on with "
            "the pipeline without --resume"
        )
    distributed = Distributed()
    if distributed.broadcast(path.exists()):
        check_resumable(path, pipeline, resume)
    elif distributed.is_main:
        _create(pipeline, command)
    distributed.barrier()
    return RunDirectory.open(path)


def _create(pipeline: PipelineRecipe, command: Sequence[str]) -> None:
    recipe_yaml = dump_recipe(pipeline)
    info = run_info(
        recipe=recipe_yaml,
        command=command,
        seed=pipeline.run.seed,
    )
    RunDirectory.create(pipeline.run.dir, pipeline.run.name, recipe_yaml=recipe_yaml, info=info)


def _run_stage(recipe: Recipe, command: Sequence[str]) -> RunDirectory:
    """Train a stage, unless it is finished and still belongs to what earlier stages hold."""
    path = Path(recipe.run.dir) / recipe.run.name
    name = f"stage {recipe.run.name!r}"
    if path.is_dir() and not refuse_changed_inputs(path, name) and find_parents(recipe):
        _say(f"{name} did not record its inputs (an older version made it); it is taken as it is")
    signals: list[int] = []
    run = train(recipe, resume="auto", command=command, signals=signals)
    # Also waits for rank 0 to have saved what the next stage reads.
    (asked,) = Distributed().max([float(bool(signals))])
    if asked:
        raise Stopped("the last step", run)
    return run


@doing("comparison")
def _compare_if_needed(
    directory: RunDirectory,
    pipeline: PipelineRecipe,
    recipes: Mapping[str, Recipe],
    outputs: Outputs,
) -> None:
    """Compare, unless that was done with all as it is. What an earlier comparison left stands until
    there is something in its place."""
    config, basis = pipeline.compare, dict[str, str]()
    if config is not None:
        models = _models(pipeline, recipes, outputs)
        reference = resolve_references(config.reference, outputs)
        paths = {name: model.path for name, model in models.items()}
        basis = rests_on(config, recipes, paths, reference)
    finished = read_finished(directory.path)
    if finished is not None and _stands(directory, pipeline, finished.compared, basis):
        if config is not None and finished.compared != basis:
            _say("an earlier version made the comparison; it is taken as it is")
            write_finished(directory.path, compared=basis)
        return
    if finished is not None:
        _say(_why_again(finished.compared or {}, basis, compares=config is not None))
    comparison = _NOTHING
    if config is not None:
        made = {name: made["model"] for name, made in outputs.items() if "model" in made}
        comparison = _Comparison(
            results=_evaluate(config, task_recipe(recipes), models, _reference(recipes, reference)),
            parts=roles(paths, reference, recipes, made),
        )
    _replace(directory, (BASE, *recipes), comparison)
    write_finished(directory.path, compared=basis)


def _stands(
    directory: RunDirectory,
    pipeline: PipelineRecipe,
    compared: Mapping[str, str | None] | None,
    basis: Mapping[str, str],
) -> bool:
    """Whether what was compared is what would be. Earlier versions noted the hashes of the stages'
    models, or nothing; they took no other recipe for a folder than its first."""
    if compared is not None and (not compared or "compare" in compared):
        return compared == basis
    hashes = (compared or {}).items()
    if any(value not in (None, basis.get(f"model {name}")) for name, value in hashes):
        return False
    kept = directory.path / "recipe-1.yaml"
    try:
        first = load_recipe(kept if kept.is_file() else directory.recipe)
    except UserInputError:
        return False
    return isinstance(first, PipelineRecipe) and first.compare == pipeline.compare


def _why_again(known: Mapping[str, str | None], basis: Mapping[str, str], *, compares: bool) -> str:
    if not compares:
        return "the recipe compares nothing now: the comparison is removed"
    if not known:
        return "comparing, as the recipe says now"
    changed = [what for what in basis if known.get(what, basis[what]) != basis[what]]
    return f"comparing again; not as before: {', '.join(changed) or 'a model, or compare'}"


def _models(
    pipeline: PipelineRecipe, recipes: Mapping[str, Recipe], outputs: Outputs
) -> dict[str, ModelConfig]:
    """What to compare: name -> model, as the recipe describes it that names or made it."""
    base = next(iter(recipes.values())).model
    return {
        name: base if name == BASE else made_by(recipes[name].model, outputs[name]["model"])
        for name in compared_models(pipeline, recipes)
    }


def _reference(recipes: Mapping[str, Recipe], path: str | None) -> ModelConfig | None:
    """The reference's, as the first stage describes it that starts from it."""
    if path is None:
        return None
    named = (recipe.model for recipe in recipes.values() if recipe.model.path == path)
    return next(named, None) or made_by(task_recipe(recipes).model, path)


def _evaluate(
    config: CompareConfig,
    recipe: Recipe,
    models: Mapping[str, ModelConfig],
    reference: ModelConfig | None,
) -> dict[str, Mapping[str, Any]]:
    """Evaluate each model with the same seeds: model -> task -> result."""
    results: dict[str, Mapping[str, Any]] = {}
    for name, model in models.items():
        Console().print(f"evaluating {name}", highlight=False)
        with doing("comparison", f"model {name}"):
            results[name] = evaluate_model(
                recipe, model, config.tasks, seed=config.seed, reference=reference
            )
        gc.collect()
    return results


def _replace(directory: RunDirectory, models: Collection[str], comparison: _Comparison) -> None:
    """Write the tables and results: beside what an earlier comparison left, then in its place.

    Args:
        models: names that an earlier comparison may have results of.
    """
    with (
        readable_errors("write the comparison in", directory.path),
        TemporaryDirectory(dir=directory.path, prefix=TEMPORARY_PREFIX) as folder,
    ):
        metrics = _write(Path(folder), comparison)
        (directory.path / FINISHED).unlink(missing_ok=True)
        for path in _written(directory, models):
            path.unlink(missing_ok=True)
        writer = MetricsWriter(directory.metrics)
        writer.truncate_after(-1)
        if metrics:  # before the files, which they are the list of
            writer.write(0, metrics)
        writer.close()
        for path in (path for path in Path(folder).rglob("*") if path.is_file()):
            target = directory.path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def _write(folder: Path, comparison: _Comparison) -> dict[str, float]:
    """Write the tables and results to a folder, and give the metrics."""
    metrics: dict[str, float] = {}
    tables: list[str] = []
    write_tables = registry.get("report", "comparison")
    for task in next(iter(comparison.results.values()), {}):
        per_model = {name: result[task] for name, result in comparison.results.items()}
        tables.append(write_tables(per_model, folder, task, comparison.parts))
        for name, result in per_model.items():
            metrics |= {f"{task}/{name}/{key}": v for key, v in result.metrics.items()}
    if tables:
        write_atomic(folder / COMPARISON, "\n\n".join(tables) + "\n")
    return metrics


def _written(directory: RunDirectory, models: Collection[str]) -> set[Path]:
    """The files of an earlier comparison; its metrics, TASK/MODEL/METRIC, say what it was of."""
    found = {directory.path / COMPARISON, directory.path / "comparison.json"}
    for key in (key for record in read_metrics(directory.metrics) for key in record):
        parts = key.split("/")
        for place in (place for place in range(1, len(parts)) if parts[place] in models):
            task = "/".join(parts[:place])
            stem = directory.evals_dir / f"{parts[place]}-{task}"
            found.add(directory.path / f"comparison-{task}.json")
            found |= {stem.with_name(stem.name + suffix) for suffix in (".json", ".jsonl")}
    return found


def _say(text: str) -> None:
    Console().print(text, markup=False, soft_wrap=True)
