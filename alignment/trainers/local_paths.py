"""Do the files and folders that a recipe names exist? Known before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignment.config.load import load_stage
from alignment.config.options import resolve
from alignment.config.pipeline import PipelineRecipe
from alignment.config.schema import Recipe
from alignment.data.sources import existing_file, file
from alignment.modeling.catalog import local_directory
from alignment.modeling.template_file import template_file
from alignment.runs.outputs import FINISHED
from alignment.types import UserInputError

_RUNS = "runs"  # the default of run.dir, under which shipped recipes look for each other's models
_SCORED_BY_MODEL = ("reward_model", "process_reward_model")


def require_local_paths(recipe: Recipe) -> None:
    """Check that every local file and folder that the recipe names is there.

    Raises:
        UserInputError: one is not, with the key that names it.
    """
    _refuse([problem for _, problem in _missing(recipe)])


def check_local_paths(recipe: Recipe) -> list[str]:
    """As `require_local_paths`, before the recipes that this one builds on have run: what lies in
    the folder of runs and is not there yet is told in words, and not refused.

    Raises:
        UserInputError: another file or folder is not there, with the key that names it.
    """
    missing = list(_missing(recipe))
    _refuse([problem for value, problem in missing if not _to_be_made(value, recipe)])
    return [f"{problem}; run the recipe that makes it first" for _, problem in missing]


def check_pipeline_paths(pipeline: PipelineRecipe) -> dict[str, list[str]]:
    """As `check_local_paths` for each stage that is not finished, and the same for the comparison,
    which may name nothing that is not there: better known before the first stage has run.

    Returns:
        stage -> cautions.

    Raises:
        UserInputError: a file or folder is not there, with the stage and the key that name it.
    """
    cautions: dict[str, list[str]] = {}
    for stage in pipeline.stages:
        recipe = load_stage(pipeline, stage.name)
        cautions[stage.name] = []
        if (Path(recipe.run.dir) / recipe.run.name / FINISHED).is_file():
            continue  # it stands without what it started from
        try:
            cautions[stage.name] = check_local_paths(recipe)
        except UserInputError as error:
            raise UserInputError(f"stage {stage.name!r}: {error}") from error
    reference = None if pipeline.compare is None else pipeline.compare.reference
    if reference is None or "${stages." in reference:
        return cautions
    try:
        local_directory(reference)
    except UserInputError as error:
        hint = 'the model of a stage is "${stages.NAME.model}"'
        raise UserInputError(f"compare.reference: {error}; {hint}") from error
    return cautions


def _missing(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(value, what is wrong with it, after its key)."""
    for key, value, look in _named(recipe):
        if "${stages." in value:
            continue  # made by an earlier stage
        try:
            look(value)
        except UserInputError as error:
            yield value, f"{key}: {error}"


def _named(recipe: Recipe) -> Iterator[tuple[str, str, Callable[[str], Path | None]]]:
    """(key, value, what looks for it) of every setting that can name a file or folder."""
    data, model = recipe.data, recipe.model
    if resolve("source", data.type) is file:
        yield "data.path", data.options["path"], existing_file
    yield "model.path", model.path, local_directory
    if model.chat_template is not None:
        yield "model.chat_template", model.chat_template, template_file
    for part in ("critic", "judge"):
        path = getattr(getattr(recipe.algorithm, part, None), "path", None)
        if path is not None:
            yield f"algorithm.{part}.path", path, local_directory
    for index, reward in enumerate(recipe.rewards):
        if reward.type in _SCORED_BY_MODEL:
            yield f"rewards.{index}.path", reward.options["path"], local_directory


def _to_be_made(value: str, recipe: Recipe) -> bool:
    path = Path(value).expanduser()
    folders = (_RUNS, Path(recipe.run.dir).expanduser())
    return not path.exists() and any(path.is_relative_to(folder) for folder in folders)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserInputError("\n".join(problems))
